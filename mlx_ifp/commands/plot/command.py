"""``mlx_ifp.plot``: a training run's curves, and how much the selections of prompts overlap."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...cli.arguments import load_model
from ...cli.dispatch import command
from ...cli.flags import add_model_options, parse_count
from ...errors import IFPError
from ...files.atomic import new_file
from ...selection.overlap import overlap_matrix, overlap_summary
from ...tuner.run_log import LOG_FILE
from .figures import DPI, check_matplotlib, check_output
from .overlap_maps import default_layers, overlap_figure, read_prompts, select_all
from .training_curves import curves_figure, read_logs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES = """examples:
  mlx_ifp.plot runs/qwen3 --output curves.png
  mlx_ifp.plot runs/by-prompt runs/by-task --output curves.png
  mlx_ifp.plot --overlap --model runs/qwen3/ifp --prompts data/valid.jsonl --output overlap.png
"""


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
