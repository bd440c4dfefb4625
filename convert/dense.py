"""A dense model -> the tensors of a checkpoint, all of them lazy."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import (
    _download,
    dequantize_model,
    load_model,
    load_tokenizer,
    quantize_model,
)

from mlx_ifp.checkpoint import cast
from mlx_ifp.config import CONFIG_FILE
from mlx_ifp.errors import IFPError
from mlx_ifp.structure import (
    FFN,
    build_model,
    find_ffns,
    get_module,
    linear,
)
from mlx_ifp.tensor_files import check_not_truncated

from .gguf import load_gguf

DTYPES = ("float16", "bfloat16", "float32")


@dataclass
class DenseModel:
    """A dense model whose arrays are lazy, and what belongs to it.

    Attributes:
        model: mlx-lm's, sanitized.
        config: its ``config.json``.
        tokenizer: to be saved beside it.
        source: where it came from, for ``ifp_config.json``.
        extra_files: to be copied as they are.
        ffns: its FFNs.
        notes: what the user should know about the conversion.
    """

    model: nn.Module
    config: dict[str, Any]
    tokenizer: TokenizerWrapper
    source: dict[str, Any]
    extra_files: list[Path] = field(default_factory=list)
    ffns: list[FFN] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ffns = find_ffns(self.model)


def load_dense(
    model: str,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
) -> DenseModel:
    """Open a dense model without reading its weights into memory.

    Args:
        model (str): a directory or hub id of a Hugging Face or mlx-lm model, or a GGUF file.
        revision (str): of a hub repository.
        tokenizer (str): a directory or hub id to take the tokenizer from instead.
        trust_remote_code (bool): let the tokenizer run code of its repository.

    Raises:
        IFPError: if it is not such a model, is damaged, or cannot be pruned.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise IFPError(f"{path} is a file, but neither a model directory nor a .gguf file.")
        gguf = load_gguf(path, with_tokenizer=tokenizer is None)
        network = build_model(
            gguf.config,
            {name.removesuffix(".scales") for name in gguf.weights if name.endswith(".scales")},
        )
        _load_strictly(network, gguf.weights, path)
        own = TokenizerWrapper(gguf.tokenizer) if gguf.tokenizer is not None else None
        chosen = own or _load_tokenizer(tokenizer, trust_remote_code)
        return DenseModel(network, gguf.config, chosen, {"model": path.name, "format": "gguf"})

    with _one_line(model):
        path = _download(model, revision=revision)
    if not path.is_dir() or not (path / "config.json").is_file():
        raise IFPError(f"{model} is no model directory: it has no config.json.")
    if (path / CONFIG_FILE).exists():
        raise IFPError(f"{model} is a checkpoint of mlx_ifp already.")
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise IFPError(f"{model} has no model*.safetensors files; other formats are not read.")
    for file in files:
        check_not_truncated(file)
    with _one_line(model):
        network, config = load_model(path, lazy=True)
    source = {"model": str(model), "format": "safetensors"}
    if revision is not None:
        source["revision"] = revision
    return DenseModel(
        network,
        config,
        _load_tokenizer(tokenizer or str(path), trust_remote_code),
        source,
        extra_files=[f for f in [path / "generation_config.json"] if f.exists()],
    )


def _load_strictly(network: nn.Module, weights: dict[str, mx.array], path: Path) -> None:
    try:
        network.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        raise IFPError(f"{path}: {error}") from error


def _load_tokenizer(path: str, trust_remote_code: bool) -> TokenizerWrapper:
    with _one_line(path):
        return load_tokenizer(path, {"trust_remote_code": trust_remote_code})


@contextlib.contextmanager
def _one_line(model: str) -> Iterator[None]:
    """Errors of mlx-lm, transformers and the hub, said in one line that names the model."""
    try:
        yield
    except IFPError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        StrictDataclassError,
    ) as error:
        text = str(error).strip() or repr(error)
        raise IFPError(f"{model} cannot be loaded: {text.splitlines()[0]}") from error


