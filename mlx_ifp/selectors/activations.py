"""Prompt tokens -> scores without training: what the dense LLM's own channels did on the prompt.

The statistic is GRIFFIN's (Dong, Chen, Chi, "Prompt-prompted Adaptive Structured Pruning for
Efficient LLM Generation", 2024, arXiv 2404.01365): each token's activations are divided by their
norm, then a channel's score is the norm of what it has over the tokens.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..llm.ffn import FFN
from ..llm.modules import PREFILL_STEP_SIZE, final_hidden, find_body, get_module, set_module, share
from ..subnetwork.build import set_ffn
from ..subnetwork.parent import Parent
from ..subnetwork.rows import read_ffn


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


class _StreamedFFN(nn.Module):
    """Stands in for an FFN: it reads the FFN, runs it, records its channels and frees it."""

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        super().__init__()
        self._load = load
        self.total = mx.zeros(())

    def __call__(self, x: mx.array) -> mx.array:
        # Without this, lazy evaluation would want the FFNs of all layers at once.
        mx.eval(x)
        ffn = self._load()
        recorder = ActivationRecorder(ffn.down_proj)
        ffn.down_proj = recorder
        y = ffn(x)
        self.total = self.total + recorder.total[0]
        mx.eval(y, self.total)
        return y


def activation_scores(
    parent: Parent,
    tokens: list[int] | mx.array,
    *,
    prefill_step_size: int = PREFILL_STEP_SIZE,
) -> mx.array:
    """GRIFFIN's statistic of every channel: ``s = || Z / ||Z||_token ||`` over the tokens.

    The dense LLM runs over the tokens with one layer's FFN in memory at a time.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        tokens (list or mx.array): [n] ids of the LLM's tokenizer, n >= 1.
        prefill_step_size (int): tokens to process at a time.

    Returns:
        mx.array: float32 [L, d_ffn], before any mask.
    """
    model = share(parent.trunk)
    streamed = []
    for ffn in parent.ffns:
        module = get_module(model, ffn.path)

        def load(ffn: FFN = ffn, module: nn.Module = module) -> nn.Module:
            whole = share(module)
            rows = read_ffn(parent.reader, ffn, None, dtype=parent.dtype)
            set_ffn(whole, rows, parent.config)
            return whole

        streamed.append(_StreamedFFN(load))
        set_module(model, ffn.path, streamed[-1])
    body = get_module(model, find_body(model))
    tokens = mx.array(tokens)
    cache = make_prompt_cache(model)
    final_hidden(body, tokens, cache, prefill_step_size)
    scores = mx.sqrt(mx.stack([module.total for module in streamed]))
    mx.eval(scores)
    return scores
