"""Trunk + chosen FFN channels -> a plain mlx-lm model with a narrower FFN."""

import itertools
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..llm.build import quantization_of
from ..llm.modules import PARTS, evaluate, get_module, linear, quantized_linear, share
from .parent import Parent
from .rows import FFNRows


class ChannelMajorLinear(nn.Module):
    """A quantized down projection whose rows are channels: ``x @ dequantize(weight)``.

    Quantization groups lie inside a row, so any choice of rows is exact.

    Args:
        weight (mx.array): uint32 [k, packed hidden size].
        scales, biases: those of ``weight``; biases is None for the modes that have none.
        how (dict): group_size, bits and mode.
        bias (mx.array): [hidden size], or None.
        soft_values (mx.array): float32 [k], multiplied with the activation, or None.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None,
        how: dict[str, Any],
        bias: mx.array | None = None,
        soft_values: mx.array | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.scales = scales
        if biases is not None:
            self.biases = biases
        if bias is not None:
            self.bias = bias
        if soft_values is not None:
            self.soft_values = soft_values
        self.group_size, self.bits, self.mode = how["group_size"], how["bits"], how["mode"]
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        if "soft_values" in self:
            x = x * self["soft_values"].astype(x.dtype)
        # x gets two dimensions, because results of MLX's vector kernel for transpose=False are in
        # doubt for the shape (n, 1, k).
        y = mx.quantized_matmul(
            x.reshape(-1, x.shape[-1]),
            self["weight"],
            scales=self["scales"],
            biases=self.get("biases"),
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y + self["bias"] if "bias" in self else y


def set_ffn(module: nn.Module, rows: FFNRows, config: dict[str, Any]) -> None:
    """Put rows into an FFN.

    Args:
        module (nn.Module): mlx-lm's FFN; its down projection's bias, if any, is kept.
        rows (FFNRows): from :func:`read_ffn`.
        config (dict): that of the LLM, which says how weights are quantized.
    """
    ffn = rows.ffn
    for projection in sorted({projection for projection, _ in rows.arrays}):
        down = projection == "down_proj"
        weight = rows.arrays[projection, "weight"]
        scales, biases, bias = (rows.arrays.get((projection, part)) for part in PARTS[1:])
        if down:
            bias = module.down_proj.get("bias")
        if scales is None:
            # Transposing only changes strides: the array in memory is the one on disk.
            module[projection] = linear(weight.T if down else weight, bias)
            continue
        how = quantization_of(config, ffn.module_path(projection))
        if down:
            module.down_proj = ChannelMajorLinear(
                weight, scales, biases, how, bias, rows.soft_values
            )
        else:
            module[projection] = quantized_linear(weight, scales, biases, how, bias)


def assemble(parent: Parent, rows: Iterable[FFNRows]) -> nn.Module:
    """A sub-network: a stock mlx-lm model that shares the trunk.

    Args:
        parent (Parent): the one whose trunk it shares.
        rows: L of them, one for each FFN. They may be read while others are put in.
    """
    rows = iter(rows)
    first = next(rows)
    # The modules are copied while the next layers are read.
    model = share(parent.trunk)
    modules = []
    for layer in itertools.chain([first], rows):
        modules.append(get_module(model, layer.ffn.path))
        set_ffn(modules[-1], layer, parent.config)
    # Only the FFNs are evaluated here; the trunk was evaluated when it was loaded.
    evaluate(modules)
    return model
