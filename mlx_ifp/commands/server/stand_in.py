"""One request at a time, with the interface of the scheduler that is to come."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import mlx.core as mx
from mlx_lm.generate import StopSequences
from mlx_lm.server import _format_top_logprobs
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...errors import IFPError
from ...generation.request import Request
from ...generation.stream import Answer
from ...llm.prompt import token_ids
from ...model import IFPModel
from ...subnetwork.prepared import Prepared

T = TypeVar("T")


class BusyError(IFPError):
    pass


class ClosedError(IFPError):
    pass


class FailedError(IFPError):
    pass


@dataclass(frozen=True)
class Token:
    id: int
    text: str
    logprob: float | None = None
    top: tuple[dict[str, Any], ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Progress:
    done: int
    total: int


@dataclass(frozen=True)
class Sampling:
    max_tokens: int = 256
    sampler: Any = None
    logits_processors: tuple[Any, ...] = ()
    stop: StopSequences | None = None
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


_END = object()


class Ticket:
    def __init__(self, request: Request, tokens: list[int]) -> None:
        self.request, self.tokens = request, tokens
        self.ready: Prepared | None = None
        self.cached_tokens = self.generated = 0
        self.cancelled = False
        self._settled = threading.Event()
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._progress = Progress(0, len(tokens))
        self._error: BaseException | None = None

    def wait(self, seconds: float | None = None) -> bool:
        if not self._settled.wait(seconds):
            return False
        if self._error is not None and self.ready is None:
            raise self._error
        return True

    def cancel(self) -> None:
        self.cancelled = True
        self._events.put(_END)
        self._settled.set()

    def events(self, every: float | None = None) -> Iterator[Any]:
        while True:
            try:
                event = self._events.get(timeout=every)
            except queue.Empty:
                yield self._progress
                continue
            if event is _END:
                if self._error is not None:
                    raise self._error
                return
            yield event

    def settle(self, ready: Prepared) -> None:
        self.ready = ready
        self._settled.set()

    def put(self, event: Any) -> None:
        self.generated += isinstance(event, Token)
        self._events.put(event)

    def end(self, error: BaseException | None = None) -> None:
        self._error = self._error or error
        self._events.put(_END)
        self._settled.set()


class Scheduler:
    def __init__(
        self, model: IFPModel, tokenizer: TokenizerWrapper, *, max_queue: int = 128, **_: Any
    ) -> None:
        self.model, self.tokenizer, self.max_queue = model, tokenizer, max_queue
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._closed = False
        self._current: Ticket | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: Request, sampling: Sampling) -> Ticket:
        if self._closed:
            raise ClosedError("The server is shutting down.")
        if self._queue.qsize() >= self.max_queue:
            raise BusyError("Too many requests wait already.")
        encoded = request.encode(self.tokenizer)
        tokens = self.tokenizer.encode(encoded) if isinstance(encoded, str) else token_ids(encoded)
        ticket = Ticket(request, tokens)
        self._queue.put((ticket, sampling))
        return ticket

    def run(self, function: Callable[[], T]) -> T:
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._queue.put((function, done))
        result, error = done.get()
        if error is not None:
            raise error
        return result

    def close(self, seconds: float = 0) -> None:
        self._closed = True
        self._queue.put(None)
        self._thread.join(seconds)
        if self._current is not None:
            self._current.cancel()
            self._thread.join(1)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            first, second = job
            if not isinstance(first, Ticket):
                try:
                    second.put((first(), None))
                except BaseException as error:
                    second.put((None, error))
                continue
            self._current = first
            try:
                if not first.cancelled:
                    self._serve(first, second)
                first.end()
            except BaseException as error:
                first.end(error)
            self._current = None

    def _serve(self, ticket: Ticket, sampling: Sampling) -> None:
        options = {
            "max_tokens": sampling.max_tokens,
            "sampler": sampling.sampler,
            "logits_processors": list(sampling.logits_processors),
            "prompt_progress_callback": lambda done, total: ticket.put(Progress(done, total)),
        }
        answer = Answer(self.model, self.tokenizer, replace(ticket.request, options=options))
        ticket.settle(answer.ready)
        if sampling.seed is not None:
            mx.random.seed(sampling.seed)
        assert sampling.stop is not None
        matcher = sampling.stop.matcher()
        for response in answer:
            reason = response.finish_reason
            if matcher.advance(response.token):
                reason = "stop"
            top = _format_top_logprobs(response.logprobs, sampling.top_logprobs, self.tokenizer)
            logprob = response.logprobs[response.token].item() if sampling.logprobs else None
            ticket.put(Token(response.token, response.text, cast(Any, logprob), top, reason))
            if ticket.cancelled or reason is not None:
                break
