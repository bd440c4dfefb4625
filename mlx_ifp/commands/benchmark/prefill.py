"""Time to the first token with the prompt read by the whole model, and by the sub-network."""

import itertools

import mlx.core as mx

from ...generation.request import Request
from ...generation.stream import Answer
from ...llm.prompt import token_ids
from ...model import IFPModel

Seconds = dict[str, float]
# Each prompt is new to the process: no selector has seen its tokens.
_keys = itertools.count()


def prefill_seconds(model: IFPModel, prompt_tokens: int, step: int) -> Seconds:
    """Measure both ways to read a prompt, first with nothing known, then with all of it known.

    Args:
        model (IFPModel): one whose selector reads prompts with the LLM's tokenizer. Its
            sub-networks in memory are dropped.
        prompt_tokens (int): length of the prompts, which are random.
        step (int): prompt tokens to process at a time.

    Returns:
        dict: seconds to the first token. ``first_dense_seconds`` and ``first_pruned_seconds`` are
        of new prompts, which select and load, ``known_dense_seconds`` and ``known_pruned_seconds``
        of the same prompts again.
    """
    seconds = {}
    for prefill in ("dense", "pruned"):
        key = mx.random.key(next(_keys))
        rows = model.checkpoint.config.get("vocab_size") or model.tokenizer.vocab_size
        prompt = mx.random.randint(0, rows, (prompt_tokens,), key=key)
        model.networks.clear()
        mx.clear_cache()
        for known in ("first", "known"):
            options = {"max_tokens": 1, "prefill_step_size": step}
            request = Request(token_ids(prompt), prefill=prefill, options=options)
            answer = Answer(model, model.tokenizer, request)
            for _ in answer:
                pass
            seconds[f"{known}_{prefill}_seconds"] = answer.stats.first_token_seconds
    return seconds
