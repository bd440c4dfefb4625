"""What a first prompt needs is read while the tokenizer loads and the text is not there yet."""

from collections.abc import Iterable, Iterator

import mlx.core as mx

from ..checkpoint.directory import Checkpoint
from ..checkpoint.weights import begin_trunk
from ..device import default_cache_bytes
from ..files.read_ahead import Range, read_ahead
from ..selection.disk_cache import SelectionCache
from .channels import byte_ranges


class Ahead:
    """The trunk, which is read now, and what the system is asked to read of the rest.

    That is the predictor, if it selects, and the channels that are likely to be needed: all, if the
    dense LLM reads the prompt, or those that each of the last selections on disk has kept.

    Args:
        checkpoint (Checkpoint): an opened one.
        dtype (mx.Dtype): floats of the trunk are cast to this type; None keeps them.
        selector (str): what is going to select; None for what the checkpoint says.
        prefill (str): who is going to read the prompt; None for what suits the selector.
        selections (SelectionCache): those on disk, or None.
        channels (bool): whether channels are going to be selected.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype | None,
        *,
        selector: str | None = None,
        prefill: str | None = None,
        selections: SelectionCache | None = None,
        channels: bool = True,
    ) -> None:
        self._trunk: dict[str, mx.array] | None = begin_trunk(checkpoint, dtype)
        selector = selector or checkpoint.ifp.selector
        prefill = prefill or checkpoint.ifp.prefill_with(selector)
        if channels:
            read_ahead(lambda: _rest(checkpoint, selector, prefill, selections))

    def take_trunk(self) -> dict[str, mx.array] | None:
        """Name -> array, for :func:`~mlx_ifp.checkpoint.weights.load_trunk`; given once only."""
        taken, self._trunk = self._trunk, None
        return taken


def _rest(
    checkpoint: Checkpoint, selector: str, prefill: str, selections: SelectionCache | None
) -> Iterator[Range]:
    if selector == "predictor":
        tensors = (checkpoint.predictor | checkpoint.head).values()
        yield from ((path, 0, 0) for path in sorted({tensor.path for tensor in tensors}))
    yield from likely_channels(checkpoint, prefill, selections)


def likely_channels(
    checkpoint: Checkpoint, prefill: str, selections: SelectionCache | None
) -> Iterable[Range]:
    """Where the channels lie that a first prompt probably needs, in the order of the layers.

    Args:
        checkpoint (Checkpoint): an opened one.
        prefill (str): ``dense`` if the dense LLM reads the prompt, which takes all channels.
        selections (SelectionCache): those on disk, or None.
    """
    everything, common = prefill == "dense", None
    nbytes = sum(info.nbytes for info in checkpoint.channels.values())
    # What does not stay in the system's memory until it is needed would be read twice.
    if everything and nbytes > default_cache_bytes():
        return
    if not everything and selections is not None:
        common = selections.always(checkpoint.digest)
    if not everything and common is None:
        return
    for layer, ffn in enumerate(checkpoint.ffns):
        for name, info in checkpoint.channels.items():
            if name.startswith(f"{ffn.path}."):
                for offset, nbytes in byte_ranges(info, None if common is None else common[layer]):
                    yield info.path, offset, nbytes
