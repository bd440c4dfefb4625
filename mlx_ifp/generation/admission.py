"""Which requests may run at once: their networks, keys and values must fit the memory."""

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from ..memory.advice import check
from ..memory.budget import Estimator, Use
from ..model import IFPModel
from ..selection.selection import digest_of
from .job import Job


@dataclass
class _Claim:
    """What an admitted request takes.

    Attributes:
        kv: bytes of its keys and values when it ends.
        network: bytes of its network's channels.
        beside: bytes that are only needed until its network is ready.
        group: the digest of its selection; None until that is known.
    """

    kv: int
    network: int
    beside: int
    group: str | None


def _total(claims: list[_Claim], padded_together: bool) -> tuple[int, int, int]:
    """Bytes of keys and values, of networks, and of what is only needed for a while."""
    groups: dict[str, list[_Claim]] = defaultdict(list)
    for number, claim in enumerate(claims):
        groups[claim.group or f"unknown {number}"].append(claim)
    # A batch pads all its members to the longest one.
    batches = [claims] if padded_together else list(groups.values())
    kv = sum(len(members) * max(c.kv for c in members) for members in batches if members)
    networks = sum(max(c.network for c in members) for members in groups.values())
    # Networks are made ready one after the other.
    return kv, networks, max((claim.beside for claim in claims), default=0)


class Admission:
    """Counts what admitted requests take, before anything is read for them. Thread-safe.

    Args:
        model (IFPModel): its memory limit is kept, if it has one. Otherwise only the networks in
            use are bounded, by the bytes that the model keeps of them.
        most (int): how many requests may be admitted at once.
        padded_together (bool): whether all requests are in one batch, not only those of a
            selection.

    Attributes:
        beside: gives the bytes that several requests take together.
    """

    def __init__(self, model: IFPModel, most: int, *, padded_together: bool) -> None:
        self._model, self._most = model, most
        self._memory = model.memory
        self._estimator = (
            Estimator(model.checkpoint, model.dtype)
            if self._memory is None
            else self._memory.estimator
        )
        # The bound of the networks is lowered while a memory limit is kept.
        self._most_networks = model.networks.max_bytes
        self._padded_together = padded_together
        self._claims: dict[Job, _Claim] = {}
        self._lock = threading.Lock()
        self.beside: Callable[[], int] = lambda: 0

    def refuse(self, job: Job) -> None:
        """Raises IFPError, with numbers, for a request that does not fit even alone."""
        if self._memory is None:
            return
        check(self._estimator, self._use(job), self._memory.limit)

    def _use(self, job: Job) -> Use:
        """The request alone."""
        request, model = job.ticket.request, self._model
        selector, tokens = self._selecting(job)
        return Use(
            request.ks(model),
            job.generation,
            selector,
            tokens,
            dense=request.dense,
            dense_prefill=request.prefill_by(model.checkpoint, model.selector) == "dense",
        )

    def _selecting(self, job: Job) -> tuple[str | None, int]:
        """What selects for a request, and about how many tokens it reads."""
        request = job.ticket.request
        if request.dense or request.selection is not None:
            return None, 1
        tokens = job.ticket.tokens if request.task is None else job.tokenizer.encode(request.task)
        selector = request.selector or self._model.selector
        return selector, min(len(tokens), self._model.checkpoint.ifp.text.max_tokens)

    def admit(self, job: Job) -> bool:
        """Take a request in if it fits beside those that run."""
        request = job.ticket.request
        known = request.dense or request.selection is not None
        claim = self._claim(job, digest_of(request.selection) if known else None)
        with self._lock:
            claims = [*self._claims.values(), claim]
            fits = not self._claims or (len(claims) <= self._most and self._fit(claims))
            if fits:
                self._claims[job] = claim
        return fits

    def _claim(self, job: Job, group: str | None) -> _Claim:
        if self._memory is None:
            request = job.ticket.request
            network = self._estimator.network(request.ks(self._model), dense=request.dense)
            return _Claim(0, network, 0, group)
        budget = self._estimator.budget(self._use(job))
        selecting = budget.selector_weights + budget.selector_kv
        # Keys and values that the whole model makes are counted with those of the answer, but for
        # what they take before they are quantized.
        reading = budget.prefill_weights + max(0, budget.prefill_kv - budget.kv)
        return _Claim(budget.kv, budget.network, max(selecting, reading), group)

    def _fit(self, claims: list[_Claim]) -> bool:
        return self._room(claims) >= 0

    def _room(self, claims: list[_Claim]) -> int:
        """Bytes that are left for a network."""
        kv, networks, selecting = _total(claims, self._padded_together)
        networks += self.beside()
        if self._memory is None:
            return self._most_networks - networks
        return self._memory.limit - self._estimator.trunk - kv - networks - selecting

    def room_for_network(self) -> int:
        """Bytes that one more network may take now."""
        with self._lock:
            return self._room(list(self._claims.values()))

    def network_bytes(self, ks: list[int]) -> int:
        """Bytes of a network with so many channels in each layer."""
        return self._estimator.network(ks, dense=True)

    def settle(self, job: Job, group: str) -> None:
        """A request's network is ready: others of the same selection share it."""
        with self._lock:
            claim = self._claims[job]
            claim.beside, claim.group = 0, group

    def release(self, job: Job) -> None:
        """A request has ended."""
        with self._lock:
            self._claims.pop(job, None)

    def besides(self, job: Job) -> tuple[int, int]:
        """Bytes of keys and values, and of networks, that others than a request take.

        The first number has what several requests take together, which makes no room.
        """
        with self._lock:
            claims = list(self._claims.values())
            own = self._claims[job]
        kv, networks, _ = _total(claims, self._padded_together)
        return kv - own.kv + self.beside(), networks - own.network

    def room_for_prompts(self) -> int | None:
        """Bytes that kept prompts may take now; None for no bound."""
        if self._memory is None:
            return None
        with self._lock:
            return self._room(list(self._claims.values()))

    @property
    def count(self) -> int:
        """How many requests are admitted."""
        return len(self._claims)
