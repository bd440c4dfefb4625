"""Prompt tokens -> scores: a head that reads the dense LLM's own hidden state.

:mod:`mlx_ifp.fitting` makes such a head in closed form, and it can be trained with the LLM. In both
cases the dense LLM reads the prompt, and one pass gives all: keys and values, the hidden state, and
what the channels do on the prompt.
"""

from functools import partial

import mlx.core as mx

from ..dense_pass.prefill import RunDense, read_text
from ..dense_pass.statistics import measure_totals
from ..subnetwork.parent import Parent
from .activations import measured_scores
from .predictor import PredictorHead


def own_state_scores(
    parent: Parent,
    head: PredictorHead,
    tokens: list[int],
    *,
    with_own: bool = True,
    run_dense: RunDense | None = None,
) -> tuple[mx.array, mx.array | None]:
    """What the head says of a text, and GRIFFIN's statistic of the same pass.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        head (PredictorHead): reads the final hidden state of the last token.
        tokens (list): [n] ids of the LLM's tokenizer, n >= 1.
        with_own (bool): whether the statistic is measured.
        run_dense (Callable): runs the dense LLM instead, so that its pass serves others too.

    Returns:
        tuple: two arrays float32 [L, d_ffn]; the second one is None if it is not measured.
    """
    run_dense = run_dense or partial(read_text, parent)
    result = run_dense(tokens, measure_totals("griffin") if with_own else None)
    predicted = head(result.hidden[-1][0, -1]).reshape(len(parent.ffns), -1)
    own = measured_scores(result) if with_own else None
    mx.eval([predicted] if own is None else [predicted, own])
    return predicted, own
