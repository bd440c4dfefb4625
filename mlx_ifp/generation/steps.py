"""Tokens of any mlx-lm model, without an end, for measuring: one answer, or several at once."""

from collections.abc import Callable, Generator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from ..llm.modules import PREFILL_STEP_SIZE

# Freed memory is given back once in so many tokens, as in mlx-lm's generate_step.
_CLEAR_EVERY = 256


def token_steps(
    prompt: mx.array,
    network: nn.Module,
    *,
    samples: int = 1,
    prefill_step_size: int = PREFILL_STEP_SIZE,
) -> Generator[Any, None, None]:
    """Run mlx-lm's own loop past any end of sequence; several samples use :func:`sampled_steps`.

    Args:
        prompt (mx.array): [n] token ids, n >= 1.
        network (nn.Module): an mlx-lm model, which its caller keeps in memory.
        samples (int): answers to the prompt.
        prefill_step_size (int): tokens of the prompt to process at a time.
    """
    if samples > 1:
        return sampled_steps(prompt, network, samples, prefill_step_size=prefill_step_size)
    return generate_step(prompt, network, max_tokens=-1, prefill_step_size=prefill_step_size)


def sampled_steps(
    prompt: mx.array,
    model: nn.Module,
    samples: int,
    *,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    sampler: Callable[[mx.array], mx.array] | None = None,
) -> Generator[list[int], None, None]:
    """mlx-lm's ``generate_step`` for N samples of one prompt, without an end.

    The prompt runs as a batch of one. Its keys and values are repeated for each sample. The
    next tokens are being computed while the last ones are handed out.

    Args:
        prompt (mx.array): [n] token ids, n >= 1.
        model (nn.Module): an mlx-lm model.
        samples (int): N.
        prefill_step_size (int): tokens of the prompt to process at a time.
        sampler (Callable): log-probabilities [N, V] -> tokens [N]; temperature 1 by default.

    Yields:
        list: N token ids.
    """
    sampler = sampler or make_sampler(temp=1.0)
    cache = make_prompt_cache(model)

    def step(tokens: mx.array) -> mx.array:
        """Tokens [B, n] -> the next ones, [N]; B is 1 or N."""
        with mx.stream(generation_stream):
            logits = model(tokens, cache=cache)[:, -1]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            return sampler(mx.repeat(logprobs, samples // len(logprobs), axis=0))

    while prompt.size > 1:
        count = min(prefill_step_size, prompt.size - 1)
        with mx.stream(generation_stream):
            model(prompt[None, :count], cache=cache)
            mx.eval([c.state for c in cache])
        prompt = prompt[count:]
        mx.clear_cache()
    tokens = step(prompt[None])
    mx.async_eval(tokens)
    with mx.stream(generation_stream):
        for c in cache:
            c.state = tree_map(lambda leaf: _repeated(leaf, samples), c.state)
    count = 0
    while True:
        following = step(tokens[:, None])
        mx.async_eval(following)
        yield cast(list[int], tokens.tolist())
        if count % _CLEAR_EVERY == 0:
            mx.clear_cache()
        tokens = following
        count += 1


def _repeated(leaf: object, samples: int) -> object:
    """Keys and values [1, ...] for each sample; the numbers beside them stay."""
    return mx.repeat(leaf, samples, axis=0) if isinstance(leaf, mx.array) and leaf.ndim else leaf
