"""How channels are scored without training, and how many of them each layer keeps."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint.directory import Checkpoint
from ..choices import STATISTICS
from ..dense_pass.statistics import down_norms
from ..errors import IFPError
from ..selection.by_layer import check_by_layer, ks_by_layer, standardised
from ..selection.selection import Selection, check_finite, select_channels
from ..subnetwork.channels import ChannelReader

# Statistics that have the norm of the down projection's column in them.
_WITH_COLUMNS = ("norm", "probe")


@dataclass(frozen=True)
class Scoring:
    """How channels are scored without training, and how many of them each layer keeps.

    Attributes:
        statistic: what of the activations counts: a name of
            :data:`~mlx_ifp.dense_pass.statistics.STATISTICS`.
        blend: the weight of the prompt's ranks in ``glass``; the rest is the prior's.
        by_layer: whether one threshold over all layers says how many channels each keeps.
    """

    statistic: str = "griffin"
    blend: float = 0.5
    by_layer: bool = False

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        statistic: str | None = None,
        blend: float | None = None,
        by_layer: bool | None = None,
    ) -> "Scoring":
        """What a checkpoint says, unless it is given.

        Raises:
            IFPError: if something is not known or out of range.
        """
        if statistic is not None and statistic not in STATISTICS:
            known = ", ".join(STATISTICS)
            raise IFPError(f"statistic must be one of {known}, not {statistic!r}.")
        if blend is not None and not 0 <= blend <= 1:
            raise IFPError(f"blend must be from 0 to 1, not {blend}.")
        ifp = checkpoint.ifp
        return cls(
            statistic or cls.statistic,
            ifp.blend if blend is None else blend,
            ifp.keep_by_layer if by_layer is None else by_layer,
        )


@dataclass(frozen=True)
class Part:
    """A part of scores, by which layers are compared.

    Attributes:
        scores: [L, d_ffn].
        statistic: which statistic they are; None for a predictor's scores.
        weight: of this part among all.
    """

    scores: mx.array | np.ndarray
    statistic: str | None
    weight: float = 1.0


def select(
    checkpoint: Checkpoint,
    scores: mx.array,
    ks: list[int],
    parts: list[Part],
    *,
    by_layer: bool = False,
    norms: Callable[[], mx.array],
    computed_in: mx.Dtype | None = None,
) -> Selection:
    """The channels with the highest scores, by the checkpoint's mask.

    Args:
        checkpoint (Checkpoint): whose channels they are.
        scores (mx.array): float32 [L, d_ffn], by which channels of one layer are compared.
        ks (list): channels to keep in each of L layers.
        parts (list): by which layers are compared. Ranks would tell nothing: they are the same in
            every layer.
        by_layer (bool): let one threshold over all layers say how many each keeps.
        norms (Callable): reads the norms of the down projections' columns, [L, d_ffn].
        computed_in (mx.Dtype): as for :func:`~mlx_ifp.selection.selection.select_channels`.

    Raises:
        IFPError: if a score is not finite, or k cannot differ by layer.
    """
    if by_layer:
        check_by_layer(ks, checkpoint.d_ffn)
        check_finite(scores, computed_in)
        ks = ks_by_layer(_sizes(parts, norms), ks[0])
    mask = checkpoint.ifp.mask
    return select_channels(
        scores,
        ks,
        operator=mask.operator,
        temperature=mask.temperature,
        keep_soft_values=mask.keep_soft_values,
        checkpoint=checkpoint.digest,
        computed_in=computed_in,
    )


def _sizes(parts: list[Part], norms: Callable[[], mx.array]) -> np.ndarray:
    """What a channel adds to its layer, compared with the others of the layer: [L, d_ffn].

    A statistic of activations is multiplied by the norm of the down projection's column, unless it
    has it in it. The scores of a predictor were trained, and need nothing.
    """
    total = np.zeros(np.shape(parts[0].scores))
    for part in parts:
        scores = np.array(part.scores)
        if part.statistic is not None and part.statistic not in _WITH_COLUMNS:
            scores = scores * np.array(norms())
        total = total + part.weight * standardised(scores)
    return total


def norms_of(checkpoint: Checkpoint, reader: ChannelReader | None = None) -> mx.array:
    """Read the norms of the down projections' columns: [L, d_ffn].

    Args:
        checkpoint (Checkpoint): whose channels they are.
        reader (ChannelReader): of the checkpoint, if there is one already.
    """
    reader = reader or ChannelReader(checkpoint.channels)
    return down_norms(reader, checkpoint.ffns, checkpoint.config)
