"""Requests that decode together, and groups of them that take turns.

A group has the requests of one sub-network or, where the LLM allows it, of several.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from ..llm.kv_cache import KVSettings
from ..prompt_cache.files import PromptCache
from ..subnetwork.united import RowCost, United
from .job import Job
from .kept_prompts import ANSWER, KeptPrompts
from .mixed import MixedNetwork, Rows
from .one_by_one import OneByOne

# Steps that a group makes before the next one's turn. A turn ends early after a part of a prompt
# was processed, because that takes as long as many steps.
TURN = 4


def has_batches(network: nn.Module, settings: KVSettings) -> bool:
    """Whether mlx-lm can generate several answers at once with a network, tried lazily.

    Some of its caches have no form for several rows, and some of its models cannot do with the
    masks of such a form.

    Args:
        network (nn.Module): an mlx-lm model, whose arrays need not be evaluated.
        settings (KVSettings): how keys and values are kept.
    """
    if settings.kv_bits is not None:
        return False
    if not all(
        hasattr(layer, "merge") for layer in make_prompt_cache(network, settings.max_kv_size)
    ):
        return False
    try:
        # With one number of rows alone a wrong shape might fit by chance.
        for count in (2, 3):
            rows = [make_prompt_cache(network, settings.max_kv_size) for _ in range(count)]
            merged = [layers[0].merge(list(layers)) for layers in zip(*rows, strict=True)]
            for tokens in (3, 1):
                network(mx.zeros((count, tokens), mx.int32), cache=merged)
    except Exception:
        # What a model or a cache raises is not known here.
        return False
    return True


class Group:
    """Requests in one of mlx-lm's batches. For one thread.

    Args:
        network: the sub-network, or a :class:`MixedNetwork` for several of them.
        settings (KVSettings): how keys and values are kept.
        kept (KeptPrompts): gets keys and values when an answer ends.
        concurrency (tuple): answers that decode at once, and prompts that are processed at once.
        prefill_step_size (int): prompt tokens that are processed at a time.
        batched (bool): whether mlx-lm can generate several answers at once with the network.

    Attributes:
        steps: how many steps it has made.
        jobs: its requests, by mlx-lm's number for each.
    """

    def __init__(
        self,
        network: nn.Module | MixedNetwork,
        settings: KVSettings,
        kept: KeptPrompts,
        concurrency: tuple[int, int],
        prefill_step_size: int,
        *,
        batched: bool,
    ) -> None:
        self.steps = 0
        self.jobs: dict[int, Job] = {}
        self._kept, self._settings = kept, settings
        self._mixed = network if isinstance(network, MixedNetwork) else None
        if batched:
            self._batch: Any = BatchGenerator(
                cast(nn.Module, network),
                completion_batch_size=concurrency[0],
                prefill_batch_size=min(concurrency),
                prefill_step_size=prefill_step_size,
                max_kv_size=settings.max_kv_size,
                stream=mx.default_stream(mx.default_device()),
            )
        else:
            self._batch = OneByOne(cast(nn.Module, network), settings, prefill_step_size)

    def add(self, job: Job) -> None:
        """Let a request join between two steps."""
        chooser = job.chooser
        (uid,) = self._batch.insert_segments(
            segments=[[list(segment) for segment, _ in job.segments]],
            max_tokens=[job.chooser.sampling.max_tokens - job.ticket.generated],
            caches=[self._cache_of(job)],
            all_tokens=[list(job.processed)],
            samplers=[chooser.sampler],
            logits_processors=[chooser.processors],
            stop_sequences=[chooser.stop],
        )
        self.jobs[uid] = job

    def _cache_of(self, job: Job) -> PromptCache | None:
        """What is there of a request's keys and values; in a mixed batch also whose row it is."""
        cache, mixed = job.take_cache(), self._mixed
        if mixed is None or job.ticket.ready is None:
            return cache
        mixed.add(job.group, job.ticket.ready.network)
        if cache is None:
            return mixed.make_cache(self._settings.max_kv_size, job.group)
        return [*cache, Rows([job.group])]

    def _without_rows(self, cache: PromptCache) -> PromptCache:
        """Only the keys and values of a row of the batch."""
        return cache if self._mixed is None else cache[:-1]

    def remove(self, jobs: Iterable[Job]) -> None:
        """Take requests out; their keys and values are freed."""
        gone = set(jobs)
        uids = [uid for uid, job in self.jobs.items() if job in gone]
        if uids:
            self._batch.remove(uids)
            for uid in uids:
                del self.jobs[uid]
        if self._mixed is not None:
            self._mixed.keep_only({job.group for job in self.jobs.values()})

    def unite(self, united: United, cost: RowCost) -> None:
        """Let requests of different selections go through channels that they share."""
        if self._mixed is not None:
            self._mixed.unite(united, cost)

    def drop_united(self) -> bool:
        """Let go of shared channels; whether there were some."""
        return self._mixed is not None and self._mixed.drop_united()

    def step(self) -> tuple[list[Job], bool]:
        """Process a part of the prompts, and generate one token for each answer.

        Returns:
            tuple: the requests that have ended, and whether a part of a prompt was processed.
        """
        self.steps += 1
        read, made = self._batch.next()
        prompts = [response for response in read if response.uid in self.jobs]
        for response in prompts:
            self.jobs[response.uid].read(response.progress[0])
        self._keep_segments(prompts)
        ended = []
        for response in made:
            job = self.jobs[response.uid]
            try:
                job.put(response.token, response.logprobs, response.finish_reason)
            except Exception as error:
                job.fail(error)
            if response.finish_reason is not None:
                del self.jobs[response.uid]
                if not job.ticket.over:
                    cache = self._without_rows(response.prompt_cache)
                    self._kept.keep(job.key, response.all_tokens, cache, ANSWER)
                    job.ticket.end()
            if job.ticket.over:
                ended.append(job)
        self.remove(ended)
        return ended, any(not response.end_of_prompt for response in prompts)

    def _keep_segments(self, prompts: list[Any]) -> None:
        """Keep what later requests may begin with, such as a system prompt."""
        ends = {
            r.uid: kind
            for r in prompts
            if r.end_of_segment and not r.end_of_prompt
            if (kind := self.jobs[r.uid].next_kind()) is not None
        }
        for uid, (cache, tokens) in self._batch.extract_cache(list(ends)).items():
            self._kept.keep(self.jobs[uid].key, tokens, self._without_rows(cache), ends[uid])

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self._batch.prompt_cache_nbytes if self.jobs else 0

    def close(self) -> None:
        """Free what the batch holds."""
        self._batch.close()
        if self._mixed is not None:
            self._mixed.keep_only(set())


