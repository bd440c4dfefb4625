"""What a checkpoint's tensor files must hold: name -> (shape, allowed dtypes)."""

import itertools
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import IFPError
from ..files.tensor_files import FLOATS, TensorInfo
from ..llm.build import quantization_of
from ..llm.ffn import FFN, PROJECTIONS
from ..llm.modules import find_body, find_embedding
from .config import HeadConfig
from .rows import stored_modules

Expected = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
# The predictor's config.json lists the head's modules under this path, beside the backbone's.
HEAD_MODULE = "head"


def quantized_modules(tensors: dict[str, TensorInfo]) -> set[str]:
    """Paths of the modules whose weights are quantized: those with ``scales``."""
    return {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}


def parameters_of(model: nn.Module) -> list[tuple[str, mx.array]]:
    """Names and arrays of a model's parameters, in order."""
    return cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))


def trunk_tensors(model: nn.Module, ffns: list[FFN]) -> Expected:
    """List what the trunk of a model is made of: name -> (shape, allowed dtypes).

    The trunk has every parameter outside of the FFNs, and the bias of the down projection, which
    belongs to no channel.
    """
    prefixes = tuple(f"{ffn.path}." for ffn in ffns)
    biases = {f"{ffn.path}.down_proj.bias" for ffn in ffns if "down_proj" in ffn.biases}
    return {
        name: (tuple(array.shape), _allowed(array))
        for name, array in parameters_of(model)
        if not name.startswith(prefixes) or name in biases
    }


def backbone_tensors(model: nn.Module, own_embedding: bool = True) -> Expected:
    """List what a predictor's backbone is made of: the model without its output layer.

    Args:
        model (nn.Module): the backbone.
        own_embedding (bool): False leaves out its embedding, because the LLM's is used instead.

    Raises:
        IFPError: if it has no body, or does not have the one embedding that shall be left out.
    """
    prefix = f"{find_body(model)}."
    shared = () if own_embedding else (f"{find_embedding(model)}.",)
    return {
        name: (tuple(array.shape), _allowed(array))
        for name, array in parameters_of(model)
        if name.startswith(prefix) and not name.startswith(shared)
    }


def _allowed(array: mx.array) -> tuple[str, ...]:
    if array.dtype == mx.uint32:
        return ("U32",)
    return ("U8",) if array.dtype == mx.uint8 else FLOATS


def channel_tensors(
    config: dict[str, Any], ffns: list[FFN], found: dict[str, TensorInfo]
) -> Expected:
    """List what the channels are made of: name -> (shape, allowed dtypes).

    A projection is quantized if its ``scales`` are there; the LLM's config says how.
    """
    expected: Expected = {}
    modules = stored_modules(ffns)
    for ffn in ffns:
        for projection in PROJECTIONS:
            name = f"{ffn.path}.{projection}"
            how = None
            if f"{name}.scales" in found:
                how = quantization_of(config, modules[name])
            expected |= _matrix(name, ffn.d_ffn, ffn.hidden_size, how)
            if projection in ffn.biases and projection != "down_proj":
                expected[f"{name}.bias"] = ((ffn.d_ffn,), FLOATS)
    return expected


def head_tensors(
    head: HeadConfig, config: dict[str, Any], found: dict[str, TensorInfo]
) -> Expected:
    """List what the predictor's head is made of: name -> (shape, allowed dtypes).

    A Linear is quantized if its ``scales`` are there; the backbone's config says how.

    Raises:
        IFPError: if the config does not tell, or names another mode than affine.
    """
    expected: Expected = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(head.widths)):
        name = f"linear{i + 1}"
        how = head_quantization(config, name) if f"{name}.scales" in found else None
        expected |= _matrix(name, outputs, inputs, how)
        if head.biases[i]:
            expected[f"{name}.bias"] = ((outputs,), FLOATS)
    return expected


def head_quantization(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Find group size and bits of a quantized Linear of the head, such as ``linear2``.

    Args:
        config (dict): the backbone's config, in which the module is named ``head.linear2``.
        name (str): the Linear's name.

    Raises:
        IFPError: if the config does not tell, or names another mode than affine.
    """
    file = "predictor/config.json"
    how = quantization_of(config, f"{HEAD_MODULE}.{name}", file)
    if how["mode"] != "affine":
        raise IFPError(
            f"{file}: {HEAD_MODULE}.{name} has the quantization mode "
            f"{how['mode']!r}; the head's can only be affine."
        )
    return how


def _matrix(name: str, rows: int, width: int, how: dict[str, Any] | None) -> Expected:
    """A weight [rows, width], or what stands for it when it is quantized along its width."""
    if how is None:
        return {f"{name}.weight": ((rows, width), FLOATS)}
    groups = (rows, width // how["group_size"])
    affine = how["mode"] == "affine"
    expected: Expected = {
        f"{name}.weight": ((rows, width * how["bits"] // 32), ("U32",)),
        f"{name}.scales": (groups, FLOATS if affine else ("U8",)),
    }
    if affine:
        expected[f"{name}.biases"] = (groups, FLOATS)
    return expected


def check_tensors(
    where: Path,
    found: dict[str, TensorInfo],
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]],
) -> None:
    """Compare tensors with what they must be: name -> (shape, allowed dtypes).

    Raises:
        IFPError: if a tensor is missing, extra or wrong; the message names the first and the file.
    """
    for name, (shape, dtypes) in expected.items():
        if name not in found:
            raise IFPError(f"{where}: the tensor {name} is missing.")
        tensor = found[name]
        if tensor.shape != shape:
            raise IFPError(f"{tensor.path}: {name} has the shape {tensor.shape}, expected {shape}.")
        if tensor.dtype not in dtypes:
            raise IFPError(
                f"{tensor.path}: {name} has the type {tensor.dtype}, "
                f"expected {' or '.join(dtypes)}."
            )
    for name in sorted(found.keys() - expected.keys()):
        raise IFPError(f"{found[name].path}: the tensor {name} does not belong to this model.")
