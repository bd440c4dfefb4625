"""The dense LLM's own answers to prompts, greedy, many at a time."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..dense_pass.layers import Piece, logits_of, pieces_of, run_layers
from ..errors import IFPError
from ..subnetwork.parent import Parent
from ..synthesis.sampling import Request, check_batchable, safe_batch_size, sample_texts

# Prompts that are answered together.
BATCH_SIZE = 32


def write_answers(
    parent: Parent,
    prompts: Sequence[list[int]],
    stops: set[int],
    max_tokens: int,
    *,
    network: nn.Module | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], object] = lambda _: None,
) -> list[list[int]]:
    """Let the dense LLM answer prompts, greedily.

    Args:
        parent (Parent): the dense LLM, whose FFNs are read anew for each token if there is no
            ``network``: slow, but only one layer's FFN is in memory.
        prompts (sequence): token ids, each one or more.
        stops (set): ids of tokens that end an answer.
        max_tokens (int): the most tokens of an answer.
        network (nn.Module): the dense LLM in memory, or None.
        batch_size (int): prompts that are answered together.
        progress (Callable): called with the number of answers that are finished.

    Returns:
        list: token ids in the order of the prompts, without the token that ended them.

    Raises:
        IFPError: if channels cannot be read.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if prompts and network is not None and _is_batchable(network):
        batch_size = safe_batch_size(network, max(prompts, key=len), batch_size)
        requests = [Request(prompt, max_tokens, 0.0) for prompt in prompts]
        for written in sample_texts(network, requests, stops, top_p=1.0, batch_size=batch_size):
            answers[written.place] = written.tokens
            progress(1)
        return answers
    for start in range(0, len(prompts), batch_size):
        group = prompts[start : start + batch_size]
        answers[start : start + batch_size] = _streamed(parent, group, stops, max_tokens)
        progress(len(group))
    return answers


def _is_batchable(network: nn.Module) -> bool:
    try:
        check_batchable(network)
    except IFPError:
        return False
    return True


def _streamed(
    parent: Parent, prompts: Sequence[list[int]], stops: set[int], max_tokens: int
) -> list[list[int]]:
    """Answer prompts layer by layer: each FFN is read once for a token of every answer."""
    caches = [make_prompt_cache(parent.trunk) for _ in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    pieces = [pieces_of(p, cache) for p, cache in zip(prompts, caches, strict=True)]
    unfinished = list(range(len(prompts)))
    while unfinished:
        hidden = iter(run_layers(parent, [piece for own in pieces for piece in own]).hidden)
        last = [[next(hidden) for _ in own][-1][:, -1:] for own in pieces]
        tokens = mx.stack([logits_of(parent, state)[0, 0].argmax() for state in last])
        going = []
        for i, token in zip(unfinished, list(map(int, tokens)), strict=True):
            if token not in stops:
                answers[i].append(token)
                if len(answers[i]) < max_tokens:
                    going.append(i)
        unfinished = going
        pieces = [[Piece(mx.array([answers[i][-1:]]), caches[i])] for i in unfinished]
    return answers
