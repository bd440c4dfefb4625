"""Selection -> network: rows are read, then the network is assembled and kept in memory."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

from ..llm.modules import get_module
from ..selection.selection import Selection, check_selection, digest_of
from .build import assemble
from .cache import SubnetworkCache
from .parent import Parent
from .residents import Residents
from .rows import FFNRows


@dataclass(frozen=True)
class Loaded:
    """A network, and what loading it cost.

    Attributes:
        network: an mlx-lm model that shares the trunk.
        bytes_read: bytes of channels read for it.
        channels_reused: channels, over all layers, whose rows were in memory.
    """

    network: nn.Module
    bytes_read: int = 0
    channels_reused: int = 0


class SubnetworkStore:
    """Sub-networks by selection, made when they are first asked for. Thread-safe.

    Args:
        parent (Parent): the LLM that they are cut from.
        cache (SubnetworkCache): the sub-networks in memory.

    Attributes:
        parent, cache: as given.
        residents: those in memory, whose rows a new one can take over.
    """

    def __init__(self, parent: Parent, cache: SubnetworkCache[Loaded]) -> None:
        self.parent = parent
        self.cache = cache
        self.residents = Residents(parent)

    def get(
        self, selection: Selection | None, make_room: Callable[[Selection | None], None]
    ) -> Loaded:
        """The network of a selection; None is the dense model, with all channels.

        Args:
            selection (Selection): which channels.
            make_room (Callable): called with the selection before a row is read.

        Returns:
            Loaded: its costs are 0 if it was in memory.

        Raises:
            IFPError: if the selection is of a model of other shapes.
        """
        loaded, was_there = self.cache.get(
            digest_of(selection), lambda: self._load(selection, make_room)
        )
        return Loaded(loaded.network) if was_there else loaded

    def _load(
        self, selection: Selection | None, make_room: Callable[[Selection | None], None]
    ) -> tuple[Loaded, int]:
        """The network and the bytes that its own FFNs take."""
        make_room(selection)
        if selection is not None:
            check_selection(selection, self.parent.ffns)
        rows: list[FFNRows] = []

        def noted() -> Iterator[FFNRows]:
            for layer in self.residents.read_all(selection, self.cache.digests):
                rows.append(layer)
                yield layer

        network = assemble(self.parent, noted())
        self.residents.add(network, selection, rows)
        _set_width(network, self.parent.ffns[0].d_ffn if selection is None else selection.k)
        loaded = Loaded(
            network,
            sum(layer.bytes_read for layer in rows),
            sum(layer.channels_reused for layer in rows),
        )
        return loaded, sum(layer.nbytes for layer in rows)

    @contextlib.contextmanager
    def using(self, selection: Selection | None, network: nn.Module) -> Iterator[nn.Module]:
        """Keep a network in memory while the block runs: see :meth:`SubnetworkCache.using`.

        Args:
            selection (Selection): that of the network.
            network (nn.Module): from :meth:`get`.

        Yields:
            nn.Module: the one that is kept.
        """
        nbytes = partial(self._ffn_bytes, network)
        with self.cache.using(digest_of(selection), Loaded(network), nbytes) as kept:
            yield kept.network

    def _ffn_bytes(self, network: nn.Module) -> int:
        """Bytes of a network's own channels."""
        modules = (get_module(network, ffn.path) for ffn in self.parent.ffns)
        return sum(tree_reduce(_add_bytes, module.parameters(), 0) for module in modules)


def _add_bytes(total: int, array: mx.array) -> int:
    return total + array.nbytes


def _set_width(network: nn.Module, k: int | list[int]) -> None:
    """Write the width into the sub-network's own arguments, for code that reads it there."""
    args = getattr(network, "args", None)
    if args is not None and hasattr(args, "intermediate_size"):
        args.intermediate_size = k
