"""Run one set of wide weights under a mask in two ways; gradients reach the wide weights.

Inside a traced function the arrays of a model are tracers. The copies made here hold these very
tracers, or rows of them, so what is differentiated is always the wide model. The masks are those
of the paper (section 3.1): ``FFN(X, m) = down(act(gate(X)) * up(X) * m)``.
"""

from collections.abc import Callable
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from ..llm.ffn import FFN
from ..llm.modules import get_module, linear, share

# It takes a module's path and rows of its weight, and gives what a quantized checkpoint will have.
RoundRows = Callable[[str, mx.array], mx.array]


def wide_weight(module: nn.Module) -> tuple[mx.array, mx.array | None]:
    """Give a Linear's weight [output, input] and bias; LoRA's update is added to the weight."""
    if isinstance(module, LoRALinear):
        weight, bias = wide_weight(module.linear)
        update = (module.lora_a @ module.lora_b).T * module.scale
        return weight + update.astype(weight.dtype), bias
    return module.weight, module.get("bias")


def gathered(
    model: nn.Module,
    ffns: list[FFN],
    indices: mx.array,
    soft_values: mx.array | None,
    round_rows: RoundRows = lambda _, rows: rows,
) -> nn.Module:
    """Make the narrow network of one selection: it gathers k channels, and multiplies only those.

    Args:
        model (nn.Module): a dense mlx-lm model with float weights.
        ffns (list): its L FFNs.
        indices (mx.array): int32 [L, k], the channels to keep.
        soft_values (mx.array): float32 [L, k], multiplied with the up projection's rows as a
            sub-network does at inference; None for a hard mask.
        round_rows (Callable): of a :class:`~mlx_ifp.tuner.quantization_aware.Rounding`; a row is a
            channel, or one of the gate's and the up projection's.

    Returns:
        nn.Module: a copy that shares all arrays outside the FFNs.
    """
    narrow = share(model)
    for i, ffn in enumerate(ffns):
        module, channels = get_module(narrow, ffn.path), indices[i]
        soft = None if soft_values is None else soft_values[i]
        kept = _Kept(channels, ffn.d_ffn)
        if ffn.fused:
            both = _Kept(mx.concatenate([channels, channels + ffn.d_ffn]), 2 * ffn.d_ffn)
            weight, bias = _kept_outputs(module.gate_up_proj, both)
            weight = round_rows(ffn.module_path("gate_up_proj"), weight)
            if soft is not None:
                soft = mx.concatenate([mx.ones_like(soft), soft])
            module.gate_up_proj = _scaled(weight, bias, soft)
        else:
            for name, factor in (("gate_proj", None), ("up_proj", soft)):
                weight, bias = _kept_outputs(module[name], kept)
                weight = round_rows(ffn.module_path(name), weight)
                module[name] = _scaled(weight, bias, factor)
        weight, bias = _kept_inputs(module.down_proj, kept)
        # Channels are columns of this weight, but a checkpoint stores them as rows.
        rows = round_rows(ffn.module_path("down_proj"), weight.T)
        module.down_proj = linear(rows.T, bias)
    # Gradient checkpointing passes on only trainable arrays, so all of the copy is trainable.
    narrow.unfreeze()
    return narrow


class _Kept:
    """Take rows or columns of a wide array, with a gradient that is gathered, too.

    MLX's own gradient of indexing scatters. As every channel is kept once or not at all, the wide
    gradient is the narrow one with zeros in between, which one gather makes. On a CPU this takes a
    seventh of the time for rows, and a tenth for columns.

    Args:
        indices (mx.array): int32 [n], no two alike.
        size (int): of the wide axis.
    """

    def __init__(self, indices: mx.array, size: int) -> None:
        n = indices.size
        self._indices = indices
        # This gives each wide row its place among the kept rows, or n, where the padding is.
        self._places = mx.full((size,), n, dtype=mx.int32).at[indices].add(mx.arange(n) - n)

    def rows(self, wide: mx.array) -> mx.array:
        """[size, ...] -> [n, ...]."""

        @mx.custom_function
        def take(wide: mx.array) -> mx.array:
            return wide[self._indices]

        @take.vjp
        def vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
            zeros = mx.zeros((1, *cotangent.shape[1:]), cotangent.dtype)
            return mx.concatenate([cotangent, zeros])[self._places]

        return cast(mx.array, take(wide))

    def columns(self, wide: mx.array) -> mx.array:
        """[d, size] -> [d, n]."""

        def along(array: mx.array, indices: mx.array) -> mx.array:
            # On a CPU this is faster than plain indexing of the second axis.
            indices = mx.broadcast_to(indices[None], (array.shape[0], indices.size))
            return mx.take_along_axis(array, indices, axis=1)

        @mx.custom_function
        def take(wide: mx.array) -> mx.array:
            return along(wide, self._indices)

        @take.vjp
        def vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
            zeros = mx.zeros((cotangent.shape[0], 1), cotangent.dtype)
            return along(mx.concatenate([cotangent, zeros], axis=1), self._places)

        return cast(mx.array, take(wide))


def _kept_outputs(module: nn.Module, kept: _Kept) -> tuple[mx.array, mx.array | None]:
    """Give weight [n, input] and bias [n] of some outputs of a Linear, LoRA's update included."""
    if isinstance(module, LoRALinear):
        weight, bias = _kept_outputs(module.linear, kept)
        update = (module.lora_a @ kept.columns(module.lora_b)).T * module.scale
        return weight + update.astype(weight.dtype), bias
    bias = module.get("bias")
    return kept.rows(module.weight), None if bias is None else kept.rows(bias)


def _kept_inputs(module: nn.Module, kept: _Kept) -> tuple[mx.array, mx.array | None]:
    """Give weight [output, n] of some inputs of a Linear, LoRA's update included, and its bias."""
    if isinstance(module, LoRALinear):
        weight, bias = _kept_inputs(module.linear, kept)
        update = (kept.rows(module.lora_a) @ module.lora_b).T * module.scale
        return weight + update.astype(weight.dtype), bias
    return kept.columns(module.weight), module.get("bias")


def _scaled(weight: mx.array, bias: mx.array | None, soft: mx.array | None) -> nn.Linear:
    if soft is None:
        return linear(weight, bias)
    weight = (weight * soft[:, None]).astype(weight.dtype)
    return linear(weight, None if bias is None else (bias * soft).astype(bias.dtype))


class _MaskedDown(nn.Module):
    """Stands in for a down projection and multiplies its input by the mask."""

    def __init__(self, down_proj: nn.Module, mask: mx.array) -> None:
        super().__init__()
        self.down_proj = down_proj
        self.mask = mask

    def __call__(self, h: mx.array) -> mx.array:
        return self.down_proj(h * self.mask.astype(h.dtype))


def masked(model: nn.Module, ffns: list[FFN], masks: mx.array, blend: float = 1.0) -> nn.Module:
    """Make the wide network with a mask for each sequence.

    Args:
        model (nn.Module): a dense mlx-lm model.
        ffns (list): its L FFNs.
        masks (mx.array): float32 [B, L, d_ffn], 0 where a channel is left out.
        blend (float): the b in ``h * (1 - b) + b * h * m``: 0 is the dense model, 1 the masked one.

    Returns:
        nn.Module: a copy that shares all arrays.
    """
    wide = share(model)
    masks = masks if blend == 1.0 else 1 - blend + blend * masks
    for i, ffn in enumerate(ffns):
        module = get_module(wide, ffn.path)
        module.down_proj = _MaskedDown(module.down_proj, masks[:, i, None, :])
    wide.unfreeze()
    return wide
