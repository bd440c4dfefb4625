"""What a checkpoint's tensors are stored in: cast, turned and quantized, as they are written."""

import contextlib
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.convert import MODEL_CONVERSION_DTYPES, QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.utils import quantize_model

from mlx_ifp.errors import IFPError
from mlx_ifp.expected import HEAD_MODULE
from mlx_ifp.structure import FFN, PROJECTIONS, build_model, get_module, linear
from mlx_ifp.tensor_files import BLOCK_BYTES, LazyTensor, len_of

from .source_files import buffers

DTYPES = tuple(MODEL_CONVERSION_DTYPES)
RECIPES = tuple(QUANT_RECIPES)
# mlx-lm's, of the mode affine.
DEFAULT_GROUP_SIZE = 64

Tensors = dict[str, LazyTensor]
# Rows that a transposition turns at once: measured 1.5 GB/s, 64 rows 0.7, all rows 0.35.
_TILE = 16


@dataclass(frozen=True)
class Precision:
    """How to store a model; the fields are the options of ``mlx_lm.convert``.

    Attributes:
        dtype: of what is not quantized; None keeps it.
        quantize: whether to quantize.
        bits, group_size: None takes mlx-lm's default of the mode.
        mode: affine, mxfp4, nvfp4 or mxfp8.
        recipe: one of mlx-lm's mixed recipes, or None.
    """

    dtype: str | None = None
    quantize: bool = False
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | None = None

    def check(self) -> None:
        """Raises IFPError if the options contradict one another."""
        if self.recipe is not None and self.mode != "affine":
            raise IFPError("--quant-predicate needs --q-mode affine.")
        if any(n is not None and n < 1 for n in (self.bits, self.group_size)):
            raise IFPError("Bits and group sizes are numbers above 0.")
        given = self.bits or self.group_size or self.mode != "affine" or self.recipe
        if given and not self.quantize:
            raise IFPError("--q-bits, --q-group-size, --q-mode and --quant-predicate need -q.")


def quantize_config(
    config: dict[str, Any], ffns: list[FFN], precision: Precision
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """Which modules mlx-lm would quantize, and how; no weight is touched.

    Down projections are judged as they are stored: a channel is a row.

    Args:
        config (dict): of mlx-lm's model.
        ffns (list): its FFNs; none for a predictor's backbone, which stays as mlx-lm has it.
        precision (Precision): without ``quantize`` nothing is.

    Returns:
        tuple: the config with ``quantization``; module path -> group_size, bits and mode; and
        what the user should know.
    """
    if not precision.quantize:
        return config, {}, []
    if "quantization" in config:
        raise IFPError("The model is quantized already; leave out -q, or convert the original.")
    network = build_model(config)
    for ffn in ffns:
        module = get_module(network, ffn.path)
        module.down_proj = linear(module.down_proj.weight.T, module.down_proj.get("bias"))
    group_size = precision.group_size
    predicate = None
    if precision.recipe is not None:
        group_size = group_size or DEFAULT_GROUP_SIZE
        predicate = mixed_quant_predicate_builder(precision.recipe, network, group_size)
    try:
        # mlx-lm prints its summary; stdout is for results.
        with contextlib.redirect_stdout(sys.stderr):
            network, config = quantize_model(
                network,
                copy.deepcopy(config),
                group_size,
                precision.bits,
                mode=precision.mode,
                quant_predicate=predicate,
            )
    except (ValueError, RuntimeError) as error:
        raise IFPError(f"The model cannot be quantized so: {error}") from error
    plan = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in network.named_modules()
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    }
    left = [ffn for ffn in ffns if ffn.module_path("down_proj") not in plan]
    notes = []
    if left:
        notes.append(
            f"The FFN of {len(left)} layers stays unquantized: the hidden size "
            f"{left[0].hidden_size} is no multiple of the group size."
        )
    return config, plan, notes


def quantize_head(
    config: dict[str, Any], widths: list[int], precision: Precision
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[str]]:
    """The same for a predictor's head; a Linear whose input is no multiple of the groups is left.

    Args:
        config (dict): the backbone's.
        widths (list): of the head's Linears.
        precision (Precision): without ``quantize`` nothing is; the mode is affine.
    """
    how: dict[str, dict[str, Any]] = {}
    notes = []
    if not precision.quantize:
        return config, how, notes
    precision.check()
    one = {"group_size": precision.group_size, "bits": precision.bits, "mode": "affine"}
    for i, width in enumerate(widths[:-1], 1):
        if width % precision.group_size:
            notes.append(
                f"linear{i} of the predictor's head stays unquantized: its input {width} is no "
                f"multiple of the group size {precision.group_size}."
            )
            continue
        try:
            mx.quantize(mx.zeros((1, width)), **one)
        except ValueError as error:
            raise IFPError(f"The predictor's head cannot be quantized so: {error}") from error
        how[f"linear{i}"] = one
    return name_head_modules(config, how), how, notes


