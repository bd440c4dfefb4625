"""Threads that want the same thing at once: one makes it, the others wait."""

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

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
                threads at once for one key. What it raises, those who wait raise too.

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
                # If it is the other thread that was interrupted, it is this one's turn.
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