def set_dtype(dense: DenseModel, dtype: str | None) -> None:
    """Cast the floats as ``mlx_lm.convert`` does: to ``dtype``, or to what the config names."""
    config = dense.config
    text_config = config.get("text_config") or {}
    dtype = dtype or config.get("torch_dtype") or config.get("dtype") or text_config.get("dtype")
    if dtype not in DTYPES:
        return
    keeps = getattr(dense.model, "cast_predicate", lambda _: True)
    target = getattr(mx, dtype)
    dense.model.update(
        tree_map_with_path(
            lambda name, array: cast(array, target) if keeps(name) else array,
            dense.model.parameters(),
        )
    )


def dequantize(dense: DenseModel) -> None:
    """Undo a quantization, as ``mlx_lm.convert -d`` does."""
    dense.model = dequantize_model(dense.model)
    for name in ("quantization", "quantization_config"):
        dense.config.pop(name, None)


def quantize(
    dense: DenseModel, *, bits: int | None, group_size: int | None, mode: str = "affine"
) -> None:
    """Quantize as ``mlx_lm.convert`` does, but the down projections along the hidden size.

    Call it after :func:`channel_major`.
    """
    if "quantization" in dense.config:
        raise IFPError("The model is quantized already; leave out -q, or convert the original.")
    # mlx-lm prints its summary; stdout is for results.
    with contextlib.redirect_stdout(sys.stderr), _one_line(str(dense.source["model"])):
        dense.model, dense.config = quantize_model(
            dense.model, dense.config, group_size, bits, mode=mode
        )
    downs = [get_module(dense.model, ffn.path).down_proj for ffn in dense.ffns]
    left = [ffn for ffn, down in zip(dense.ffns, downs, strict=True) if "scales" not in down]
    if left:
        dense.notes.append(
            f"The FFN of {len(left)} layers stays unquantized: the hidden size "
            f"{left[0].hidden_size} is no multiple of the group size."
        )


def channel_major(dense: DenseModel) -> None:
    """Turn every down projection so that a channel is a row: [d_ffn, hidden size].

    One that is quantized already has its groups along the wrong axis. It is dequantized, turned
    and quantized again, in 8 bits: on SmolLM2-135M that moves the model by a KL of 0.0007 nats a
    token, where 4 bits a second time would move it by 0.08.
    """
    again = 0
    for ffn in dense.ffns:
        module = get_module(dense.model, ffn.path)
        down = module.down_proj
        if not isinstance(down, nn.QuantizedLinear):
            module.down_proj = linear(down.weight.T, down.get("bias"))
            continue
        weight = mx.dequantize(
            down.weight, down.scales, down.get("biases"), down.group_size, down.bits, down.mode
        )
        module.down_proj = linear(weight.T, down.get("bias"))
        how = {"group_size": max(32, down.group_size), "bits": 8, "mode": "affine"}
        if ffn.hidden_size % how["group_size"] == 0:
            module.down_proj = module.down_proj.to_quantized(**how)
            dense.config["quantization"][ffn.module_path("down_proj")] = how
            again += 1
    if again:
        dense.notes.append(
            f"The down projections of {again} layers were quantized along d_ffn; they are stored "
            "in 8 bits along the hidden size."
        )


def take_tensors(dense: DenseModel) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """The tensors of trunk and channels, by the names they have in a checkpoint.

    The model lets go of them, so each can be freed as soon as it is written.
    """
    arrays = dict(tree_flatten(dense.model.parameters()))
    dense.model.update(tree_map(lambda _: mx.array([]), dense.model.parameters()))
    channels: dict[str, mx.array] = {}
    for ffn in dense.ffns:
        for name in sorted(arrays):
            if not name.startswith(f"{ffn.path}.") or name.endswith("down_proj.bias"):
                continue
            projection, part = name.removeprefix(f"{ffn.path}.").split(".")
            array = arrays.pop(name)
            if projection == "gate_up_proj":
                channels[f"{ffn.path}.gate_proj.{part}"] = array[: ffn.d_ffn]
                channels[f"{ffn.path}.up_proj.{part}"] = array[ffn.d_ffn :]
            else:
                channels[name] = array
    return arrays, channels


def save_beside(dense: DenseModel, directory: Path) -> None:
    """Write the tokenizer and copy the files that belong to the model."""
    dense.tokenizer.save_pretrained(str(directory))
    for file in dense.extra_files:
        shutil.copy(file, directory)
