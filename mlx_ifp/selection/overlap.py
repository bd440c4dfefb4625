"""How alike the selections of many prompts are. Functions take selections and know no model.

The paper is Instruction-Following Pruning (Hou et al., ICML 2025, arXiv 2501.02086), section 4.4
and appendix A.3. If all selections are alike, the mask has collapsed: the prompt decides nothing.

n is the number of selections, L the number of layers, F = d_ffn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import IFPError
from .packed import count, overlap, pack
from .selection import Selection


@dataclass(frozen=True)
class Overlap:
    """The overlap of the selections of many prompts.

    Attributes:
        within: mean over layers and over all pairs of prompts of one task; None without a pair.
        between: the same over all pairs of prompts of different tasks; None without a pair.
        within_by_layer: L means, or None.
        between_by_layer: L means, or None.
        dead_channels: the share of all L * F channels that no selection holds.
    """

    within: float | None
    between: float | None
    within_by_layer: list[float] | None
    between_by_layer: list[float] | None
    dead_channels: float


def overlap_matrix(selections: Sequence[Selection]) -> np.ndarray:
    """The overlap of every pair of selections: shared channels / k, the larger k of the two.

    Args:
        selections: n of one model.

    Returns:
        np.ndarray: float64 [n, n, L], symmetric, 1 on the diagonal.

    Raises:
        IFPError: if there is none, or they are of different models.
    """
    return _overlaps(selections)[0]


def overlap_summary(selections: Sequence[Selection], tasks: Sequence[str | None]) -> Overlap:
    """The mean overlap within tasks and between tasks, and the share of dead channels.

    A prompt is not paired with itself; all pairs count alike, whatever the sizes of the tasks.

    Args:
        selections: n of one model.
        tasks: n names; all prompts without a name (None) are one task.

    Returns:
        Overlap: lists by layer hold L values.

    Raises:
        IFPError: if there is no selection, they are of different models, or there are not as many
            tasks.
    """
    if len(tasks) != len(selections):
        raise IFPError(f"{len(selections)} selections, but {len(tasks)} tasks.")
    overlaps, used = _overlaps(selections)
    numbers = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
    task = np.array([numbers[name] for name in tasks])
    same = task[:, None] == task[None, :]
    pairs = np.triu(np.ones_like(same), 1)
    within, between = _mean(overlaps, pairs & same), _mean(overlaps, pairs & ~same)
    return Overlap(
        within=None if within is None else float(within.mean()),
        between=None if between is None else float(between.mean()),
        within_by_layer=None if within is None else within.tolist(),
        between_by_layer=None if between is None else between.tolist(),
        dead_channels=1 - used / (len(selections[0].layers) * selections[0].d_ffn),
    )


def _overlaps(selections: Sequence[Selection]) -> tuple[np.ndarray, int]:
    """The overlap matrix, float64 [n, n, L], and how many channels are in any selection."""
    if not selections:
        raise IFPError("There is no selection to compare.")
    shapes = sorted({(len(selection.layers), selection.d_ffn) for selection in selections})
    if len(shapes) > 1:
        raise IFPError(
            "These selections are of different models: "
            f"{' and '.join(f'{layers} x {d_ffn}' for layers, d_ffn in shapes)} channels."
        )
    bits = np.stack([pack(selection.mask) for selection in selections])
    overlaps = np.empty((len(bits), len(bits), bits.shape[1]))
    for i in range(len(bits)):
        overlaps[i, i:] = overlaps[i:, i] = overlap(bits[i], bits[i:])
    return overlaps, int(count(np.bitwise_or.reduce(bits)).sum())


def _mean(overlaps: np.ndarray, pairs: np.ndarray) -> np.ndarray | None:
    """The mean over the pairs that a bool [n, n] array marks: float64 [L]."""
    return overlaps[pairs].mean(axis=0) if pairs.any() else None
