"""A least-recently-used cache, in which one thread makes what several want at once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Once:
    """Lets one thread make a value while the others that ask for it wait.

    It keeps nothing: ``make`` puts the value where ``look`` finds it.

    Args:
        lock: guards what ``look`` looks at. It is not held while a value is made.
    """

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._making: dict[Hashable, Future] = {}

    def get(
        self, key: Hashable, look: Callable[[], Value | None], make: Callable[[], Value]
    ) -> tuple[Value, bool]:
        """The value of a key.

        Args:
            key: what is asked for.
            look (Callable): gives the value if it is there, else None. Called with the lock held.
            make (Callable): makes the value and keeps it. Called without the lock, never by two
                threads at once for one key. The threads that wait raise what it raises, too.

        Returns:
            tuple: the value, and whether this call made it.
        """
        while True:
            with self._lock:
                if (value := look()) is not None:
                    return value, False
                future = self._making.get(key)
                if mine := future is None:
                    future = self._making[key] = Future()
            if mine:
                return self._make(key, future, make), True
            try:
                return future.result(), False
            except (KeyboardInterrupt, SystemExit):
                # If the other thread was interrupted, it is this one's turn.
                if not future.done() or future.exception() is None:
                    raise

    def _make(self, key: Hashable, future: Future, make: Callable[[], Value]) -> Value:
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
        future.set_result(value)
        return value


class LRU(Generic[Key, Value]):
    """Values by key; those that were used last are kept. Thread-safe.

    Args:
        most (int): the bound of all sizes together: a count, if every size is 1, or bytes.
        in_use (Container): keys that are never evicted; their owner changes them under ``lock``.

    Attributes:
        most: the bound. If it is lowered, nothing is evicted until the next :meth:`keep` or
            :meth:`shrink`.
        lock: guards the entries; it is never held while a value is made.
        evictions: how many were evicted since it was made.
    """

    def __init__(self, most: int, in_use: Container[Key] = ()) -> None:
        self.most = most
        self.lock = threading.RLock()
        self.evictions = 0
        self._in_use = in_use
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._once = Once(self.lock)

    def get(self, key: Key) -> Value | None:
        """The value of a key, which counts as used now; None if it is not there."""
        with self.lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def keep(self, key: Key, value: Value, size: int = 1) -> Value:
        """Keep a value, unless it alone is larger than the bound. A value in use is always kept.

        Returns:
            the value that is there: the older one, if another thread has kept one meanwhile.
        """
        with self.lock:
            if (there := self.get(key)) is not None:
                return there
            if size <= self.most or key in self._in_use:
                self._entries[key] = (value, size)
                self.shrink(self.most)
            return value

    def get_or_make(self, key: Key, make: Callable[[], tuple[Value, int]]) -> tuple[Value, bool]:
        """The value of a key, made by one thread while the others that ask for it wait.

        Args:
            key: what is asked for.
            make (Callable): gives the value and its size.

        Returns:
            tuple: the value, and whether this call made it.
        """
        return self._once.get(key, lambda: self.get(key), lambda: self.keep(key, *make()))

    def shrink(self, size: int) -> None:
        """Evict until all sizes together are at most ``size``, or only values in use are left."""
        with self.lock:
            while self.size > size:
                free = next((key for key in self._entries if key not in self._in_use), None)
                if free is None:
                    return
                del self._entries[free]
                self.evictions += 1

    def drop(self, key: Key) -> None:
        """Drop a value, unless it is in use. This does not count as an eviction."""
        with self.lock:
            if key not in self._in_use:
                self._entries.pop(key, None)

    def clear(self) -> None:
        """Drop all that is not in use. This does not count as evictions."""
        with self.lock:
            for key in [key for key in self._entries if key not in self._in_use]:
                del self._entries[key]

    @property
    def size(self) -> int:
        """The sizes of all that is kept, together."""
        with self.lock:
            return sum(size for _, size in self._entries.values())

    def items(self) -> list[tuple[Key, Value]]:
        """What is kept, least recently used first. Listing does not count as use."""
        with self.lock:
            return [(key, value) for key, (value, _) in self._entries.items()]

    def __len__(self) -> int:
        return len(self._entries)
