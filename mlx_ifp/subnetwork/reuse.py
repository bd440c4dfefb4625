"""Which sub-network in memory stands in for a new selection that is nearly the same."""

import threading

import numpy as np

from ..errors import IFPError
from ..lru import LRU
from ..selection.packed import overlap, pack
from ..selection.selection import Selection
from .cache import SubnetworkCache

_REMEMBERED = 256


def check_overlap(value: float) -> float:
    """The least overlap for reuse, checked.

    Raises:
        IFPError: unless 0 < value <= 1.
    """
    if not 0 < value <= 1:
        raise IFPError(f"reuse_overlap must be above 0 and at most 1, not {value}.")
    return float(value)


class Reuse:
    """Finds a stand-in for a new selection among those whose sub-networks are in memory.

    Whether a selection has a stand-in, and which, is settled when it is first asked for. So the
    keys and values of a conversation stay valid while sub-networks come and go. Thread-safe.

    Args:
        at_least (float): the least overlap, above 0 and at most 1.
        networks (SubnetworkCache): what is in memory.
    """

    def __init__(self, at_least: float, networks: SubnetworkCache) -> None:
        self.at_least = check_overlap(at_least)
        self._networks = networks
        self._lock = threading.Lock()
        self._packed: dict[str, tuple[Selection, np.ndarray]] = {}
        self._settled: LRU[str, tuple[Selection, float | None]] = LRU(_REMEMBERED)

    def add(self, selection: Selection) -> None:
        """Note that a selection's sub-network was loaded."""
        if selection.digest in self._packed:
            return
        bits = pack(selection.mask)
        with self._lock:
            held = self._networks.digests
            self._packed = {d: p for d, p in self._packed.items() if d in held}
            self._packed[selection.digest] = selection, bits

    def stand_in(self, selection: Selection) -> tuple[Selection, float | None]:
        """The selection that is used for a new one.

        Args:
            selection (Selection): the new one.

        Returns:
            tuple: the stand-in and its overlap, or the selection itself and None.
        """
        settled, _ = self._settled.get_or_make(
            selection.digest, lambda: (self._find(selection) or (selection, None), 1)
        )
        return settled

    def _find(self, selection: Selection) -> tuple[Selection, float] | None:
        held = self._networks.digests
        if selection.digest in held:
            return None
        new, found = pack(selection.mask), None
        # The one used last wins among equals.
        for digest in reversed(held):
            if (packed := self._packed.get(digest)) is None:
                continue
            other, bits = packed
            alike = float(overlap(bits, new).mean())
            if alike >= self.at_least and (found is None or alike > found[1]):
                found = other, alike
        return found
