"""Many requests at once, of many tasks: all of them decode together.

A :class:`Scheduler` has two threads. One makes sub-networks ready, a request at a time. The other
one runs mlx-lm's batches: one for all sub-networks (:mod:`.mixed`), or one for each of them, which
take turns, if the LLM's FFNs do not see the rows of a batch. The threads that submit requests never
run a model.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import make_stop_sequences
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import maybe_set_recommended_wired_limit

from ..errors import IFPError
from ..llm.kv_cache import KVSettings
from ..llm.modules import PREFILL_STEP_SIZE
from ..llm.overflow import computing_type
from ..llm.prompt import prompt_ids
from ..model import IFPModel
from ..subnetwork.united import RowCost, United
from .admission import Admission
from .groups import Group, Turns, has_batches
from .info import SchedulerInfo
from .job import Job, Segment
from .kept_prompts import MAX_ENTRIES, KeptPrompts
from .length import check_length
from .mixed import MixedNetwork, can_mix
from .preparing import Preparing
from .request import Request
from .sampling import Chooser, Sampling
from .sharing import Sharing
from .ticket import BusyError, ClosedError, Ticket

MAX_QUEUE = 256


class Scheduler:
    """Serves many requests at once. Thread-safe; :meth:`close` ends its threads.

    Args:
        model (IFPModel): from :func:`mlx_ifp.load`.
        tokenizer: from the same call.
        decode_concurrency (int): requests that are served at the same time.
        prompt_concurrency (int): prompts of one sub-network that are processed at the same time.
        prefill_step_size (int): prompt tokens that are processed at a time.
        max_queue (int): requests that may wait for a place.
        kept_prompts (int): prompts whose keys and values are kept for later ones.
        kv_bytes (int): the bound of these keys and values, with those in use; None for no bound.
        idle_timeout (float): seconds without a request after which sub-networks, keys, values and
            the predictor are freed; None keeps them.
    """

    def __init__(
        self,
        model: IFPModel,
        tokenizer: TokenizerWrapper,
        *,
        decode_concurrency: int = 32,
        prompt_concurrency: int = 8,
        prefill_step_size: int = PREFILL_STEP_SIZE,
        max_queue: int = MAX_QUEUE,
        kept_prompts: int = MAX_ENTRIES,
        kv_bytes: int | None = None,
        idle_timeout: float | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._concurrency = decode_concurrency, prompt_concurrency
        self._prefill_step_size = prefill_step_size
        self._max_queue, self._kv_bytes = max_queue, kv_bytes
        self._idle_timeout = idle_timeout
        self.kept = KeptPrompts(kept_prompts, kv_bytes)
        self._mixes = can_mix(model.parent)
        self._batched: dict[KVSettings, bool] = {}
        self._admission = Admission(model, decode_concurrency, padded_together=self._mixes)
        self._preparing = Preparing(model, self._admission, self.kept, prefill_step_size)
        self._sharing = Sharing(model, self._admission)
        self._turns = Turns(self._end)
        self._computing_type = computing_type(model.dtype, model.checkpoint.trunk.values())
        self._stop = make_stop_sequences(tokenizer)
        # The condition guards what follows.
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._admitted: deque[Job | None] = deque()
        self._arrived: list[Job] = []
        self._running: set[Job] = set()
        self._united: tuple[United, RowCost] | None = None
        # Requests came since channels were united; and no more are coming.
        self._joined = self._settled = False
        self._closing = False
        self._poked = False
        self._released = 0
        self._released_all = True
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._watched, args=(work,), name=name, daemon=True)
            for name, work in (("ifp-batches", self._run), ("ifp-selecting", self._prepare))
        ]
        for thread in self._threads:
            thread.start()

    # For the threads that ask.

    def submit(
        self,
        request: Request,
        sampling: Sampling | None = None,
        *,
        tokens: Sequence[int] | None = None,
        segments: Sequence[Segment] | None = None,
    ) -> Ticket:
        """Ask for an answer.

        Args:
            request (Request): what is asked for. Of its ``options`` only those about keys and
                values count.
            sampling (Sampling): how tokens are chosen.
            tokens (list): the prompt's ids, if they are known; None encodes the prompt.
            segments (list): the same tokens in parts, each with the kind under which it is kept
                (see :class:`KeptPrompts`) or None.

        Raises:
            BusyError: if too many requests wait.
            ClosedError: if no more are served.
            IFPError: if the request cannot be served.
        """
        sampling = sampling or Sampling()
        if sampling.max_tokens < 1:
            raise IFPError("max_tokens must be 1 or more.")
        request.check_in_company()
        if tokens is None:
            tokens = prompt_ids(self.tokenizer, request.encode(self.tokenizer))
        check_length(self.model, self.tokenizer, request, list(tokens))
        said = {"max_tokens": sampling.max_tokens, "prefill_step_size": self._prefill_step_size}
        request = replace(request, options=dict(request.options) | said)
        ticket = Ticket(request, list(tokens), self._poke)
        job = Job(
            ticket,
            Chooser.of(sampling, self._stop),
            list(segments) if segments is not None else [(ticket.tokens, None)],
            self.tokenizer,
            request.generation(self.tokenizer, ticket.tokens),
            self._computing_type,
        )
        with self._changed:
            self._waiting = deque(j for j in self._waiting if not j.ticket.cancelled)
            if self._closing or self._error is not None:
                raise ClosedError("The server is stopping; no more requests are served.")
            if len(self._waiting) >= self._max_queue:
                raise BusyError(
                    f"{len(self._waiting)} requests wait already; try again in a while."
                )
            self._waiting.append(job)
            # The batches' thread may be on its way to sleep and would miss the notice alone.
            self._poked = True
            self._changed.notify_all()
        return ticket

    def close(self, seconds: float = 0) -> None:
        """Serve no more requests; those that run get so many seconds, then they are ended."""
        with self._changed:
            self._closing = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for job in waiting:
            job.fail(ClosedError("The server is stopping."))
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._running and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            for job in self._running:
                job.fail(ClosedError("The server is stopping."))
                job.ticket.cancelled = True
            self._admitted.append(None)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are served."""
        return self._error is None and not self._closing

    @property
    def info(self) -> SchedulerInfo:
        """Counts."""
        with self._changed:
            return SchedulerInfo(
                len(self._waiting),
                len(self._running),
                self._turns.steps,
                len(self.kept),
                self.kept.nbytes,
                self._released,
            )

    # For its own threads.

    def _watched(self, work: Callable[[], bool]) -> None:
        """A thread works until all is done. If it fails, nobody waits for what never comes."""
        try:
            while work():
                pass
        except BaseException as error:
            with self._changed:
                self._error = error
                jobs = [*self._waiting, *self._running]
                self._waiting.clear()
                self._running.clear()
                self._admitted.append(None)
                self._changed.notify_all()
            for job in jobs:
                job.fail(error)
            raise

    def _poke(self) -> None:
        with self._changed:
            self._poked = True
            self._changed.notify_all()

    def _prepare(self) -> bool:
        """Make a request ready, or unite channels; False if all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._admitted or self._settled)
            settled, self._settled = self._settled, False
            job = None if settled else self._admitted.popleft()
            others = [each for each in self._admitted if each is not None]
        if settled:
            self._unite()
        if job is None:
            return settled
        try:
            if others:
                self._preparing.read_together([job, *others[: self._concurrency[1] - 1]])
            if not job.ticket.over:
                self._preparing.prepare(job)
        except Exception as error:
            job.fail(error)
        with self._changed:
            self._arrived.append(job)
            self._changed.notify_all()
        return True

    def _unite(self) -> None:
        """Unite the channels of the requests that run, if they may share a batch."""
        with self._changed:
            running = [j for j in self._running if self._batched.get(j.ticket.request.kv, True)]
        if self._mixes and (united := self._sharing.unite(running)) is not None:
            with self._changed:
                self._united = united
                self._changed.notify_all()

    def _run(self) -> bool:
        # mlx-lm's batches set this limit and set it back, each to what it found.
        wired = maybe_set_recommended_wired_limit()
        try:
            while self._next():
                pass
        finally:
            if wired is not None:
                mx.set_wired_limit(wired)
        return False

    def _next(self) -> bool:
        """One turn, or a wait for something to do; False if all is done."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            united, self._united = self._united, None
            self._poked = False
        for job in arrived:
            self._join(job)
            self._joined = True
        if united is not None:
            for group in self._turns.groups.values():
                group.unite(*united)
            self._bound_kept()
            united = None
        self._turns.drop_cancelled()
        self._admit()
        if self._turns.groups:
            if self._turns.next(self._has_news) and self._joined:
                with self._changed:
                    self._joined, self._settled = False, True
                    self._changed.notify_all()
            return True
        with self._changed:
            if self._error is not None or (self._closing and not self._running):
                return False
            # Memory is freed once nothing was asked for a while.
            idle = None if self._running or self._released_all else self._idle_timeout
            if not self._has_news() and not self._changed.wait(idle):
                self._release()
        return True

    def _has_news(self) -> bool:
        return bool(self._arrived or self._united or self._poked or self._closing)

    def _admit(self) -> None:
        """Give places to those that wait, in their order."""
        while True:
            with self._changed:
                while self._waiting and self._waiting[0].ticket.over:
                    self._waiting.popleft()
                if not self._waiting:
                    return
                job = self._waiting[0]
            try:
                self._admission.refuse(job)
                if not self._admission.admit(job):
                    # What is only there to be faster makes room.
                    if any([group.drop_united() for group in self._turns.groups.values()]):
                        continue
                    return
            except Exception as error:
                job.fail(error)
                continue
            with self._changed:
                if self._waiting and self._waiting[0] is job:
                    self._waiting.popleft()
                self._running.add(job)
                self._released_all = False
                job.ticket.waited_seconds = time.perf_counter() - job.ticket.submitted
                self._admitted.append(job)
                self._changed.notify_all()

    def _join(self, job: Job) -> None:
        """Let a request that is ready join its group."""
        if job.ticket.over or job.ticket.ready is None:
            self._end(job)
            return
        settings = job.ticket.request.kv
        network = job.ticket.ready.network
        # Where it is possible all sub-networks decode together.
        batched = self._has_batches(network, settings)
        mixes = self._mixes and batched
        key = "" if mixes else job.group, tuple(settings.identity)
        try:
            if job.logits is not None and job.begin():
                self._end(job)
                return
            self._turns.add(
                key,
                job,
                lambda: Group(
                    MixedNetwork(self.model.parent) if mixes else network,
                    settings,
                    self.kept,
                    self._concurrency,
                    self._prefill_step_size,
                    batched=batched,
                ),
            )
        except Exception as error:
            job.fail(error)
            self._end(job)

    def _has_batches(self, network: nn.Module, settings: KVSettings) -> bool:
        """What :func:`has_batches` finds, which is the same for every sub-network."""
        if settings not in self._batched:
            self._batched[settings] = has_batches(network, settings)
        return self._batched[settings]

    def _end(self, job: Job) -> None:
        """A request has ended: its place is free."""
        job.cache = job.logits = job.answer = None
        job.hold.close()
        self._admission.release(job)
        self._bound_kept()
        with self._changed:
            self._running.discard(job)
            self._changed.notify_all()

    def _bound_kept(self) -> None:
        """Drop kept prompts that exceed what keys and values may take."""
        bounds: list[int] = []
        room = self._admission.room_for_prompts()
        if room is not None:
            bounds.append(room)
        if self._kv_bytes is not None:
            active = sum(group.kv_bytes for group in self._turns.groups.values())
            bounds.append(self._kv_bytes - active)
        if bounds:
            self.kept.shrink(max(0, min(bounds)))

    def _release(self) -> None:
        """Nothing was asked for a while: free all but the trunk."""
        model = self.model
        self.kept.shrink(0)
        model.warm.clear()
        model.networks.clear()
        model.release_predictor()
        mx.clear_cache()
        self._released_all = True
        self._released += 1
