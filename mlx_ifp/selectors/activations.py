"""Prompt tokens -> scores without training: what the dense LLM's own channels did on the prompt."""

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..dense_pass.layers import pieces_of, run_layers
from ..dense_pass.statistics import STATISTICS, measure_totals
from ..llm.modules import PREFILL_STEP_SIZE
from ..subnetwork.parent import Parent


def activation_scores(
    parent: Parent,
    tokens: list[int] | mx.array,
    *,
    statistic: str = "griffin",
    prefill_step_size: int = PREFILL_STEP_SIZE,
) -> mx.array:
    """A statistic of every channel over the tokens of a text.

    The dense LLM runs over the tokens with one layer's FFN in memory at a time.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        tokens (list or mx.array): [n] ids of the LLM's tokenizer, n >= 1.
        statistic (str): a name of :data:`~mlx_ifp.dense_pass.statistics.STATISTICS`.
        prefill_step_size (int): tokens to process at a time.

    Returns:
        mx.array: float32 [L, d_ffn], before any mask.
    """
    cache = make_prompt_cache(parent.trunk)
    pieces = pieces_of(tokens, cache, prefill_step_size)
    result = run_layers(parent, pieces, measure_totals(statistic))
    totals = mx.stack([mx.concatenate(layer).sum(axis=0) for layer in result.measured])
    scores = STATISTICS[statistic].of_totals(totals)
    mx.eval(scores)
    return scores
