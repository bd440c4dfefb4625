"""The dense LLM reads a prompt: keys and values of all its tokens, and the last one's logits.

A sub-network decodes from them. No token is processed twice: the first token that is generated
comes from the logits, and a selector that reads the very tokens of the prompt measures this pass.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..llm.modules import PREFILL_STEP_SIZE, set_module, share
from ..subnetwork.parent import Parent
from .layers import DensePass, Measure, Progress, logits_of, pieces_of, run_layers

# Runs the dense LLM over the ids of a text, and measures each layer.
RunDense = Callable[[list[int], Measure | None], DensePass]


@dataclass(frozen=True)
class Prefilled:
    """A prompt that the dense LLM has read.

    Attributes:
        cache: mlx-lm's prompt cache with the keys and values of all its tokens.
        logits: [1, 1, V], of the last token; evaluated.
        tokens: [n] ids that were read.
        seconds: how long that took.
        result: the pass, with what was measured.
    """

    cache: list[Any]
    logits: mx.array
    tokens: list[int]
    seconds: float
    result: DensePass


def dense_prefill(
    parent: Parent,
    tokens: list[int],
    cache: list[Any],
    measure: Measure | None = None,
    step: int = PREFILL_STEP_SIZE,
    progress: Progress = lambda done, of: None,
) -> Prefilled:
    """Let the dense LLM read a prompt, with one layer's FFN in memory at a time.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        tokens (list): [n] ids, n >= 1.
        cache (list): mlx-lm's prompt cache, which is filled. It may hold tokens before these.
        measure (Callable): called for each layer and piece.
        step (int): the most tokens that run at a time.
        progress (Callable): called with how much is done, and of how much.

    Raises:
        IFPError: if channels cannot be read.
    """
    start = time.perf_counter()
    result = run_layers(parent, pieces_of(tokens, cache, step), measure, progress)
    logits = logits_of(parent, result.hidden[-1][:, -1:])
    mx.eval(logits)
    mx.clear_cache()
    return Prefilled(cache, logits, tokens, time.perf_counter() - start, result)


def dense_prefill_all(
    parent: Parent,
    prompts: list[tuple[list[int], list[Any]]],
    step: int = PREFILL_STEP_SIZE,
    progress: Progress = lambda done, of: None,
) -> list[Prefilled]:
    """Let the dense LLM read several prompts, so that each FFN is read from disk once for all.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        prompts (list): for each prompt its ids and its cache, as for :func:`dense_prefill`.
        step, progress: as there.

    Returns:
        list: as :func:`dense_prefill` gives it for each prompt; ``seconds`` are those of all.
    """
    start = time.perf_counter()
    pieces, lasts = [], []
    for tokens, cache in prompts:
        pieces += pieces_of(tokens, cache, step)
        lasts.append(len(pieces) - 1)
    result = run_layers(parent, pieces, None, progress)
    logits = [logits_of(parent, result.hidden[last][:, -1:]) for last in lasts]
    mx.eval(logits)
    mx.clear_cache()
    seconds = time.perf_counter() - start
    return [
        Prefilled(cache, last, tokens, seconds, DensePass([], [], result.ffns_read))
        for (tokens, cache), last in zip(prompts, logits, strict=True)
    ]


def read_text(
    parent: Parent,
    tokens: list[int],
    measure: Measure | None = None,
    step: int = PREFILL_STEP_SIZE,
) -> DensePass:
    """Run the dense LLM over a text whose keys and values nobody needs afterwards.

    Args:
        parent, tokens, measure, step: as for :func:`dense_prefill`.
    """
    return run_layers(parent, pieces_of(tokens, make_prompt_cache(parent.trunk), step), measure)


class PromptPass:
    """The dense LLM's one pass over a prompt, which begins with an empty cache.

    Calling it runs the dense LLM over any text. If that is the prompt, the pass fills the prompt's
    cache, and :meth:`prefilled` has nothing left to do.

    Args:
        parent (Parent): the dense LLM.
        tokens (list): [n] ids of the prompt, n >= 1.
        cache (list): mlx-lm's prompt cache, empty.
        step (int): the most tokens that run at a time.

    Attributes:
        cache: as given.
        done: the prompt as it was read; None if it was not yet.
    """

    def __init__(
        self, parent: Parent, tokens: list[int], cache: list[Any], step: int = PREFILL_STEP_SIZE
    ) -> None:
        self.done: Prefilled | None = None
        self.cache = cache
        self._parent, self._tokens, self._step = parent, tokens, step

    def __call__(self, tokens: list[int], measure: Measure | None) -> DensePass:
        """The dense LLM's pass over the ids of a text."""
        if self.done is not None or tokens != self._tokens:
            return read_text(self._parent, tokens, measure, self._step)
        self.done = dense_prefill(self._parent, tokens, self.cache, measure, self._step)
        return self.done.result

    def prefilled(self, progress: Progress = lambda done, of: None) -> Prefilled:
        """The prompt, read now if nobody has read it."""
        if self.done is None:
            self.done = dense_prefill(
                self._parent, self._tokens, self.cache, step=self._step, progress=progress
            )
        return self.done


class _NoFFN(nn.Module):
    """Stands in for an FFN where only keys and values count."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


def without_ffns(parent: Parent) -> nn.Module:
    """The trunk as a model that can be called: its keys and values have the LLM's shapes."""
    model = share(parent.trunk)
    for ffn in parent.ffns:
        set_module(model, ffn.path, _NoFFN())
    return model
