"""Which sub-network at hand stands in for a new selection that is nearly the same.

Overlap is that of :meth:`~mlx_ifp.selection.selection.Selection.overlap`, on packed bits: with
thousands of channels a layer, comparing lists of channels would take longer than a small
sub-network's loading.
"""

import threading
from collections import OrderedDict

import numpy as np

from ..errors import IFPError
from ..selection.selection import Selection
from .cache import SubnetworkCache

_REMEMBERED = 256


def check_overlap(value: float) -> float:
    """The least overlap for reuse, if it can be one.

    Raises:
        IFPError: unless 0 < value <= 1.
    """
    if not 0 < value <= 1:
        raise IFPError(f"reuse_overlap must be above 0 and at most 1, not {value}.")
    return float(value)


class PackedSelection:
    """A selection's channels, one bit each, for fast comparing.

    Attributes:
        selection: it.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        packed = np.packbits(selection.mask, axis=-1)
        words = -(-packed.shape[1] // 8)
        padded = np.zeros((len(packed), words * 8), dtype=np.uint8)
        padded[:, : packed.shape[1]] = packed
        self._bits = padded.view(np.uint64)
        self._k = np.array(selection.ks)

    def overlap(self, other: "PackedSelection") -> float:
        """The mean overlap with a selection of the same model: that of Selection.overlap."""
        shared = np.bitwise_count(self._bits & other._bits).sum(axis=-1, dtype=np.int64)
        return float((shared / np.maximum(self._k, other._k)).mean())


class Reuse:
    """Finds a stand-in for a new selection among those whose sub-networks are at hand.

    A selection's stand-in, or that it has none, is settled when it is first asked for: keys and
    values of a conversation stay valid while sub-networks come and go. Thread-safe.

    Args:
        at_least (float): the least overlap, above 0 and at most 1.
        networks (SubnetworkCache): what is in memory.
    """

    def __init__(self, at_least: float, networks: SubnetworkCache) -> None:
        self.at_least = check_overlap(at_least)
        self._networks = networks
        self._lock = threading.Lock()
        self._packed: dict[str, PackedSelection] = {}
        self._settled: OrderedDict[str, tuple[Selection, float | None]] = OrderedDict()

    def add(self, selection: Selection) -> None:
        """Say that a selection's sub-network was loaded."""
        if selection.digest in self._packed:
            return
        packed = PackedSelection(selection)
        with self._lock:
            held = self._networks.digests
            self._packed = {d: p for d, p in self._packed.items() if d in held}
            self._packed[selection.digest] = packed

    def stand_in(self, selection: Selection) -> tuple[Selection, float | None]:
        """What is used for a new selection.

        Args:
            selection (Selection): the new one.

        Returns:
            tuple: the stand-in and its overlap, or the selection itself and None.
        """
        with self._lock:
            settled = self._settled.get(selection.digest)
            if settled is None:
                settled = self._find(selection) or (selection, None)
                self._settled[selection.digest] = settled
                if len(self._settled) > _REMEMBERED:
                    self._settled.popitem(last=False)
            else:
                self._settled.move_to_end(selection.digest)
            return settled

    def _find(self, selection: Selection) -> tuple[Selection, float] | None:
        held = self._networks.digests
        if selection.digest in held:
            return None
        new = PackedSelection(selection)
        found = None
        # Of equals the one used last.
        for digest in reversed(held):
            packed = self._packed.get(digest)
            if packed is None:
                continue
            overlap = packed.overlap(new)
            if overlap >= self.at_least and (found is None or overlap > found[1]):
                found = packed.selection, overlap
        return found
