"""A selection that was chosen, and the sub-network that is ready for generation."""

from dataclasses import dataclass

import mlx.nn as nn

from ..selection.selection import Selection


@dataclass(frozen=True)
class Chosen:
    """What is to be loaded, and what finding it cost.

    Attributes:
        selection, source, reuse_overlap: as in :class:`Prepared`.
        seconds: time that the selection took.
    """

    selection: Selection | None
    source: str
    seconds: float
    reuse_overlap: float | None = None


@dataclass(frozen=True)
class Prepared:
    """A sub-network that is ready, and what getting it cost.

    Attributes:
        network: an mlx-lm model.
        selection: its channels, or None for the dense model.
        source: where the selection came from: ``predictor``, ``activations``, ``static``,
            ``memory``, ``disk``, ``given`` or ``dense``.
        select_seconds: time that the selection took.
        load_seconds: time that the sub-network took.
        bytes_read: bytes of channels read for it; 0 if it was in memory.
        channels_reused: channels, over all layers, whose rows came from another sub-network in
            memory; the others were read.
        reuse_overlap: the overlap of the two, if another selection stands in for the text's own
            (``reuse_overlap`` of :func:`load`); ``selection`` is then the one in use. Else None.
    """

    network: nn.Module
    selection: Selection | None
    source: str
    select_seconds: float
    load_seconds: float
    bytes_read: int
    channels_reused: int = 0
    reuse_overlap: float | None = None
