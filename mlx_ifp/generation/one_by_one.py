"""Requests that cannot share a batch advance by turns, with the face of mlx-lm's batches."""

import copy
from collections.abc import Iterator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationBatch, PromptProcessingBatch, generate_step
from mlx_lm.models.cache import make_prompt_cache

from ..llm.kv_cache import KVSettings
from ..prompt_cache.files import PromptCache


class OneByOne:
    """Stands in for mlx-lm's ``BatchGenerator`` where keys and values have no batched form.

    That is so if they are quantized, and for a few kinds of caches. Each request has a cache of its
    own, and each step gives every request one token, or processes a part of its prompt.

    Args:
        network (nn.Module): an mlx-lm model.
        settings (KVSettings): how keys and values are kept.
        prefill_step_size (int): prompt tokens that are processed at a time.
    """

    def __init__(self, network: nn.Module, settings: KVSettings, prefill_step_size: int) -> None:
        self._network, self._settings, self._step = network, settings, prefill_step_size
        self._sequences: dict[int, _Sequence] = {}
        self._count = 0

    def insert_segments(
        self,
        segments: list[list[list[int]]],
        max_tokens: list[int],
        caches: list[PromptCache | None],
        all_tokens: list[list[int]],
        samplers: list[Any],
        logits_processors: list[Any],
        stop_sequences: list[Any],
    ) -> list[int]:
        """Add requests: see mlx-lm's method."""
        uids = list(range(self._count, self._count + len(segments)))
        self._count += len(segments)
        rows = zip(
            uids, segments, max_tokens, caches, all_tokens, samplers, logits_processors,
            stop_sequences, strict=True,
        )  # fmt: skip
        for uid, *row in rows:
            self._sequences[uid] = _Sequence(self._network, self._settings, self._step, uid, *row)
        return uids

    def next(self) -> tuple[list[Any], list[Any]]:
        """A part of each prompt, or the next token of each answer: see mlx-lm's method."""
        read, made = [], []
        for uid, sequence in list(self._sequences.items()):
            if sequence.segments:
                read.append(sequence.read())
            else:
                made.append(sequence.next())
                if made[-1].finish_reason is not None:
                    del self._sequences[uid]
        return read, made

    def extract_cache(self, uids: list[int]) -> dict[int, tuple[PromptCache, list[int]]]:
        """For some requests a copy of their keys and values, and the tokens of these."""
        return {uid: self._sequences[uid].copy() for uid in uids}

    def remove(self, uids: list[int]) -> None:
        """Take requests out."""
        for uid in uids:
            self._sequences.pop(uid, None)

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(c.nbytes for sequence in self._sequences.values() for c in sequence.cache)

    def close(self) -> None:
        """Nothing is held beyond the requests."""


class _Sequence:
    """One request: its prompt is processed in parts, then mlx-lm's ``generate_step`` goes on."""

    def __init__(
        self,
        network: nn.Module,
        settings: KVSettings,
        step: int,
        uid: int,
        segments: list[list[int]],
        max_tokens: int,
        cache: PromptCache | None,
        tokens: list[int],
        sampler: Any,
        processors: list[Any],
        stop: Any,
    ) -> None:
        self.uid = uid
        self.segments = [list(segment) for segment in segments]
        # The last token begins the answer, so it is not processed with the prompt.
        self._last = [self.segments[-1].pop()]
        self.segments = [segment for segment in self.segments if segment]
        self.cache = cache or make_prompt_cache(network, settings.max_kv_size)
        self.tokens = tokens
        self._network, self._settings, self._step = network, settings, step
        self._total = 1 + sum(map(len, self.segments))
        self._done = self._made = 0
        self._max_tokens, self._sampler, self._processors = max_tokens, sampler, processors
        self._matcher = stop.matcher()
        self._answer: Iterator[Any] | None = None

    def read(self) -> Any:
        """Process a part of the prompt."""
        segment = self.segments[0]
        part, self.segments[0] = segment[: self._step], segment[self._step :]
        self._network(mx.array(part)[None], cache=self.cache)
        self._settings.quantize(self.cache)
        mx.eval([layer.state for layer in self.cache])
        mx.clear_cache()
        self.tokens += part
        self._done += len(part)
        ended = not self.segments[0]
        if ended:
            self.segments.pop(0)
        progress = self._done, self._total
        return PromptProcessingBatch.Response(self.uid, progress, ended, False)

    def next(self) -> Any:
        """Generate the next token."""
        if self._answer is None:
            kv = self._settings
            self._answer = generate_step(
                mx.array(self._last),
                self._network,
                max_tokens=self._max_tokens,
                sampler=self._sampler,
                logits_processors=[self._seeing_all(p) for p in self._processors],
                prompt_cache=self.cache,
                kv_bits=kv.kv_bits,
                kv_group_size=kv.kv_group_size,
                quantized_kv_start=kv.quantized_kv_start,
            )
            self._history = mx.array(self.tokens, mx.uint32)
            self.tokens += self._last
        found = next(self._answer)
        token, logprobs = cast(int, found[0]), found[1]
        self._made += 1
        self.tokens.append(token)
        reason = "length" if self._made >= self._max_tokens else None
        if self._matcher.advance(token):
            reason = "stop"
        ended = reason is not None
        return GenerationBatch.Response(
            self.uid,
            token,
            logprobs,
            reason,
            self.cache if ended else None,
            self.tokens if ended else None,
        )

    def _seeing_all(self, processor: Any) -> Any:
        """mlx-lm shows a processor only what it is given to process; in a batch it sees all."""
        return lambda tokens, logits: processor(mx.concatenate([self._history, tokens]), logits)

    def copy(self) -> tuple[PromptCache, list[int]]:
        """A copy of its keys and values, and their tokens."""
        return copy.deepcopy(self.cache), list(self.tokens)
