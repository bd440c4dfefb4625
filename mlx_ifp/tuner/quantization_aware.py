"""Quantization-aware training: the loss is that of the quantized LLM, the weights stay floats.

``mlx_ifp.convert -q`` rounds every weight to a few bits. Here each weight is rounded in the forward
pass to the very value that the converted checkpoint will have, and its gradient goes to the float
weight as if nothing had been rounded (the straight-through estimator; Bengio et al. 2013, arXiv
1308.3432).
"""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.rows import owners_of
from ..llm.ffn import FFN
from ..llm.modules import get_module, linear, set_module, share
from .networks import wide_weight

# It maps a module's path to group_size, bits and mode, as convert plans them.
QuantizationPlan = dict[str, dict[str, Any]]


def round_through(
    weight: mx.array, dtype: mx.Dtype, group_size: int, bits: int, mode: str
) -> mx.array:
    """What quantization leaves of a weight [..., n] of a type; its gradient passes unchanged."""

    @mx.custom_function
    def rounded(weight: mx.array) -> mx.array:
        parts = mx.quantize(weight.astype(dtype), group_size, bits, mode)
        dequantized = mx.dequantize(*parts, group_size=group_size, bits=bits, mode=mode)
        return dequantized.astype(weight.dtype)

    @rounded.vjp
    def vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return cotangent

    return cast(mx.array, rounded(weight))


class Rounding:
    """An LLM's weights as its quantized checkpoint will have them.

    Args:
        plan (dict): which modules are quantized, and how.
        ffns (list): the LLM's FFNs; their down projections are rounded as they are stored, a
            channel's weights together.
        dtype (mx.Dtype): the type that the checkpoint is stored in before it is quantized.
    """

    def __init__(self, plan: QuantizationPlan, ffns: list[FFN], dtype: mx.Dtype) -> None:
        self.plan, self.ffns, self.dtype = plan, ffns, dtype
        self._of_ffns = owners_of(ffns).keys()
        # Weights that are not trained are rounded only once, and kept here.
        self._frozen: dict[str, mx.array] = {}

    def rows(self, path: str, weight: mx.array) -> mx.array:
        """Round a module's weight [n, d], which may have all rows or only some."""
        how = self.plan.get(path)
        return weight if how is None else round_through(weight, self.dtype, **how)

    def trunk(self, llm: nn.Module) -> nn.Module:
        """Make a copy that is rounded except for the FFNs, and shares all other arrays."""
        copy = share(llm)
        for path in self.plan.keys() - self._of_ffns:
            module = get_module(copy, path)
            if "weight" in module and "weight" not in module.trainable_parameters():
                if path not in self._frozen:
                    self._frozen[path] = self.rows(path, module.weight)
                    mx.eval(self._frozen[path])
                module.weight = self._frozen[path]
            elif isinstance(module, nn.Embedding):
                module.weight = self.rows(path, module.weight)
            else:
                weight, bias = wide_weight(module)
                set_module(copy, path, linear(self.rows(path, weight), bias))
        return copy

    def wide(self, trunk: nn.Module) -> nn.Module:
        """Make a copy of a rounded trunk in which the FFNs are rounded, too."""
        copy = share(trunk)
        for ffn in self.ffns:
            module = get_module(copy, ffn.path)
            for path in owners_of([ffn]):
                name = path.rpartition(".")[2]
                weight, bias = wide_weight(module[name])
                # A checkpoint stores a channel of down_proj as a row.
                turned = name == "down_proj"
                weight = self.rows(path, weight.T if turned else weight)
                module[name] = linear(weight.T if turned else weight, bias)
        return copy
