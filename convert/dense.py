"""Open a dense model as an mlx-lm model and its tensors, without reading their data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.convert import MODEL_CONVERSION_DTYPES
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_config

from mlx_ifp.checkpoint.config import CONFIG_FILE
from mlx_ifp.checkpoint.directory import token_rows
from mlx_ifp.checkpoint.locate import source_name
from mlx_ifp.errors import IFPError, one_line
from mlx_ifp.files.tensor_files import LazyTensor
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.ffn import FFN, find_ffns
from mlx_ifp.llm.hf_config import buildable, mlx_config
from mlx_ifp.llm.modules import get_module, linear
from mlx_ifp.llm.trial import check_runs

from .layouts.parts import generation_config
from .naming import name_tensors
from .quantized import load_quantized, record_quantization
from .sources.files import open_tensors
from .sources.gguf import load_gguf
from .sources.tokenizer import open_tokenizer


@dataclass
class DenseModel:
    """A dense model and all that belongs to it.

    Attributes:
        network: mlx-lm's model.
        config: its ``config.json``.
        tokenizer: its tokenizer, which is saved beside it.
        source: where it came from, for ``ifp_config.json``.
        tensors: mlx-lm's names -> how to read them.
        ffns: its FFNs.
        token_rows: the rows of its embedding; None if the number is not known.
        extra_files: files that are copied as they are.
        notes: what the user should know about the conversion.
        mapped: the source's tensor names -> mlx-lm's, where they are known.
        skipped: the source's tensor names -> why they are not used.
    """

    network: nn.Module
    config: dict[str, Any]
    tokenizer: TokenizerWrapper
    source: dict[str, Any]
    tensors: dict[str, LazyTensor]
    ffns: list[FFN]
    token_rows: int | None
    extra_files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    mapped: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def load_dense(
    model: str,
    path: Path,
    *,
    dequantize: bool = False,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    scratch: Path | None = None,
) -> DenseModel:
    """Open a dense model without reading its weights into memory.

    Args:
        model (str): the name that the user gave.
        path (Path): a directory of a Hugging Face or mlx-lm model, or a GGUF file.
        dequantize (bool): undo a quantization, as ``mlx_lm.convert -d`` does.
        tokenizer (str): a directory or hub id to take the tokenizer from instead.
        trust_remote_code (bool): let the tokenizer run code of its repository.
        scratch (Path): a directory for temporary files; None for the system's own.

    Raises:
        IFPError: if it is not such a model, is damaged, or cannot be pruned.
    """
    if path.is_file():
        return _load_gguf(path, dequantize, tokenizer, trust_remote_code, scratch)
    with one_line(f"{model} cannot be loaded"):
        config = load_config(path) if (path / "config.json").is_file() else None
    if not path.is_dir() or config is None:
        raise IFPError(f"{model} is no model directory: it has no config.json.")
    config = mlx_config(config)
    if (path / CONFIG_FILE).exists():
        raise IFPError(f"{model} is a checkpoint of mlx_ifp already.")
    # First, because transformers warns about an architecture that it does not know either.
    buildable(config)
    own = open_tokenizer(tokenizer or str(path), trust_remote_code)
    if _is_quantized(path, config):
        network, config = load_quantized(model, path, config)
        dense = _from_network(network, config, own, _source(model), dequantize)
    else:
        dense = _load_floats(model, path, config, own)
    dense.extra_files = generation_config(path)
    return dense


def _load_gguf(
    path: Path,
    dequantize: bool,
    tokenizer: str | None,
    trust_remote_code: bool,
    scratch: Path | None,
) -> DenseModel:
    gguf = load_gguf(path, with_tokenizer=tokenizer is None, scratch=scratch)
    network = build_model(
        gguf.config,
        {name.removesuffix(".scales") for name in gguf.weights if name.endswith(".scales")},
    )
    _load_strictly(network, gguf.weights, path)
    if tokenizer is not None:
        chosen = open_tokenizer(tokenizer, trust_remote_code)
    else:
        chosen = TokenizerWrapper(gguf.tokenizer)
    source = {"model": path.name, "format": "gguf"}
    return _from_network(network, gguf.config, chosen, source, dequantize)


def _load_floats(
    model: str, path: Path, config: dict[str, Any], tokenizer: TokenizerWrapper
) -> DenseModel:
    named = name_tensors(config, open_tensors(path), model)
    return DenseModel(
        named.network,
        named.config,
        tokenizer,
        _source(model),
        named.tensors,
        named.ffns,
        token_rows(named.network),
        notes=named.notes,
        mapped=named.mapped,
        skipped=named.skipped,
    )


def _source(model: str) -> dict[str, Any]:
    return {"model": source_name(model), "format": "safetensors"}


def _is_quantized(path: Path, config: dict[str, Any]) -> bool:
    names = {"quantization", "quantization_config"}
    nested = config.get("text_config") or {}
    return bool(names & (config.keys() | nested.keys())) or (path / "hf_quant_config.json").exists()


def _from_network(
    network: nn.Module,
    config: dict[str, Any],
    tokenizer: TokenizerWrapper,
    source: dict[str, Any],
    dequantize: bool,
) -> DenseModel:
    """Make a DenseModel from a network, which then lets go of the lazy arrays of its weights."""
    if dequantize:
        network = dequantize_model(network)
        for name in ("quantization", "quantization_config"):
            config.pop(name, None)
    else:
        record_quantization(network, config)
    ffns = find_ffns(network)
    check_runs(network)
    notes = _turn_quantized(network, config, ffns)
    rows = token_rows(network)
    tensors = {
        name: LazyTensor.of(array)
        for name, array in dict(tree_flatten(network.parameters())).items()
    }
    # The model lets go of its arrays, so each can be freed as soon as it is written.
    network.update(tree_map(lambda _: mx.array([]), network.parameters()))
    return DenseModel(network, config, tokenizer, source, tensors, ffns, rows, notes=notes)


def _load_strictly(network: nn.Module, weights: dict[str, mx.array], path: Path) -> None:
    with one_line(f"{path}"):
        network.load_weights(list(weights.items()), strict=True)


def dtype_of(config: dict[str, Any]) -> str | None:
    """The type that a config names; ``mlx_lm.convert`` stores floats in it."""
    parts = (config, config.get("text_config") or {})
    names = (part.get(name) for part in parts for name in ("torch_dtype", "dtype"))
    dtype = next((str(name).removeprefix("torch.") for name in names if name), None)
    return dtype if dtype in MODEL_CONVERSION_DTYPES else None


def _turn_quantized(network: nn.Module, config: dict[str, Any], ffns: list[FFN]) -> list[str]:
    """Turn the down projections that are quantized already: their groups lie along the wrong axis.

    Each is dequantized, turned and quantized again in 8 bits. On SmolLM2-135M that changes the
    model by a KL of 0.0007 nats a token; quantizing to 4 bits a second time would change it by
    0.08.
    """
    again = 0
    for ffn in ffns:
        module = get_module(network, ffn.path)
        down = module.down_proj
        if not isinstance(down, nn.QuantizedLinear):
            continue
        weight = mx.dequantize(
            down.weight, down.scales, down.get("biases"), down.group_size, down.bits, down.mode
        )
        how = {"group_size": max(32, down.group_size), "bits": 8, "mode": "affine"}
        if ffn.hidden_size % how["group_size"]:
            module.down_proj = linear(weight, down.get("bias"))
            continue
        module.down_proj = linear(weight.T, down.get("bias")).to_quantized(**how)
        config["quantization"][ffn.module_path("down_proj")] = how
        again += 1
    if not again:
        return []
    return [
        f"The down projections of {again} layers were quantized along d_ffn; they are stored "
        "in 8 bits along the hidden size."
    ]
