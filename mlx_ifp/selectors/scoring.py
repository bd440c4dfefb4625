"""How channels are scored without training, and how many of them each layer keeps."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint.directory import Checkpoint
from ..choices import STATISTICS
from ..dense_pass.statistics import down_norms
from ..errors import IFPError
from ..selection.by_layer import check_by_layer, ks_by_layer
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


def select(
    checkpoint: Checkpoint,
    scores: mx.array,
    ks: list[int],
    *,
    by_layer: bool = False,
    norms: Callable[[], mx.array] | None = None,
    computed_in: mx.Dtype | None = None,
) -> Selection:
    """The channels with the highest scores, by the checkpoint's mask.

    Args:
        checkpoint (Checkpoint): whose channels they are.
        scores (mx.array): float32 [L, d_ffn].
        ks (list): channels to keep in each of L layers.
        by_layer (bool): let one threshold over all layers say how many each keeps.
        norms (Callable): gives what scores are multiplied by before they are compared between
            layers, [L, d_ffn]; None if they can be compared as they are.
        computed_in (mx.Dtype): as for :func:`~mlx_ifp.selection.selection.select_channels`.

    Raises:
        IFPError: if a score is not finite, or k cannot differ by layer.
    """
    if by_layer:
        check_by_layer(ks, checkpoint.d_ffn)
        check_finite(scores, computed_in)
        ks = ks_by_layer(np.array(scores if norms is None else scores * norms()), ks[0])
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


def norms_for(
    checkpoint: Checkpoint, selector: str, statistic: str, reader: ChannelReader | None = None
) -> Callable[[], mx.array] | None:
    """What scores are multiplied by before they are compared between layers.

    That is the norm of the down projection's column, unless the statistic has it in it. The scores
    of a predictor were trained, and need nothing.

    Args:
        checkpoint (Checkpoint): whose channels they are.
        selector (str): what made the scores.
        statistic (str): of which activations.
        reader (ChannelReader): of the checkpoint, if there is one already.

    Returns:
        Callable: reads the norms, [L, d_ffn]; None if the scores need nothing.
    """
    if selector == "predictor" or statistic in _WITH_COLUMNS:
        return None
    return lambda: down_norms(
        reader or ChannelReader(checkpoint.channels), checkpoint.ffns, checkpoint.config
    )
