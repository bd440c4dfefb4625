"""Logs of training runs -> their curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import IFPError
from ...files.jsonl import read_jsonl
from ...tuner.run_log import LOG_FILE
from .figures import new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    rows: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in _KINDS}

    def keep(report: dict[str, Any], _: int) -> None:
        for kind in _KINDS:
            if f"{kind}_loss" in report:
                rows[kind][_iteration(report)] = _numbers(report, kind)

    read_jsonl(path, keep, last_may_be_cut=True)
    if not any(rows.values()):
        raise IFPError(f"{path}: there is no line yet with train_loss or val_loss.")
    return Log(path.resolve().parent.name, rows)


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
    colormap = matplotlib.colormaps["tab10" if len(logs) <= 10 else "tab20"]
    palette = [colormap(i) for i in range(colormap.N)]
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
                # One point makes no line, and where there are few, the reader wants to see them.
                few = len(x) == 1 or (curve.kind == "val" and len(x) <= 40)
                axes.plot(x, y, color=color, marker="o" if few else "", markersize=3, **curve.style)
                drawn = True
            if drawn:
                own = palette[i] if len(logs) == 1 else "0.3"
                handles.append(Line2D([], [], color=own, label=curve.label, **curve.style))
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
        figure.suptitle(plain(logs[0].label), fontsize=12)
    else:
        colors = [palette[j % len(palette)] for j in range(len(logs))]
        handles = [Line2D([], [], color=color, linewidth=3) for color in colors]
        labels = [plain(log.label) for log in logs]
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(logs), 4))
    return figure


def _percent(axes: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    # The axis goes to 0, so that a small share looks small, and a little below, to show a 0.
    top = max(axes.dataLim.y1 * 1.05, 0.01)
    axes.set_ylim(-0.03 * top, top)
