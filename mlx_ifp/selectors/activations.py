"""Prompt tokens -> scores without training: what the dense LLM's own channels did on the prompt."""

from functools import partial

import mlx.core as mx

from ..dense_pass.layers import DensePass
from ..dense_pass.prefill import RunDense, read_text
from ..dense_pass.statistics import STATISTICS, measure_totals
from ..llm.modules import PREFILL_STEP_SIZE
from ..llm.prompt import token_ids
from ..subnetwork.parent import Parent


def activation_scores(
    parent: Parent,
    tokens: list[int] | mx.array,
    *,
    statistic: str = "griffin",
    prefill_step_size: int = PREFILL_STEP_SIZE,
    run_dense: RunDense | None = None,
) -> mx.array:
    """A statistic of every channel over the tokens of a text.

    The dense LLM runs over the tokens with one layer's FFN in memory at a time.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        tokens (list or mx.array): [n] ids of the LLM's tokenizer, n >= 1.
        statistic (str): a name of :data:`~mlx_ifp.dense_pass.statistics.STATISTICS`.
        prefill_step_size (int): tokens to process at a time.
        run_dense (Callable): runs the dense LLM instead, so that its pass serves others too.

    Returns:
        mx.array: float32 [L, d_ffn], before any mask.
    """
    run_dense = run_dense or partial(read_text, parent, step=prefill_step_size)
    scores = measured_scores(run_dense(token_ids(tokens), measure_totals(statistic)), statistic)
    mx.eval(scores)
    return scores


def measured_scores(result: DensePass, statistic: str = "griffin") -> mx.array:
    """The statistic of one text, float32 [L, d_ffn], of a pass that measured its totals."""
    totals = mx.stack([mx.concatenate(layer).sum(axis=0) for layer in result.measured])
    return STATISTICS[statistic].of_totals(totals)
