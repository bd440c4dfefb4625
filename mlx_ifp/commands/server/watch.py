"""Notices clients that go away while nothing is written to them."""

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator

_MILLISECONDS = 50


class Watcher:
    """One thread that watches the connections of all requests that are being answered."""

    def __init__(self) -> None:
        self._watched: dict[int, tuple[socket.socket, Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._some = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="watcher").start()

    @contextlib.contextmanager
    def watching(self, connection: socket.socket, gone: Callable[[], None]) -> Iterator[None]:
        """Call ``gone``, at most once, if the client closes the connection while the block runs."""
        number = connection.fileno()
        with self._lock:
            self._watched[number] = (connection, gone)
            self._some.set()
        try:
            yield
        finally:
            with self._lock:
                self._watched.pop(number, None)

    def _watch(self) -> None:
        while self._some.wait():
            poll = select.poll()
            with self._lock:
                if not self._watched:
                    self._some.clear()
                for number in self._watched:
                    poll.register(number, select.POLLIN)
            for number, _ in poll.poll(_MILLISECONDS):
                self._look(number)

    def _look(self, number: int) -> None:
        """A connection can be read: its end can, or more than was asked for."""
        with self._lock:
            if number not in self._watched:
                return
            connection, gone = self._watched[number]
            try:
                closed = not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                closed = True
            # Either way there is nothing more to learn from it.
            del self._watched[number]
        if closed:
            gone()
