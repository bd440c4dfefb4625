"""``mlx_ifp.plot``: a training run's curves, and how much the selections of prompts overlap."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from .atomic import new_file
from .cli import command
from .errors import IFPError
from .masks import Selection
from .model import IFPModel
from .options import add_model_options, load_model, parse_count
from .overlap import overlap_matrix, overlap_summary
from .text import selecting_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_FILE = "log.jsonl"
DPI = 150
NO_TASK = "(no task)"

EXAMPLES = """examples:
  mlx_ifp.plot runs/qwen3 --output curves.png
  mlx_ifp.plot runs/by-prompt runs/by-task --output curves.png
  mlx_ifp.plot --overlap --model runs/qwen3/ifp --prompts data/valid.jsonl --output overlap.png
"""


@dataclass(frozen=True)
class _Curve:
    """One number of the log: its kind of line, its name there, its name in the legend."""

    kind: str
    name: str
    label: str
    style: dict[str, Any]


_TRAIN = {"linestyle": "-", "linewidth": 1.0, "alpha": 0.55}
_SOLID = {"linestyle": "-", "linewidth": 1.8}
_DASHED = {"linestyle": "--", "linewidth": 1.5}

# A panel is drawn if a log has any of its numbers.
PANELS = (
    (
        "loss a token",
        _Curve("train", "train_loss", "training, the objective", _TRAIN),
        _Curve("val", "val_loss", "validation, sub-networks", _SOLID),
        _Curve("val", "dense_loss", "validation, dense model", _DASHED),
    ),
    ("KL to the dense model", _Curve("val", "val_kl", "validation", _SOLID)),
    (
        "overlap of selections",
        _Curve("val", "overlap_within", "within tasks", _SOLID),
        _Curve("val", "overlap_between", "between tasks", _DASHED),
    ),
    ("share of dead channels", _Curve("val", "dead_channels", "selected by no prompt", _SOLID)),
)
_KINDS = ("train", "val")


@dataclass(frozen=True)
class Log:
    """What a training run wrote.

    Attributes:
        label: the name of the run's directory.
        rows: for the kinds ``train`` and ``val``: iteration -> name -> number.
    """

    label: str
    rows: dict[str, dict[int, dict[str, float]]]

    def series(self, kind: str, name: str) -> tuple[list[int], list[float]]:
        """The iterations that have a number, ascending, and the numbers."""
        rows = self.rows[kind]
        iterations = [iteration for iteration in sorted(rows) if name in rows[iteration]]
        return iterations, [rows[iteration][name] for iteration in iterations]


@dataclass(frozen=True)
class PromptRow:
    """A line of a file of prompts: its number, the messages, and the task or None."""

    line: int
    messages: list[dict[str, Any]]
    task: str | None


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_ifp.plot``."""
    parser = argparse.ArgumentParser(
        prog="mlx_ifp.plot",
        description="Draw the curves of training runs, or the overlap of a checkpoint's "
        "selections, as PNG.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help=f"Directory of a training run, or its {LOG_FILE}"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="The PNG file to write")
    overlap = parser.add_argument_group("overlap")
    overlap.add_argument(
        "--overlap",
        action="store_true",
        help="Draw what the selections of prompts share, pair by pair (the paper's Figure 3)",
    )
    overlap.add_argument(
        "--prompts", metavar="FILE", help="JSON lines with messages or prompt, and maybe task"
    )
    overlap.add_argument(
        "--layers",
        type=parse_layers,
        metavar="N,N,...",
        help="Layers to draw, from 0 (default: four, from the first to the last)",
    )
    overlap.add_argument(
        "--max-prompts",
        type=parse_count,
        default=128,
        help="Prompts to draw, as many of each task as there are (default: 128)",
    )
    add_model_options(parser)
    return parser


def parse_layers(text: str) -> list[int]:
    """``0,9,19`` is a list of layers."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers such as 0,9,19")
    return [int(part) for part in parts]


# -- logs -> curves


def read_logs(runs: Sequence[str | Path]) -> list[Log]:
    """The logs of several runs; those whose directories have one name are told apart by path.

    Raises:
        IFPError: see :func:`read_log`.
    """
    logs = [read_log(run) for run in runs]
    labels = [log.label for log in logs]
    return [
        Log(log.label if labels.count(log.label) == 1 else str(run), log.rows)
        for run, log in zip(runs, logs, strict=True)
    ]


def read_log(run: str | Path) -> Log:
    """Read the log of a training run.

    The last of several lines about one iteration counts: a resumed run repeats some. A last line
    that was cut is left out.

    Args:
        run: the run's directory, or its ``log.jsonl``.

    Raises:
        IFPError: if there is no log, or naming the file and the line that is not usable.
    """
    path = Path(run)
    if path.is_dir():
        path /= LOG_FILE
    if not path.is_file():
        raise IFPError(f"{path} does not exist; name the directory of a training run.")
    lines = path.read_bytes().splitlines()
    rows: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in _KINDS}
    for number, line in enumerate(lines, 1):
        try:
            report = _json_object(line)
        except IFPError as error:
            if number == len(lines) and isinstance(error.__cause__, ValueError):
                break  # the run was killed while it wrote this
            raise IFPError(f"{path}: line {number}: {error}") from error
        try:
            for kind in _KINDS:
                if f"{kind}_loss" in report:
                    rows[kind][_iteration(report)] = _numbers(report, kind)
        except IFPError as error:
            raise IFPError(f"{path}: line {number}: {error}") from error
    if not any(rows.values()):
        raise IFPError(f"{path}: there is no line yet with train_loss or val_loss.")
    return Log(path.resolve().parent.name, rows)


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise IFPError("not JSON that can be read.") from error
    if not isinstance(value, dict):
        raise IFPError(f"must be a JSON object, not {type(value).__name__}.")
    return value


def _iteration(report: dict[str, Any]) -> int:
    iteration = report.get("iteration")
    if not isinstance(iteration, int) or isinstance(iteration, bool):
        raise IFPError("iteration must be a whole number.")
    return iteration


def _numbers(report: dict[str, Any], kind: str) -> dict[str, float]:
    """The numbers of a report that are drawn, without those that are null."""
    numbers = {}
    for curve in (curve for _, *curves in PANELS for curve in curves):
        value = report.get(curve.name)
        if curve.kind != kind or value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise IFPError(f"{curve.name} must be a number.")
        numbers[curve.name] = float(value)
    return numbers


def curves_figure(logs: Sequence[Log]) -> "Figure":
    """Losses, overlaps and dead channels against iterations.

    A single run's curves have colours of their own; of several runs, each has one.
    """
    import matplotlib
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    panels = [
        (title, curves)
        for title, *curves in PANELS
        if any(log.series(curve.kind, curve.name)[0] for log in logs for curve in curves)
    ]
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(6.0 * columns + (2 if columns == 1 else 0), 3.6 * rows + 0.5)
    palette = matplotlib.colormaps["tab10" if len(logs) <= 10 else "tab20"].colors
    for number, (title, curves) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        handles = []
        for i, curve in enumerate(curves):
            drawn = False
            for j, log in enumerate(logs):
                x, y = log.series(curve.kind, curve.name)
                if not x:
                    continue
                color = palette[(i if len(logs) == 1 else j) % len(palette)]
                # One point makes no line, and of few the reader wants to see where they are.
                few = len(x) == 1 or (curve.kind == "val" and len(x) <= 40)
                axes.plot(x, y, color=color, marker="o" if few else "", markersize=3, **curve.style)
                drawn = True
            if drawn:
                color = palette[i] if len(logs) == 1 else "0.3"
                handles.append(Line2D([], [], color=color, label=curve.label, **curve.style))
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.legend(handles=handles, fontsize=8, framealpha=0.8)
        if title.startswith("share"):
            _percent(axes)
    if len(logs) == 1:
        figure.suptitle(_plain(logs[0].label), fontsize=12)
    else:
        colors = [palette[j % len(palette)] for j in range(len(logs))]
        handles = [Line2D([], [], color=color, linewidth=3) for color in colors]
        labels = [_plain(log.label) for log in logs]
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(logs), 4))
    return figure


def _percent(axes: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    # Down to 0, so that a small share looks small, and a little below, so that a 0 is seen.
    top = max(axes.dataLim.y1 * 1.05, 0.01)
    axes.set_ylim(-0.03 * top, top)


# -- prompts -> selections -> heat maps


def read_prompts(path: str | Path, limit: int) -> list[PromptRow]:
    """Read prompts, sorted by task; those without one come last.

    If there are more than ``limit``, every task keeps its first ones, as many as the others have.

    Args:
        path: JSON lines in mlx-lm's formats: ``messages`` or ``prompt``, and maybe ``task``.
        limit (int): prompts to keep.

    Raises:
        IFPError: naming the file and the first line that is not usable.
    """
    rows: list[PromptRow] = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            row = _json_object(line)
            task = row.get("task")
            if not isinstance(task, str | None):
                raise IFPError("task must be a string.")
            rows.append(PromptRow(number, _messages(row), task))
        except IFPError as error:
            raise IFPError(f"{path}: line {number}: {error}") from error
    if len(rows) < 2:
        raise IFPError(f"{path}: an overlap needs two prompts, here are {len(rows)}.")
    if limit < 2:
        raise IFPError("An overlap needs two prompts; --max-prompts must be 2 or more.")
    tasks: dict[str | None, list[PromptRow]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    # The first of each task, then the second of each, and so on.
    rounds = sorted(
        (i, row.line, row) for members in tasks.values() for i, row in enumerate(members)
    )
    kept = [row for _, _, row in rounds[:limit]]
    return sorted(kept, key=lambda row: (row.task is None, row.task or "", row.line))


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row; a prompt is one of the user, as in training."""
    if "messages" not in row and isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}]
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise IFPError("a row has messages, a list that is not empty, or prompt, a string.")
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else 0
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list | None) or not all(
            isinstance(part, dict) and isinstance(part.get("text", ""), str) for part in parts
        ):
            raise IFPError("a message must be an object with role and content.")
    return messages


