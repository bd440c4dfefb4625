"""Prompt tokens -> scores: a head that reads the dense LLM's own hidden state.

:mod:`mlx_ifp.fitting` makes such a head in closed form. The LLM was not trained with it, so the
dense LLM has to read the prompt anyway, and one pass gives all: keys and values, the hidden state,
and what the channels do on the prompt.
"""

from functools import partial

import mlx.core as mx

from ..dense_pass.prefill import RunDense, read_text
from ..dense_pass.statistics import measure_totals
from ..subnetwork.parent import Parent
from .activations import measured_scores
from .predictor import PredictorHead


def fitted_scores(
    parent: Parent, head: PredictorHead, tokens: list[int], *, run_dense: RunDense | None = None
) -> tuple[mx.array, mx.array]:
    """GRIFFIN's statistic of a text, and what the head predicts of the answer to it.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        head (PredictorHead): reads the final hidden state of the last token.
        tokens (list): [n] ids of the LLM's tokenizer, n >= 1.
        run_dense (Callable): runs the dense LLM instead, so that its pass serves others too.

    Returns:
        tuple: two arrays float32 [L, d_ffn].
    """
    run_dense = run_dense or partial(read_text, parent)
    result = run_dense(tokens, measure_totals("griffin"))
    predicted = head(result.hidden[-1][0, -1]).reshape(len(parent.ffns), -1)
    own = measured_scores(result)
    mx.eval(own, predicted)
    return own, predicted
