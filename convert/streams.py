"""Cast, transpose and quantize a checkpoint's tensors while they are written."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ifp.checkpoint.rows import owners_of, to_rows
from mlx_ifp.files.tensor_files import BLOCK_BYTES, LazyTensor, len_of
from mlx_ifp.llm.ffn import FFN

from .sources.tensor import buffers

Tensors = dict[str, LazyTensor]
# A transposition turns this many rows at once, which was measured at 1.5 GB/s. With 64 rows it was
# 0.7 GB/s, and with all rows at once 0.35.
_TILE = 16


def split_model(
    network: nn.Module,
    tensors: Tensors,
    ffns: list[FFN],
    plan: dict[str, dict[str, Any]],
    dtype: str | None,
) -> tuple[Tensors, Tensors]:
    """Split a model's tensors as a checkpoint stores them: the trunk, and channels as rows.

    Args:
        network (nn.Module): mlx-lm's model, for its ``cast_predicate``.
        tensors (dict): mlx-lm's names -> tensors; the dict is emptied on the way.
        ffns (list): its FFNs; if the list is empty, everything is trunk.
        plan (dict): module path -> how to quantize it.
        dtype (str): cast floats to this type; None keeps them.
    """
    keeps = getattr(network, "cast_predicate", lambda _: True)
    trunk: Tensors = {}
    channels: Tensors = {}
    owners = owners_of(ffns)
    # Modules that are quantized already have been transposed, so that groups lie inside a row.
    turned = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    for name in sorted(tensors):
        tensor = tensors.pop(name)
        module = name.rpartition(".")[0]
        if dtype is not None and keeps(name):
            tensor = cast(tensor, getattr(mx, dtype))
        stored: Tensors = {}
        if module in owners:
            stored = to_rows(
                owners[module],
                name,
                tensor,
                turned=module in turned,
                rows=rows,
                transposed=transposed,
            )
        for key, piece in stored.items():
            channels |= quantized(key, piece, plan.get(module))
        if not stored:
            trunk |= quantized(name, tensor, plan.get(module))
    return trunk, channels


def as_array(block: mx.array | np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Return a block of a LazyTensor as an MLX array."""
    return block if isinstance(block, mx.array) else mx.array(block).view(dtype)


def same_values(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors are equal bit for bit; both are read in pieces until one differs."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    count = len_of(one.shape)
    step = min(one.step or count, other.step or count) or 1
    pieces = ((start, min(start + step, count)) for start in range(0, count, step))
    return all(
        np.array_equal(_bits(one.read(*piece)), _bits(other.read(*piece))) for piece in pieces
    )


def _bits(block: mx.array | np.ndarray) -> np.ndarray:
    """Copy a block's bits, because the next read may use the same memory."""
    if isinstance(block, mx.array):
        return np.array(block.view(mx.uint8))
    return np.array(block).view(np.uint8)


def cast(tensor: LazyTensor, dtype: mx.Dtype) -> LazyTensor:
    """Cast floats to another type; leave anything else as it is."""
    if tensor.dtype == dtype or not mx.issubdtype(tensor.dtype, mx.floating):
        return tensor

    def read(start: int, stop: int) -> mx.array:
        return as_array(tensor.read(start, stop), tensor.dtype).astype(dtype)

    return LazyTensor(tensor.shape, dtype, read, tensor.step, tensor.held)


def dequantized(parts: Tensors, how: dict[str, Any]) -> LazyTensor:
    """Make the float weight of a quantized module, block by block.

    Args:
        parts: ``weight``, ``scales`` and, if affine, ``biases``.
        how: its group_size, bits and mode.
    """
    weight, scales = parts["weight"], parts["scales"]
    tensors = [weight, scales, *([parts["biases"]] if "biases" in parts else [])]
    factor = 32 // how["bits"]

    def read(start: int, stop: int) -> mx.array:
        packed, scale, *bias = [as_array(t.read(start, stop), t.dtype) for t in tensors]
        return mx.dequantize(packed, scale, bias[0] if bias else None, **how)

    # MLX dequantizes the modes with 8-bit scales to bfloat16.
    dtype = scales.dtype if how["mode"] == "affine" else mx.bfloat16
    shape = (weight.shape[0], weight.shape[1] * 32 // how["bits"])
    return LazyTensor(shape, dtype, read, max(weight.step // factor, 1))


def rows(tensor: LazyTensor, begin: int, end: int) -> LazyTensor:
    """Take the rows from ``begin`` to ``end``."""
    return LazyTensor(
        (end - begin, *tensor.shape[1:]),
        tensor.dtype,
        lambda start, stop: tensor.read(begin + start, begin + stop),
        tensor.step,
    )


def transposed(tensor: LazyTensor) -> LazyTensor:
    """Exchange a matrix's rows and columns; it is read whole, and transposed block by block."""
    count, columns = tensor.shape
    held: list[mx.array | np.ndarray] = []

    def read(start: int, stop: int) -> mx.array | np.ndarray:
        if not held:
            held.append(tensor.read(0, count))
        whole = held[0] if stop < columns else held.pop()
        if isinstance(whole, mx.array):
            return whole.T[start:stop]
        turned = buffers.take((stop - start) * count * whole.itemsize).view(whole.dtype)
        turned = turned.reshape(stop - start, count)
        for i in range(0, count, _TILE):
            turned[:, i : i + _TILE] = whole[i : i + _TILE, start:stop].T
        return turned

    step = max(BLOCK_BYTES // (count * tensor.dtype.size), 1) if tensor.step else 0
    return LazyTensor((columns, count), tensor.dtype, read, step, held=tensor.nbytes)


def quantized(name: str, tensor: LazyTensor, how: dict[str, Any] | None) -> Tensors:
    """Quantize a weight to ``weight``, ``scales`` and, if affine, ``biases``, at the first read.

    Args:
        name: the weight's name; other parts of a module are returned as they are.
        tensor: the weight [output, input].
        how: group_size, bits and mode, or None to leave it.
    """
    module, _, part = name.rpartition(".")
    if how is None or part != "weight":
        return {name: tensor}
    made: dict[str, mx.array] = {}

    def make() -> None:
        steps = []
        for block in tensor.blocks():
            step = mx.quantize(as_array(block, tensor.dtype), **how)
            mx.eval(step)
            steps.append(step)
            del block
        parts = ("weight", "scales", "biases")[: len(steps[0])]
        for i, key in enumerate(parts):
            made[key] = mx.concatenate([step[i] for step in steps])
            mx.eval(made[key])

    def reader(key: str) -> Callable[[int, int], mx.array]:
        def read(start: int, stop: int) -> mx.array:
            if key not in made:
                make()
            return made.pop(key)

        return read

    sample = mx.quantize(mx.zeros((1, tensor.shape[-1]), tensor.dtype), **how)
    count = len_of(tensor.shape)
    held = sum(array.nbytes for array in sample) * count + tensor.held
    return {
        f"{module}.{key}": LazyTensor((count, array.shape[-1]), array.dtype, reader(key), held=held)
        for key, array in zip(("weight", "scales", "biases"), sample, strict=False)
    }
