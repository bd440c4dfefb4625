"""One of many requests: what its owner holds, and what it is told while others generate it."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import IFPError
from ..subnetwork.prepared import Prepared
from .request import Request


class BusyError(IFPError):
    """Too many requests wait already; the same request may be accepted later."""


class ClosedError(IFPError):
    """No more requests are served."""


class FailedError(IFPError):
    """The request was right, but something went wrong while it was served."""


@dataclass(frozen=True)
class Token:
    """A token that was generated.

    Attributes:
        id: the token.
        text: what it adds to the answer's text; the token that ends an answer adds nothing.
        logprob: its log-probability; None unless the request asks for it.
        top: the likeliest tokens with their log-probabilities, as mlx-lm's server gives them.
        finish_reason: ``stop`` or ``length`` for the last token, else None.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[dict[str, Any], ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Progress:
    """So many of the prompt's tokens are processed."""

    done: int
    total: int


Event = Token | Progress

_END = object()


class Ticket:
    """A request that was submitted. Iterating over it gives its events, once.

    Args:
        request (Request): what is asked for.
        tokens (list): the prompt's ids.
        wake (Callable): tells the scheduler that something has changed.

    Attributes:
        request, tokens: as given.
        ready: the sub-network, and what getting it cost; it is there before the first token.
        cached_tokens: how many of the prompt's first tokens did not have to be processed.
        generated: how many tokens were generated so far.
        waited_seconds: the time from submitting until a place was free.
        cancelled: whether its owner, or the scheduler, has ended it.
    """

    def __init__(self, request: Request, tokens: list[int], wake: Callable[[], None]) -> None:
        self.request, self.tokens = request, tokens
        self.ready: Prepared | None = None
        self.cached_tokens = self.generated = 0
        self.waited_seconds = 0.0
        self.cancelled = False
        self.submitted = time.perf_counter()
        self._wake = wake
        self._settled = threading.Event()
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._progress = Progress(0, len(tokens))
        self._error: BaseException | None = None
        self._over = self._ended = self._accepted = False

    # For its owner.

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until its selection is there.

        Args:
            seconds (float): how long at most; None for no bound.

        Returns:
            bool: whether it is there.

        Raises:
            IFPError: if the request cannot be served.
        """
        if not self._settled.wait(seconds):
            return False
        if self._error is not None and not self._accepted:
            raise self._error
        return True

    def cancel(self) -> None:
        """Give up its place, within a step. Its events end."""
        self.cancelled = True
        self._events.put(_END)
        self._settled.set()
        self._wake()

    def events(self, every: float | None = None) -> Iterator[Event]:
        """The events until the last token.

        Args:
            every (float): seconds; if nothing happens for so long, the last progress comes again,
                so that the owner can show a sign of life.

        Raises:
            IFPError: if the request cannot be served, or something goes wrong.
        """
        while not self._over:
            try:
                event = self._events.get(timeout=every)
            except queue.Empty:
                yield self._progress
                continue
            if event is _END:
                self._over = True
                if self._error is not None:
                    raise self._error
                return
            yield event

    def __iter__(self) -> Iterator[Event]:
        """:meth:`events` without repeated progress."""
        return self.events()

    # For the scheduler.

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self._ended or self.cancelled

    def settle(self, cached_tokens: int) -> None:
        """Its selection is there, and so many tokens need no processing."""
        self.cached_tokens = cached_tokens
        self.progress(cached_tokens)
        self._accepted = True
        self._settled.set()

    def progress(self, done: int) -> None:
        """So many of the prompt's tokens are processed."""
        self._progress = Progress(done, len(self.tokens))
        self._events.put(self._progress)

    def put(self, token: Token) -> None:
        """A token was generated."""
        self.generated += 1
        self._events.put(token)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes, because of an error if there is one."""
        self._ended = True
        self._error = self._error or error
        self._events.put(_END)
        self._settled.set()
