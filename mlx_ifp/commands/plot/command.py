"""``mlx_ifp.plot``: a training run's curves, and how much the selections of prompts overlap."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ...cli.arguments import load_model
from ...errors import IFPError
from ...files.atomic import new_file
from ...selection.overlap import overlap_matrix, overlap_summary
from .figures import DPI, check_matplotlib, check_output
from .overlap_maps import default_layers, overlap_figure, read_prompts, select_all
from .training_curves import curves_figure, read_logs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.plot``."""
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
