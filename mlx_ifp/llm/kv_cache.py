"""Count the bytes of mlx-lm's key-value cache at a given length without computing anything.

MLX is lazy: a model can run over tokens up to the shapes and types of its keys and values, with
weights that are never read. So the caches counted here are those that mlx-lm makes for the
architecture, and the model itself fills them; we have no formula of our own.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import (
    ArraysCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from ..errors import IFPError, one_line
from .modules import PREFILL_STEP_SIZE, find_body, get_module

# A cache of an unknown kind is filled with so many tokens at a time.
_BLOCK = 256


@dataclass(frozen=True)
class KVSettings:
    """How mlx-lm keeps keys and values: the arguments of its ``generate_step`` with these names.

    Attributes:
        max_kv_size: the most positions; it only holds for models that make no cache of their own.
        kv_bits: bits of a quantized number; None leaves keys and values as they are.
        kv_group_size: their quantization group.
        quantized_kv_start: keys and values are quantized from so many tokens on.
    """

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "KVSettings":
        """Take the settings from the arguments of a generation."""
        return cls(**{name: arguments[name] for name in cls.__annotations__ if name in arguments})

    def check(self, model: nn.Module, positions: int | None = None) -> None:
        """Try lazily whether a model can run with its keys and values quantized.

        mlx-lm would find out only when it begins to quantize, after thousands of tokens.

        Args:
            model (nn.Module): an mlx-lm model, whose arrays need not be evaluated.
            positions (int): how many tokens there will be at most; with fewer than
                ``quantized_kv_start`` nothing is quantized. None for no bound.

        Raises:
            IFPError: if it cannot.
        """
        if self.kv_bits is None:
            return
        if positions is not None and positions < self.quantized_kv_start:
            return
        cache = make_prompt_cache(model, self.max_kv_size)
        with self._refusal():
            for _ in range(2):
                model(mx.zeros((1, 1), mx.int32), cache=cache)
                replace(self, quantized_kv_start=0).quantize(cache)

    def _refusal(self) -> AbstractContextManager[None]:
        return one_line(
            f"mlx-lm cannot keep this model's keys and values in {self.kv_bits} bits, "
            f"in groups of {self.kv_group_size}"
        )

    def quantize(self, cache: list[Any]) -> None:
        """Let mlx-lm quantize a prompt cache in place, if it is long enough for that."""
        maybe_quantize_kv_cache(
            cache,
            quantized_kv_start=self.quantized_kv_start,
            kv_group_size=self.kv_group_size,
            kv_bits=self.kv_bits,
        )

    @property
    def identity(self) -> list[int | None]:
        """What tells settings apart; how to quantize matters only if something is quantized."""
        if self.kv_bits is None:
            return [self.max_kv_size]
        return [self.max_kv_size, self.kv_bits, self.kv_group_size, self.quantized_kv_start]


@dataclass(frozen=True)
class Generation:
    """The arguments of mlx-lm's ``generate_step`` on which the size of the cache depends.

    Attributes:
        prompt_tokens: length of the prompt, 1 or more; tokens in a prompt cache count, too.
        max_tokens: how many tokens to generate.
        kv: how keys and values are kept.
        prefill_step_size: prompt tokens that run at a time.
    """

    prompt_tokens: int
    max_tokens: int = 0
    kv: KVSettings = KVSettings()
    prefill_step_size: int = PREFILL_STEP_SIZE

    @classmethod
    def of(cls, prompt_tokens: int, max_tokens: int = 256, **arguments: Any) -> "Generation":
        """Read the arguments of mlx-lm's ``stream_generate``; those without effect are ignored.

        Raises:
            IFPError: if there is no limit of tokens, or a draft model is given.
        """
        if max_tokens < 0:
            raise IFPError(
                "A memory limit needs a limit of tokens: --max-tokens (max_tokens=) must not be -1."
            )
        if arguments.get("draft_model") is not None:
            raise IFPError("A memory limit does not count a draft model; leave out one of them.")
        step = arguments.get("prefill_step_size", PREFILL_STEP_SIZE)
        return cls(prompt_tokens, max_tokens, KVSettings.of(arguments), step)

    @property
    def tokens(self) -> int:
        """Positions in the cache at the end."""
        return self.prompt_tokens + self.max_tokens


def kv_bytes(model: nn.Module, generation: Generation, *, selector: bool = False) -> int:
    """The most bytes that the cache takes at any time during a generation.

    A cache grows by 256 positions at a time, and a sliding window holds a whole prefill step
    more than its width, until the first token is generated.

    Args:
        model (nn.Module): an mlx-lm model; its arrays need not be evaluated, and stay as they are.
        generation (Generation): lengths and settings.
        selector (bool): count as a selector reads its text, in whole steps to the end.

    Raises:
        IFPError: if mlx-lm cannot quantize this model's keys and values as asked.
    """
    cache = make_prompt_cache(model, generation.kv.max_kv_size)
    body = get_module(model, find_body(model))
    peak = 0

    def step(tokens: int) -> None:
        nonlocal peak
        body(mx.zeros((1, tokens), mx.int32), cache=cache)
        with generation.kv._refusal():
            generation.kv.quantize(cache)
        peak = max(peak, sum(layer.nbytes for layer in cache))

    # generate_step reads the prompt but its last token in steps, then goes token by token.
    left = generation.prompt_tokens - (not selector)
    while left > 0:
        tokens = min(generation.prefill_step_size, left)
        step(tokens)
        left -= tokens
    if selector:
        return peak
    step(1)
    left = generation.max_tokens
    while left > 0:
        free = [_free(layer, generation) for layer in cache]
        known = [tokens for tokens in free if tokens is not None]
        if len(known) < len(free):
            tokens = min(_BLOCK, left)
            step(tokens)
            left -= tokens
            continue
        # No cache changes its size until the first layer's cache is full, so these are skipped.
        skipped = min(*known, left - 1)
        for layer in cache:
            if not isinstance(layer, ArraysCache):
                layer.offset += skipped
        step(1)
        left -= skipped + 1
    return peak


def _free(layer: Any, generation: Generation) -> int | None:
    """How many single tokens fit into a layer's cache before it changes; None if unknown."""
    if type(layer) is ArraysCache:
        return generation.tokens  # its state has a fixed size
    if type(layer) is RotatingKVCache:
        size = layer.keys.shape[2]
        return generation.tokens if size >= layer.max_size else size - layer.offset
    if type(layer) is KVCache:
        free = layer.keys.shape[2] - layer.offset
        start = generation.kv.quantized_kv_start - layer.offset - 1
        return min(free, start) if generation.kv.kv_bits is not None and start >= 0 else free
    if type(layer) is QuantizedKVCache:
        keys: Any = layer.keys  # (packed, scales, biases), once it is filled
        return keys[0].shape[2] - layer.offset
    return None
