"""Prompt tokens -> scores: the sparsity predictor, an mlx-lm backbone and a small head."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..checkpoint.config import HeadConfig
from ..checkpoint.directory import Checkpoint
from ..checkpoint.expected import head_quantization
from ..checkpoint.weights import load_backbone, load_tensors
from ..llm.modules import (
    PARTS,
    PREFILL_STEP_SIZE,
    final_hidden,
    find_body,
    get_module,
    linear,
    quantized_linear,
)

_ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": nn.gelu,
    "relu": nn.relu,
    "leaky_relu": lambda x: nn.leaky_relu(x, 0.1),
    "silu": nn.silu,
}


class PredictorHead(nn.Module):
    """Linear layers with an activation between them (paper, section 3.1): D -> P -> L * d_ffn.

    Float Linears are trainable, under ``linears.0.weight``, ``linears.0.bias``, ...; quantized
    ones are frozen, as MLX has them.

    Args:
        config (HeadConfig): its shape.
        arrays (dict): ``linear1.weight`` [P, D], ``linear1.bias`` [P], ``linear2.weight``, ...;
            of a quantized one the packed weight, ``linear2.scales`` and ``linear2.biases``.
        backbone_config (dict): says how the quantized ones are quantized.

    Raises:
        IFPError: if it does not say so.
    """

    def __init__(
        self,
        config: HeadConfig,
        arrays: dict[str, mx.array],
        backbone_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.linears = []
        for name in (f"linear{i + 1}" for i in range(len(config.biases))):
            weight = arrays[f"{name}.weight"]
            scales, biases, bias = (arrays.get(f"{name}.{part}") for part in PARTS[1:])
            layer: nn.Module
            if scales is None:
                layer = linear(weight, bias)
            else:
                how = head_quantization(backbone_config or {}, name)
                layer = quantized_linear(weight, scales, biases, how, bias)
            self.linears.append(layer)

    def __call__(self, feature: mx.array) -> mx.array:
        """Backbone features [..., D] -> scores [..., L * d_ffn], float32."""
        if self.config.feature_norm == "layer_norm":
            feature = mx.fast.layer_norm(feature.astype(mx.float32), None, None, 1e-5)
        first = self.linears[0]
        x = feature.astype(first.get("scales", first.weight).dtype)
        for i, layer in enumerate(self.linears):
            x = layer(_ACTIVATIONS[self.config.activation](x) if i else x)
        return x.astype(mx.float32)


class Predictor:
    """The sparsity predictor of a checkpoint, in memory.

    Args:
        backbone (nn.Module): an mlx-lm model of any architecture.
        head (PredictorHead): reads its final hidden state.
        layers (int): L, of the LLM.
    """

    def __init__(self, backbone: nn.Module, head: PredictorHead, layers: int) -> None:
        self.backbone = backbone
        self.body = get_module(backbone, find_body(backbone))
        self.head = head
        self.layers = layers

    def scores(
        self, tokens: list[int] | mx.array, prefill_step_size: int = PREFILL_STEP_SIZE
    ) -> mx.array:
        """Channel scores from the last token's final hidden state (paper, section 3.1).

        Args:
            tokens (list or mx.array): [n] ids of the predictor's tokenizer, n >= 1.
            prefill_step_size (int): tokens to process at a time.

        Returns:
            mx.array: float32 [L, d_ffn], before any mask.
        """
        tokens = mx.array(tokens)
        cache = make_prompt_cache(self.backbone)
        hidden = final_hidden(self.body, tokens, cache, prefill_step_size)
        scores = self.head(hidden[0, -1]).reshape(self.layers, -1)
        mx.eval(scores)
        return scores

    def batch_scores(self, tokens: mx.array, lengths: mx.array) -> mx.array:
        """The scores of several texts in one pass, lazy and differentiable: for training.

        The backbone is causal, so what stands right of a text's last token does not reach it.

        Args:
            tokens (mx.array): int32 [B, n], texts filled up on the right with any valid id.
            lengths (mx.array): int32 [B], of the texts, 1 to n.

        Returns:
            mx.array: float32 [B, L, d_ffn], before any mask.
        """
        hidden = self.body(tokens, cache=None)
        last = hidden[mx.arange(tokens.shape[0]), lengths - 1]
        return self.head(last).reshape(tokens.shape[0], self.layers, -1)


def load_predictor(
    checkpoint: Checkpoint, dtype: mx.Dtype | None = None, trunk: nn.Module | None = None
) -> Predictor:
    """Load a checkpoint's predictor.

    Args:
        checkpoint (Checkpoint): one that has a predictor.
        dtype (mx.Dtype): cast floats to this type; None keeps them.
        trunk (nn.Module): the LLM's, from ``load_trunk``; needed if its ``predictor_embedding``
            is ``llm``. Then the backbone's embedding is this model's very module.
    """
    backbone = load_backbone(checkpoint, dtype, trunk)
    return Predictor(backbone, load_head(checkpoint, dtype), len(checkpoint.ffns))


def load_head(checkpoint: Checkpoint, dtype: mx.Dtype | None = None) -> PredictorHead:
    """Load the head of a checkpoint's predictor; arguments as for :func:`load_predictor`."""
    arrays = load_tensors(checkpoint.head, dtype)
    assert checkpoint.ifp.head is not None, "a checkpoint with a predictor has its head's shape"
    head = PredictorHead(checkpoint.ifp.head, arrays, checkpoint.predictor_config)
    mx.eval(head.parameters())
    return head