def default_layers(layers: int) -> list[int]:
    """Four layers spread evenly from the first to the last of ``layers``, or all if fewer."""
    if layers <= 4:
        return list(range(layers))
    return [i * (layers - 1) // 3 for i in range(4)]


def select_all(model: IFPModel, rows: Sequence[PromptRow], path: str | Path) -> list[Selection]:
    """The selections of prompts.

    Raises:
        IFPError: naming the line of ``path`` whose text selects nothing.
    """
    selections = []
    for row in tqdm(rows, desc="Selecting", unit="prompt", disable=None):
        try:
            text = selecting_text(row.messages, model.checkpoint.ifp.text.source)
            selections.append(model.select(text))
        except IFPError as error:
            raise IFPError(f"{path}: line {row.line}: {error}") from error
    return selections


def overlap_figure(
    matrix: np.ndarray,
    tasks: Sequence[str | None],
    layers: Sequence[int],
    titles: Sequence[str],
) -> "Figure":
    """Heat maps of the overlap of all pairs of prompts (paper, Figure 3).

    Args:
        matrix: float64 [n, n, L], from :func:`~mlx_ifp.overlap.overlap_matrix`.
        tasks: n names or None, prompts of one task side by side.
        layers: the layers to draw.
        titles: one for each of them.
    """
    n = len(matrix)
    shown = matrix[:, :, list(layers)]
    others = shown[~np.eye(n, dtype=bool)]
    # The diagonal is always 1; the colours are for the rest. At least 0.1 is spanned, so that
    # selections that hardly differ look so.
    high = float(others.max())
    low = min(float(others.min()), high - 0.1)
    if low < 0:
        low, high = 0.0, max(high, 0.1)
    blocks = [(name, len(list(group))) for name, group in groupby(tasks)]
    ends = np.cumsum([size for _, size in blocks])
    centres = ends - np.array([size for _, size in blocks]) / 2 - 0.5
    named = [_plain(NO_TASK if name is None else name) for name, _ in blocks]

    columns = len(layers) if len(layers) <= 3 else math.ceil(math.sqrt(len(layers)))
    rows = math.ceil(len(layers) / columns)
    figure = new_figure(4.2 * columns + 1.4, 4.2 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(layers) :]:
        axes.remove()
    # Lines of many tasks would hide the cells.
    width = min(0.8, 12 / len(blocks))
    for i, title in enumerate(titles):
        axes = grid.flat[i]
        image = axes.imshow(
            shown[:, :, i], vmin=low, vmax=high, cmap="viridis", interpolation="nearest"
        )
        axes.set_title(title, fontsize=10)
        for end in ends[:-1]:
            axes.axhline(end - 0.5, color="white", linewidth=width)
            axes.axvline(end - 0.5, color="white", linewidth=width)
        first, last = i % columns == 0, i + columns >= len(layers)
        if set(tasks) == {None}:
            axes.set_xlabel("prompt" if last else "")
            axes.set_ylabel("prompt" if first else "")
            continue
        size = min(9.0, max(4.0, 240 / len(blocks)))
        axes.set_xticks(centres, named if last else [], rotation=90, fontsize=size)
        axes.set_yticks(centres, named if first else [], fontsize=size)
        axes.tick_params(length=0)
    extend = "max" if high < 1 else "neither"
    bar = figure.colorbar(image, ax=list(figure.axes), shrink=0.7, extend=extend)
    bar.set_label("shared channels / k")
    return figure


# -- files


def new_figure(width: float, height: float) -> "Figure":
    """A figure in inches, without pyplot: it would choose a window system and keep figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _plain(text: str) -> str:
    """A name as it is, not too long; matplotlib would read mathematics between dollars."""
    text = " ".join(text.split())
    return (text if len(text) <= 32 else f"{text[:31]}…").replace("$", r"\$")


def check_output(path: Path, option: str = "--output") -> None:
    """Raises IFPError before hours of work, not after them."""
    if path.suffix.lower() != ".png":
        raise IFPError(f"{option} {path}: the name must end in .png.")
    if path.is_dir():
        raise IFPError(f"{option} {path} is a directory; name a file.")
    if not path.parent.is_dir():
        raise IFPError(f"{option} {path}: there is no directory {path.parent}.")


def check_matplotlib() -> None:
    """Raises IFPError if it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise IFPError("Plots need matplotlib: pip install 'mlx_ifp[plot]'") from error


def _check_arguments(args: argparse.Namespace) -> None:
    if args.overlap:
        if args.runs:
            raise IFPError("Give runs or --overlap, not both.")
        if args.prompts is None:
            raise IFPError("--overlap needs --prompts.")
    elif not args.runs:
        raise IFPError("Give the directories of training runs, or --overlap.")
    elif args.prompts is not None or args.layers is not None:
        raise IFPError("--prompts and --layers are for --overlap.")


def _draw_overlap(args: argparse.Namespace) -> tuple["Figure", str]:
    """The heat maps, and a line that says what they show."""
    rows = read_prompts(args.prompts, args.max_prompts)
    model, _ = load_model(args)
    count = len(model.checkpoint.ffns)
    layers = default_layers(count) if args.layers is None else args.layers
    if max(layers) >= count:
        raise IFPError(f"--layers: there is no layer {max(layers)}; they are 0 to {count - 1}.")
    selections = select_all(model, rows, args.prompts)
    tasks = [row.task for row in rows]
    summary = overlap_summary(selections, tasks)
    parts = [
        ("within tasks", summary.within, summary.within_by_layer),
        ("between tasks", summary.between, summary.between_by_layer),
    ]
    titles = [
        f"layer {layer}\n"
        + ", ".join(f"{name} {means[layer]:.3f}" for name, _, means in parts if means)
        for layer in layers
    ]
    said = "".join(f", overlap {name} {mean:.3f}" for name, mean, _ in parts if mean is not None)
    return overlap_figure(overlap_matrix(selections), tasks, layers, titles), (
        f"{len(rows)} prompts of {len(set(tasks))} tasks{said}, "
        f"dead channels {summary.dead_channels:.1%}"
    )


@command
def main() -> None:
    """Run ``mlx_ifp.plot``."""
    args = setup_arg_parser().parse_args()
    output = Path(args.output)
    _check_arguments(args)
    check_output(output)
    check_matplotlib()
    if args.overlap:
        figure, said = _draw_overlap(args)
    else:
        logs = read_logs(args.runs)
        figure = curves_figure(logs)
        last = max(iteration for log in logs for rows in log.rows.values() for iteration in rows)
        said = f"{len(logs)} {'run' if len(logs) == 1 else 'runs'}, up to iteration {last}"
    with new_file(output) as file:
        figure.savefig(file, format="png", dpi=DPI)
    print(f"{output}: {said}")