class Turns:
    """Groups by key; each busy one has its turn before any has its next. For one thread.

    Args:
        ended (Callable): called with each request that has ended.

    Attributes:
        groups: by key.
    """

    def __init__(self, ended: Callable[[Job], None]) -> None:
        self.groups: dict[Any, Group] = {}
        self._order: deque[Any] = deque()
        self._ended = ended

    def add(self, key: Any, job: Job, make: Callable[[], Group]) -> None:
        """Let a request join its group, which is made if it is not there."""
        group = self.groups.get(key)
        if group is None:
            group = make()
        group.add(job)
        if key not in self.groups:
            self.groups[key] = group
            self._order.append(key)

    def next(self, changed: Callable[[], bool]) -> bool:
        """Give the next group its turn.

        Args:
            changed (Callable): says whether the turn should end early, as something waits.

        Returns:
            bool: whether all of the turn went by, and no prompt was read.
        """
        if not self._order:
            return False
        key = self._order[0]
        self._order.rotate(-1)
        group, whole = self.groups[key], False
        for _ in range(TURN):
            self._drop_cancelled(group)
            if not group.jobs:
                break
            try:
                ended, read = group.step()
            except Exception as error:
                self._fail(key, group, error)
                return False
            for job in ended:
                self._ended(job)
            if read or changed():
                break
        else:
            whole = True
        self._drop_if_empty(key, group)
        return whole

    def drop_cancelled(self) -> None:
        """Take out the requests whose owners went away."""
        for key, group in list(self.groups.items()):
            self._drop_cancelled(group)
            self._drop_if_empty(key, group)

    def _drop_cancelled(self, group: Group) -> None:
        gone = [job for job in group.jobs.values() if job.ticket.cancelled]
        group.remove(gone)
        for job in gone:
            self._ended(job)

    def _drop_if_empty(self, key: Any, group: Group) -> None:
        if not group.jobs:
            self._drop(key, group)

    def _drop(self, key: Any, group: Group) -> None:
        group.close()
        del self.groups[key]
        self._order.remove(key)

    def _fail(self, key: Any, group: Group, error: Exception) -> None:
        """End a group in whose step something went wrong; other groups go on."""
        jobs = list(group.jobs.values())
        group.jobs.clear()
        self._drop(key, group)
        for job in jobs:
            job.fail(error)
            self._ended(job)

    @property
    def steps(self) -> dict[str, int]:
        """For each selection with a request, the steps that its group has made."""
        groups = list(self.groups.values())
        return {job.group: group.steps for group in groups for job in list(group.jobs.values())}
