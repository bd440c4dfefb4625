"""Prompt tokens -> scores: a head that reads the dense LLM's own hidden state.

:mod:`mlx_ifp.fitting` makes such a head in closed form. The LLM was not trained with it, so the
dense LLM has to read the prompt anyway, and one pass gives all: keys and values, the hidden state,
and what the channels do on the prompt.
"""

from functools import partial

import mlx.core as mx
import numpy as np

from ..dense_pass.prefill import RunDense, read_text
from ..dense_pass.statistics import measure_totals
from ..selection.ranks import blended
from ..selection.selection import check_finite
from ..subnetwork.parent import Parent
from .activations import measured_scores
from .predictor import PredictorHead


def fitted_scores(
    parent: Parent,
    head: PredictorHead,
    tokens: list[int],
    blend: float,
    *,
    computed_in: mx.Dtype | None = None,
    run_dense: RunDense | None = None,
) -> mx.array:
    """Ranks of the head's prediction, blended with those of GRIFFIN's statistic of the prompt.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        head (PredictorHead): reads the final hidden state of the last token.
        tokens (list): [n] ids of the LLM's tokenizer, n >= 1.
        blend (float): weight of the prompt's ranks, 0 to 1.
        computed_in (mx.Dtype): the type that the LLM computes in, for the message.
        run_dense (Callable): runs the dense LLM instead, so that its pass serves others too.

    Returns:
        mx.array: float32 [L, d_ffn].

    Raises:
        IFPError: if a score is not finite.
    """
    run_dense = run_dense or partial(read_text, parent)
    result = run_dense(tokens, measure_totals("griffin"))
    predicted = head(result.hidden[-1][0, -1]).reshape(len(parent.ffns), -1)
    own = measured_scores(result)
    for scores in (predicted, own):
        # Ranks would hide numbers that are not finite.
        check_finite(scores, computed_in)
    return mx.array(blended(np.array(own), np.array(predicted), blend))
