"""Losses as a table and as a plot."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_lm.manage import tabulate

from ...evaluation.losses import Loss, smallest
from ..plot.figures import new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def width(ks: Sequence[int]) -> str:
    """``768``, or the smallest and the largest k if layers differ."""
    return f"{ks[0]}" if len(set(ks)) == 1 else f"{min(ks)}-{max(ks)}"


def table(losses: Sequence[Loss]) -> str:
    """What each run loses and costs; if there are several tasks, their losses follow."""
    rows: list[list[str | int]] = []
    for loss in losses:
        overlap = loss.overlap
        between = None if overlap is None else overlap.between
        within = None if overlap is None else overlap.within
        rows.append(
            [
                loss.way,
                width(loss.ks),
                f"{loss.share:.3f}",
                f"{loss.kl:.4f}",
                f"{loss.agreement:.3f}",
                _number(within, 3),
                _number(between, 3),
                f"{loss.ffn_bytes / 1e6:.1f}",
                f"{loss.memory_bytes / 1e6:.1f}",
                _number(loss.tokens_per_second, 1),
            ]
        )
    header = ["WAY", "K", "SHARE", "KL", "AGREE", "WITHIN", "BETWEEN", "FFN MB", "MEMORY MB",
              "TOKENS/S"]  # fmt: skip
    tables = [tabulate(rows, header)]
    tasks = list(losses[0].tasks)
    if len(tasks) > 1:
        cells: list[list[str | int]] = [
            [loss.way, width(loss.ks), *(f"{loss.tasks[task].kl:.4f}" for task in tasks)]
            for loss in losses
        ]
        tables.append("KL by task\n" + tabulate(cells, ["WAY", "K", *map(plain, tasks)]))
    return "\n\n".join(tables)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def enough(losses: Sequence[Loss], most: float) -> str:
    """The smallest k for each way and task that loses no more than ``most``."""
    found = smallest(losses, most)
    tasks = list(losses[0].tasks)
    cells: list[list[str | int]] = [
        [way, *("-" if (loss := its[task]) is None else width(loss.ks) for task in tasks)]
        for way, its in found.items()
    ]
    title = f"The smallest k with a KL of at most {most:g}"
    return f"{title}\n{tabulate(cells, ['WAY', *map(plain, tasks)])}"


def losses_figure(losses: Sequence[Loss]) -> "Figure":
    """Loss against the bytes of FFN channels that a token reads, one line a way to select."""
    ways: dict[str, list[Loss]] = {}
    for loss in losses:
        ways.setdefault(loss.way, []).append(loss)
    figure = new_figure(7.0, 4.6)
    axes = figure.add_subplot()
    for way, points in ways.items():
        points = sorted(points, key=lambda loss: loss.ffn_bytes)
        axes.plot(
            [loss.ffn_bytes / 1e6 for loss in points],
            [loss.kl for loss in points],
            marker="o",
            label=plain(way),
        )
    axes.set_xlabel("FFN channels, MB")
    axes.set_ylabel("KL to the dense model, nats a token")
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, framealpha=0.8)
    return figure
