"""Tokens are chosen for each request of a batch as if it were alone."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast
from weakref import WeakValueDictionary

import mlx.core as mx
from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import greedy_sampler

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen, and what is told about them.

    Attributes:
        max_tokens: how many tokens at most, 1 or more.
        sampler: log-probabilities [B, V] -> tokens [B]; None takes the likeliest.
        logits_processors: each gives new logits, from the tokens so far and the logits [1, V].
        stop: the sequences of tokens after which an answer ends; None for the tokenizer's ends.
        seed: makes the tokens reproducible, whatever else is in the batch.
        logprobs: whether each token comes with its log-probability.
        top_logprobs: how many of the likeliest tokens come with each token.
    """

    max_tokens: int = 256
    sampler: Sampler | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    stop: StopSequences | None = None
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


class GuardedSampler:
    """A sampler whose error does not end the whole batch.

    Requests with the same sampler share one guard, so that mlx-lm samples for them at once.

    Args:
        sampler (Callable): log-probabilities [B, V] -> tokens [B].

    Attributes:
        error: the first exception, or None; after it the likeliest token is taken.
    """

    _guards: ClassVar["WeakValueDictionary[int, GuardedSampler]"] = WeakValueDictionary()

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.error: Exception | None = None

    @classmethod
    def of(cls, sampler: Sampler) -> "GuardedSampler":
        """The guard of a sampler."""
        guard = cls._guards.get(id(sampler))
        if guard is None or guard.sampler is not sampler:
            guard = cls._guards[id(sampler)] = cls(sampler)
        return guard

    def __call__(self, logprobs: mx.array) -> mx.array:
        if self.error is None:
            try:
                return self.sampler(logprobs)
            except Exception as error:
                self.error = error
        return greedy_sampler(logprobs)


class _Seeded:
    """A sampler with random numbers of its own: MLX has one state of them for all requests."""

    def __init__(self, sampler: Sampler, seed: int) -> None:
        self._sampler = sampler
        self._seeds = random.Random(seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        mx.random.seed(self._seeds.getrandbits(64))
        try:
            return self._sampler(logprobs)
        finally:
            # What follows must not depend on this request's seed.
            mx.random.seed(random.getrandbits(64))


class _GuardedProcessor:
    """A logits processor whose error does not end the whole batch."""

    def __init__(self, processor: LogitsProcessor) -> None:
        self._processor = processor
        self.error: Exception | None = None

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self.error is None:
            try:
                return self._processor(tokens, logits)
            except Exception as error:
                self.error = error
        return logits


class _Begun:
    """Stop sequences that some tokens of the answer have passed already."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def matcher(self) -> Any:
        return self._matcher


@dataclass
class Chooser:
    """The sampler and the processors of one request, in the form that mlx-lm's batches take.

    Attributes:
        sampling: what it was made of.
        stop: the stop sequences.
        sampler: None takes the likeliest token.
        processors: the logits processors.
    """

    sampling: Sampling
    stop: Any
    sampler: GuardedSampler | None = None
    processors: list[_GuardedProcessor] = field(default_factory=list)

    @classmethod
    def of(cls, sampling: Sampling, stop: StopSequences) -> "Chooser":
        """Make it for a new request; ``stop`` holds if the request says nothing itself."""
        sampler = sampling.sampler
        if sampler is not None and sampling.seed is not None:
            sampler = _Seeded(sampler, sampling.seed)
        guard = None if sampler is None else GuardedSampler.of(sampler)
        processors = [_GuardedProcessor(p) for p in sampling.logits_processors]
        return cls(sampling, sampling.stop or stop, guard, processors)

    @property
    def error(self) -> Exception | None:
        """What went wrong in the sampler or in a processor."""
        errors = [processor.error for processor in self.processors]
        if self.sampler is not None:
            errors.append(self.sampler.error)
        return next((error for error in errors if error is not None), None)

    def first(self, tokens: list[int], logits: mx.array) -> tuple[int, mx.array]:
        """Choose the first token of an answer, which no batch computes.

        Args:
            tokens (list): the prompt's.
            logits (mx.array): [1, V], after the prompt's last token.

        Returns:
            tuple: the token and the log-probabilities [V].
        """
        for processor in self.processors:
            logits = processor(mx.array(tokens), logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = (self.sampler or greedy_sampler)(logprobs)
        return cast(int, token.item()), logprobs[0]

    def passed(self, token: int) -> bool:
        """Note a token that no batch sees as an answer's; whether it ends the answer."""
        matcher = self.stop.matcher()
        self.stop = _Begun(matcher)
        return matcher.advance(token)