def name_head_modules(config: dict[str, Any], how: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The backbone's config with the quantization of the head's Linears, by name."""
    if not how:
        return config
    modules = {f"{HEAD_MODULE}.{name}": dict(one) for name, one in how.items()}
    return config | {
        "quantization": next(iter(how.values())) | config.get("quantization", {}) | modules
    }


def split_model(
    network: nn.Module,
    tensors: Tensors,
    ffns: list[FFN],
    plan: dict[str, dict[str, Any]],
    dtype: str | None,
) -> tuple[Tensors, Tensors]:
    """A model's tensors as a checkpoint has them: trunk, and channels as rows.

    Args:
        network (nn.Module): mlx-lm's model, for its ``cast_predicate``.
        tensors (dict): mlx-lm's names -> tensors; emptied on the way.
        ffns (list): its FFNs; with none, all is trunk.
        plan (dict): module path -> how to quantize it.
        dtype (str): cast floats to this type; None keeps them.
    """
    keeps = getattr(network, "cast_predicate", lambda _: True)
    trunk: Tensors = {}
    channels: Tensors = {}
    owners = {ffn.module_path(projection): ffn for ffn in ffns for projection in PROJECTIONS}
    # What is quantized already has been turned: only then do its groups lie inside a row.
    turned = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    for name in sorted(tensors):
        tensor = tensors.pop(name)
        module, _, part = name.rpartition(".")
        ffn = owners.get(module)
        projection = module.rpartition(".")[2]
        if dtype is not None and keeps(name):
            tensor = cast(tensor, getattr(mx, dtype))
        if ffn is None or (projection == "down_proj" and part == "bias"):
            trunk |= quantized(name, tensor, plan.get(module))
            continue
        pieces = {name: tensor}
        if projection == "gate_up_proj":
            prefix = f"{ffn.path}.{{}}.{part}"
            pieces = {
                prefix.format("gate_proj"): rows(tensor, 0, ffn.d_ffn),
                prefix.format("up_proj"): rows(tensor, ffn.d_ffn, 2 * ffn.d_ffn),
            }
        elif projection == "down_proj" and module not in turned:
            pieces = {name: transposed(tensor)}
        for key, piece in pieces.items():
            channels |= quantized(key, piece, plan.get(module))
    return trunk, channels


def as_array(block: mx.array | np.ndarray, dtype: mx.Dtype) -> mx.array:
    """A block of a LazyTensor as an MLX array."""
    return block if isinstance(block, mx.array) else mx.array(block).view(dtype)


def cast(tensor: LazyTensor, dtype: mx.Dtype) -> LazyTensor:
    """Floats in another type; anything else as it is."""
    if tensor.dtype == dtype or not mx.issubdtype(tensor.dtype, mx.floating):
        return tensor

    def read(start: int, stop: int) -> mx.array:
        return as_array(tensor.read(start, stop), tensor.dtype).astype(dtype)

    return LazyTensor(tensor.shape, dtype, read, tensor.step, tensor.held)


def dequantized(parts: Tensors, how: dict[str, Any]) -> LazyTensor:
    """The float weight of a quantized module, made block by block.

    Args:
        parts: ``weight``, ``scales`` and, if affine, ``biases``.
        how: group_size, bits and mode.
    """
    weight, scales = parts["weight"], parts["scales"]
    tensors = [weight, scales, *([parts["biases"]] if "biases" in parts else [])]
    factor = 32 // how["bits"]

    def read(start: int, stop: int) -> mx.array:
        arrays = [as_array(tensor.read(start, stop), tensor.dtype) for tensor in tensors]
        return mx.dequantize(*arrays, **how)

    # MLX dequantizes the modes with 8-bit scales to bfloat16.
    dtype = scales.dtype if how["mode"] == "affine" else mx.bfloat16
    shape = (weight.shape[0], weight.shape[1] * 32 // how["bits"])
    return LazyTensor(shape, dtype, read, max(weight.step // factor, 1))


def rows(tensor: LazyTensor, begin: int, end: int) -> LazyTensor:
    """Some of the rows."""
    return LazyTensor(
        (end - begin, *tensor.shape[1:]),
        tensor.dtype,
        lambda start, stop: tensor.read(begin + start, begin + stop),
        tensor.step,
    )


def transposed(tensor: LazyTensor) -> LazyTensor:
    """A matrix with rows and columns exchanged; it is read whole, and turned block by block."""
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
    """A weight as ``weight``, ``scales`` and, if affine, ``biases``; made once, when first read.

    Args:
        name: of the weight; other parts of a module are returned as they are.
        tensor: [output, input].
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
