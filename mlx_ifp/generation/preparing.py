"""A request's sub-network is made ready beside the batches, so that they need not stop for it."""

import copy

import mlx.core as mx

from ..dense_pass.prefill import Prefilled
from ..model import IFPModel
from ..prompt_cache.files import PromptCache
from ..prompt_cache.key import CacheKey
from ..prompt_cache.warm import compact
from ..selection.selection import digest_of
from ..subnetwork.prepared import Prepared
from .admission import Admission
from .job import Job
from .kept_prompts import PROMPT, KeptPrompts
from .stream import Answer
from .ticket import ClosedError


class Preparing:
    """Selects, loads the sub-network, and finds what is kept of a prompt.

    Args:
        model (IFPModel): what answers.
        admission (Admission): knows what the others take.
        kept (KeptPrompts): keys and values of earlier requests.
        prefill_step_size (int): prompt tokens that are processed at a time.
    """

    def __init__(
        self, model: IFPModel, admission: Admission, kept: KeptPrompts, prefill_step_size: int
    ) -> None:
        self._model, self._admission, self._kept = model, admission, kept
        self._prefill_step_size = prefill_step_size

    def prepare(self, job: Job) -> None:
        """Make an admitted request ready for its batch.

        Raises:
            IFPError: if the request cannot be served.
        """
        model, ticket = self._model, job.ticket
        self._make_room(job)
        answer = Answer(model, job.tokenizer, ticket.request, ticket.tokens)
        job.group = digest_of(answer.selection)
        dense_key, pruned = answer.key, answer.prefill == "pruned"
        job.key = dense_key if pruned else dense_key.after_dense(answer.selection)
        if not pruned:
            self._begin_densely(job, answer)
        ready = answer.ready
        job.hold.enter_context(model.using(ready))
        self._admission.settle(job, job.group)
        if pruned:
            ticket.request.kv.check(ready.network, job.generation.tokens)
            job.cache, rest, _ = self._begin(job, [job.key], ready)
            ticket.settle(len(ticket.tokens) - len(rest))
            job.begin_after(ticket.cached_tokens)
        ticket.ready = ready
        if answer.prefilled is not None:
            self._take(job, answer.prefilled)

    def _begin_densely(self, job: Job, answer: Answer) -> None:
        """Let the whole model read only what is not kept of the prompt."""
        ticket, tokens = job.ticket, job.ticket.tokens
        cache, rest, job.prompt_key = self._begin(job, [answer.key, job.key], None)
        if cache is None or not answer.go_on_from(cache, rest):
            rest, job.prompt_key = tokens, answer.key
        ticket.settle(len(tokens) - len(rest))

        def progress(done: int, _: int) -> None:
            if ticket.over:
                raise ClosedError("Nobody waits for this prompt any more.")
            job.read(done)

        answer.progress = progress

    def _take(self, job: Job, prefilled: Prefilled) -> None:
        """Take over, and keep, a prompt that the whole model has read."""
        job.cache, job.logits = prefilled.cache, prefilled.logits[:, -1]
        kept = compact(copy.deepcopy(job.cache))
        self._kept.keep(job.prompt_key, job.ticket.tokens, kept, PROMPT)
        self._make_room(job)
        # mlx-lm does so after a prompt.
        job.ticket.request.kv.quantize(job.cache)
        # Another thread goes on, which has another stream.
        mx.eval(job.logits, [layer.state for layer in job.cache])

    def _begin(
        self, job: Job, keys: list[CacheKey], ready: Prepared | None
    ) -> tuple[PromptCache | None, list[int], CacheKey]:
        """The longest beginning of a prompt that is kept under one of some keys, or is warm.

        Returns:
            tuple: its cache, the tokens after it, and the key.
        """
        ticket = job.ticket
        found = [(*self._kept.fetch(key, ticket.tokens), key) for key in keys]
        longest = min(found, key=lambda one: len(one[1]))
        if not ticket.request.warm:
            return longest
        prefix = job.warm_tokens()
        if len(ticket.tokens) - len(longest[1]) >= prefix:
            return longest
        cache, rest = self._model.warm.start(
            ready,
            ticket.tokens,
            prefix,
            ticket.request.kv,
            disk=ticket.request.warm_on_disk,
            prefill_step_size=self._prefill_step_size,
        )
        return cache, rest, keys[0]

    def _make_room(self, job: Job) -> None:
        room = self._admission.room_for_prompts()
        if room is None or self._model.memory is None:
            return
        self._kept.shrink(max(0, room))
        kv, networks = self._admission.besides(job)
        self._model.memory.beside(kv + self._kept.nbytes, networks)
