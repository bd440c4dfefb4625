"""Sub-networks in memory."""

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.nn as nn

from ..lru import Once


@dataclass(frozen=True)
class CacheInfo:
    """Counts of a :class:`SubnetworkCache` since it was made, and what it holds now."""

    hits: int
    misses: int
    evictions: int
    entries: int
    nbytes: int
    max_bytes: int


class SubnetworkCache:
    """Sub-networks in memory: least recently used, bounded in bytes. Thread-safe.

    Only a sub-network's own channels count; the trunk is shared. One that is in use, see
    :meth:`using`, is not evicted, so that its bytes count: the cache is over its bound only by what
    is in use at once. One that was handed out and evicted lives until its last user lets go,
    uncounted. One that is larger than the bound is handed out, but not kept.

    Args:
        max_bytes (int): the bound.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, tuple[nn.Module, int]] = OrderedDict()
        self._once = Once(self._lock)
        self._users: Counter[str] = Counter()
        self._hits = self._misses = self._evictions = 0

    def get(self, digest: str, load: Callable[[], tuple[nn.Module, int]]) -> tuple[nn.Module, bool]:
        """The sub-network of a selection, loaded if it is not there.

        If several threads ask for the same one at once, one loads and the others wait for it.

        Args:
            digest (str): the selection's.
            load (Callable): gives the model and its bytes.

        Returns:
            tuple: the model, and whether it was there.
        """

        def held() -> tuple[nn.Module, int] | None:
            if entry := self._entries.get(digest):
                self._entries.move_to_end(digest)
            return entry

        def made() -> tuple[nn.Module, int]:
            with self._lock:
                self._misses += 1
            entry = load()
            with self._lock:
                if digest in self._entries:
                    # A user of the one that was evicted has brought it back meanwhile.
                    entry = self._entries[digest]
                elif entry[1] <= self.max_bytes or digest in self._users:
                    self._entries[digest] = entry
                    self._evict()
            return entry

        (network, _), mine = self._once.get(digest, held, made)
        if not mine:
            with self._lock:
                self._hits += 1
        return network, not mine

    @contextlib.contextmanager
    def using(
        self, digest: str, network: nn.Module, nbytes: Callable[[], int]
    ) -> Iterator[nn.Module]:
        """Keep a sub-network, and count its bytes, for as long as the block runs.

        Args:
            digest (str): the selection's.
            network (nn.Module): from :meth:`get`. If it was evicted since, it comes back.
            nbytes (Callable): gives its bytes; called only if it comes back.

        Yields:
            nn.Module: the one that is kept. It is another than ``network`` if that was evicted and
            another thread has loaded it again.
        """
        with self._lock:
            self._users[digest] += 1
            if digest not in self._entries:
                self._entries[digest] = (network, nbytes())
            network = self._entries[digest][0]
            self._entries.move_to_end(digest)
            self._evict()
        try:
            yield network
        finally:
            with self._lock:
                self._users[digest] -= 1
                if not self._users[digest]:
                    del self._users[digest]
                self._evict()

    def _evict(self) -> None:
        self.shrink(self.max_bytes)

    def shrink(self, nbytes: int) -> None:
        """Evict until at most that many bytes are held, or all that are left are in use."""
        with self._lock:
            while self.nbytes > nbytes:
                free = [digest for digest in self._entries if digest not in self._users]
                if not free:
                    return
                del self._entries[free[0]]
                self._evictions += 1

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            return sum(nbytes for _, nbytes in self._entries.values())

    @property
    def digests(self) -> list[str]:
        """What is held now, least recently used first."""
        with self._lock:
            return list(self._entries)

    def clear(self) -> None:
        """Drop all that is not in use."""
        with self._lock:
            for digest in list(self._entries):
                if digest not in self._users:
                    del self._entries[digest]

    @property
    def info(self) -> CacheInfo:
        """Counts and sizes."""
        with self._lock:
            return CacheInfo(
                self._hits,
                self._misses,
                self._evictions,
                len(self._entries),
                self.nbytes,
                self.max_bytes,
            )
