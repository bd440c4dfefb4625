"""Prompt tokens -> scores without training: what the dense LLM's own channels did on the prompt.

The statistic is GRIFFIN's (Dong, Chen, Chi, "Prompt-prompted Adaptive Structured Pruning for
Efficient LLM Generation", 2024, arXiv 2404.01365): each token's activations are divided by their
norm, then a channel's score is the norm of what it has over the tokens.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..dense_pass.prefill import RunDense, read_text
from ..llm.modules import PREFILL_STEP_SIZE
from ..llm.prompt import token_ids
from ..subnetwork.parent import Parent


class ActivationRecorder(nn.Module):
    """Stands in for a down projection and adds up what goes into it.

    Args:
        down_proj (nn.Module): the projection.
        tokens (mx.array): bool or float32 [B, S], what each token counts for; None: all 1.

    Attributes:
        total: float32 [B, d_ffn], squares of activations over their token's squared norm.
    """

    def __init__(self, down_proj: nn.Module, tokens: mx.array | None = None) -> None:
        super().__init__()
        self._down_proj = down_proj
        self._tokens = tokens
        self.total = mx.zeros(())

    def __call__(self, z: mx.array) -> mx.array:
        squares = z.astype(mx.float32).square()
        norms = squares.sum(axis=-1, keepdims=True)
        # A token without any activation does not count.
        shares = squares / mx.maximum(norms, 1e-30)
        if self._tokens is not None:
            shares = shares * self._tokens[..., None]
        self.total = self.total + shares.sum(axis=1)
        return self._down_proj(z)


def griffin_total(z: mx.array) -> mx.array:
    """Squares of activations [B, n, d_ffn] over their token's squared norm, added up: [d_ffn]."""
    squares = z.astype(mx.float32).square()
    return (squares / mx.maximum(squares.sum(axis=-1, keepdims=True), 1e-30)).sum(axis=(0, 1))


def activation_scores(
    parent: Parent,
    tokens: list[int] | mx.array,
    *,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    run_dense: RunDense | None = None,
) -> mx.array:
    """GRIFFIN's statistic of every channel: ``s = || Z / ||Z||_token ||`` over the tokens.

    The dense LLM runs over the tokens with one layer's FFN in memory at a time.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        tokens (list or mx.array): [n] ids of the LLM's tokenizer, n >= 1.
        prefill_step_size (int): tokens to process at a time.
        run_dense (Callable): runs the dense LLM instead, so that its pass serves others too.

    Returns:
        mx.array: float32 [L, d_ffn], before any mask.
    """
    run_dense = run_dense or partial(read_text, parent, step=prefill_step_size)
    result = run_dense(token_ids(tokens), lambda piece, z, ffn: griffin_total(z))
    scores = mx.sqrt(mx.stack([mx.stack(pieces).sum(axis=0) for pieces in result.measured]))
    mx.eval(scores)
    return scores
