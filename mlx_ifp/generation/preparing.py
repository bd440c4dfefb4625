"""A request's sub-network is made ready beside the batches, so that they need not stop for it."""

from ..model import IFPModel
from ..selection.selection import digest_of
from .admission import Admission
from .job import Job
from .kept_prompts import KeptPrompts
from .stream import Answer


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
        job.hold.enter_context(model.using(answer.ready))
        self._admission.settle(job, digest_of(answer.ready.selection))
        job.key = answer.key
        ticket.request.kv.check(answer.ready.network, job.generation.tokens)
        job.cache, rest = self._kept.fetch(job.key, ticket.tokens)
        if ticket.request.warm:
            rest = self._begin_warm(job, answer, rest)
        cached = len(ticket.tokens) - len(rest)
        job.begin_after(cached)
        ticket.settle(answer.ready, cached)

    def _make_room(self, job: Job) -> None:
        room = self._admission.room_for_prompts()
        if room is None or self._model.memory is None:
            return
        self._kept.shrink(max(0, room))
        kv, networks = self._admission.besides(job)
        self._model.memory.beside(kv + self._kept.nbytes, networks)

    def _begin_warm(self, job: Job, answer: Answer, rest: list[int]) -> list[int]:
        """Begin with a warm prompt if more of the prompt is warm than is kept."""
        ticket = job.ticket
        prefix = job.warm_tokens()
        if len(ticket.tokens) - len(rest) >= prefix:
            return rest
        job.cache, rest = self._model.warm.start(
            answer.ready,
            ticket.tokens,
            prefix,
            ticket.request.kv,
            disk=ticket.request.warm_on_disk,
            prefill_step_size=self._prefill_step_size,
        )
        return rest
