"""Sub-networks in memory."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..lru import LRU

Network = TypeVar("Network")


@dataclass(frozen=True)
class CacheInfo:
    """Counts of a :class:`SubnetworkCache` since it was made, and what it holds now."""

    hits: int
    misses: int
    evictions: int
    entries: int
    nbytes: int
    max_bytes: int


class SubnetworkCache(Generic[Network]):
    """Sub-networks in memory: least recently used, bounded in bytes. Thread-safe.

    Only a sub-network's own channels count, because the trunk is shared. One that is in use (see
    :meth:`using`) is not evicted, so its bytes count: the cache exceeds its bound only by what is
    in use at the same time. One that was handed out and then evicted lives until its last user lets
    go, but does not count. One that is larger than the bound is handed out, but not kept.

    Args:
        max_bytes (int): the bound.
    """

    def __init__(self, max_bytes: int) -> None:
        self._users: Counter[str] = Counter()
        self._held: LRU[str, Network] = LRU(max_bytes, in_use=self._users)
        self._hits = self._misses = 0

    @property
    def max_bytes(self) -> int:
        """The bound."""
        return self._held.most

    @max_bytes.setter
    def max_bytes(self, nbytes: int) -> None:
        self._held.most = nbytes

    def get(self, digest: str, load: Callable[[], tuple[Network, int]]) -> tuple[Network, bool]:
        """The sub-network of a selection, loaded if it is not there.

        If several threads ask for the same one at once, one loads and the others wait for it.

        Args:
            digest (str): that of the selection.
            load (Callable): gives the sub-network and its bytes.

        Returns:
            tuple: the sub-network, and whether it was there.
        """

        def counted() -> tuple[Network, int]:
            with self._held.lock:
                self._misses += 1
            return load()

        network, made = self._held.get_or_make(digest, counted)
        if not made:
            with self._held.lock:
                self._hits += 1
        return network, not made

    @contextlib.contextmanager
    def using(self, digest: str, network: Network, nbytes: Callable[[], int]) -> Iterator[Network]:
        """Keep a sub-network, and count its bytes, for as long as the block runs.

        Args:
            digest (str): that of the selection.
            network: from :meth:`get`. If it was evicted meanwhile, it comes back.
            nbytes (Callable): gives its bytes; called only if it comes back.

        Yields:
            the one that is kept. It is not ``network`` if ``network`` was evicted and another
            thread has loaded the same sub-network again.
        """
        with self._held.lock:
            self._users[digest] += 1
            kept = self._held.get(digest)
            if kept is None:
                kept = self._held.keep(digest, network, nbytes())
        try:
            yield kept
        finally:
            with self._held.lock:
                self._users[digest] -= 1
                if not self._users[digest]:
                    del self._users[digest]
                self.shrink(self.max_bytes)

    def shrink(self, nbytes: int) -> None:
        """Evict until at most ``nbytes`` are held, or only sub-networks in use are left."""
        self._held.shrink(nbytes)

    def drop(self, digest: str) -> None:
        """Drop the sub-network of a selection, unless it is in use."""
        self._held.drop(digest)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._held.size

    @property
    def digests(self) -> list[str]:
        """The digests of what is held now, least recently used first."""
        return [digest for digest, _ in self._held.items()]

    def clear(self) -> None:
        """Drop all that is not in use."""
        self._held.clear()

    @property
    def info(self) -> CacheInfo:
        """Counts and sizes."""
        with self._held.lock:
            return CacheInfo(
                self._hits,
                self._misses,
                self._held.evictions,
                len(self._held),
                self.nbytes,
                self.max_bytes,
            )
