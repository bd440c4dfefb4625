"""A request's sub-network is made ready beside the batches, so that they need not stop for it."""

import copy
import itertools
import operator

import mlx.core as mx

from ..dense_pass.prefill import Prefilled, dense_prefill_all
from ..errors import IFPError
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

# To read so many tokens again, such as those of a template, takes less than to wait.
_FEW_TOKENS = 128

# A request, its answer, and the tokens and the cache of what is read.
_Reading = tuple[Job, Answer, tuple[list[int], PromptCache]]


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
        answer, job.answer = job.answer or self._answer(job), None
        pruned = answer.prefill == "pruned"
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

    def _answer(self, job: Job) -> Answer:
        """Select, and find what is kept of a prompt that the whole model reads."""
        ticket = job.ticket
        self._make_room(job)
        answer = Answer(self._model, job.tokenizer, ticket.request, ticket.tokens)
        job.group = digest_of(answer.selection)
        if answer.prefill == "pruned":
            job.key = answer.key
        else:
            job.key = answer.key.after_dense(answer.selection)
            self._begin_densely(job, answer)
        return answer

    def read_together(self, jobs: list[Job]) -> None:
        """Let the whole model read prompts at once, so that it is read from disk once for all.

        Only those are read for which nothing has to be selected. What goes wrong is left to
        :meth:`prepare`, which then reads a prompt by itself.

        Args:
            jobs (list): admitted requests, in their order.
        """
        # A memory limit counts one prompt that is being read.
        if self._model.memory is not None or not self._may_wait(jobs[0]):
            return
        group = self._group(jobs)
        if len(group) < 2:
            return
        try:
            self._read_group(group)
        except Exception:
            for job, _, _ in group:
                # Its cache may be filled in part.
                job.answer = None

    def _may_wait(self, job: Job) -> bool:
        """Whether a prompt can be read with others: the whole model reads it, to answer only."""
        request = job.ticket.request
        if job.answer is not None or job.ticket.over:
            return False
        if request.selection is None and not request.dense:
            return False
        try:
            return request.prefill_by(self._model.checkpoint, self._model.selector) == "dense"
        except IFPError:
            # This is raised again when its turn comes.
            return False

    def _group(self, jobs: list[Job]) -> list[_Reading]:
        """The requests whose prompts are read at once; as many tokens as run in a step."""
        group: list[_Reading] = []
        left = self._prefill_step_size
        for job in filter(self._may_wait, jobs):
            if any(_alike(job, other) for other, _, _ in group):
                # It will go on from where the other one's prompt differs.
                continue
            try:
                answer = job.answer = self._answer(job)
            except Exception:
                # As above.
                continue
            read = answer.to_read()
            if read is None:
                continue
            left -= len(read[0])
            if left < 0:
                break
            group.append((job, answer, read))
        return group

    def _read_group(self, group: list[_Reading]) -> None:
        def progress(done: int, of: int) -> None:
            if all(job.ticket.over for job, _, _ in group):
                raise ClosedError("Nobody waits for these prompts any more.")
            for job, _, (tokens, _) in group:
                job.read(len(tokens) * done // of)

        prompts = [read for _, _, read in group]
        step, parent = self._prefill_step_size, self._model.parent
        for (_, answer, _), prefilled in zip(
            group, dense_prefill_all(parent, prompts, step, progress), strict=True
        ):
            answer.was_read(prefilled)

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


def _alike(job: Job, other: Job) -> bool:
    """Whether a good part of a prompt is the beginning of another one."""
    a, b = job.ticket.tokens, other.ticket.tokens
    common = sum(1 for _ in itertools.takewhile(bool, map(operator.eq, a, b)))
    return common > max(_FEW_TOKENS, len(a) // 4)
