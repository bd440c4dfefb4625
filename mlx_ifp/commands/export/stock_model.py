"""Write a sub-network as a stock mlx-lm directory."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import create_model_card, make_shards, save_config
from tqdm import tqdm

from ...checkpoint.directory import Checkpoint
from ...checkpoint.rows import parts_of, stored_as
from ...checkpoint.weights import load_tensors
from ...errors import IFPError
from ...files.atomic import new_directory, without_path
from ...files.tensor_files import DTYPES, LazyTensor, write_safetensors
from ...files.text import write_text
from ...llm.build import quantization_of
from ...llm.ffn import FFN
from ...selection.selection import Selection, check_selection
from ...subnetwork.channels import ChannelReader
from ...subnetwork.rows import FFNRows, read_layer
from .config import config_of_width
from .gguf import check_gguf, write_gguf

DOWN_BITS = 8


@dataclass
class _Layer:
    """One layer's FFN as mlx-lm stores it; it is made when its first tensor is written.

    Attributes:
        ffn: the FFN of the model that it replaces.
        width: the rows that all layers have; a layer that keeps fewer gets channels of zeros.
        read: returns its rows.
        shapes: names -> (shape, type) of its tensors.
        config: the checkpoint's config, which says how its weights are quantized.
        down: how its down projection is quantized; None if it is not.
        dequantize: whether to undo the quantization of the others.
        made: tensors that are made and not yet written.
    """

    ffn: FFN
    width: int
    read: Callable[[], FFNRows]
    shapes: dict[str, tuple[tuple[int, ...], mx.Dtype]]
    config: dict[str, Any]
    down: dict[str, Any] | None
    dequantize: bool
    made: dict[str, mx.array] = field(default_factory=dict)

    def tensors(self) -> dict[str, LazyTensor]:
        """Its tensors, by mlx-lm's names."""
        return {
            name: LazyTensor(shape, dtype, lambda *_, name=name: self._take(name))
            for name, (shape, dtype) in self.shapes.items()
        }

    def _take(self, name: str) -> mx.array:
        if name not in self.made:
            self.made = self._make()
        return self.made.pop(name)

    def _make(self) -> dict[str, mx.array]:
        rows = self.read()
        arrays = {
            f"{self.ffn.path}.{projection}.{part}": _padded(array, self.width, projection)
            for (projection, part), array in rows.arrays.items()
        }
        name = f"{self.ffn.path}.down_proj"
        weight = _float_weight(arrays, name, self.config, self.ffn.module_path("down_proj"))
        if rows.soft_values is not None:
            soft = mx.pad(rows.soft_values, (0, self.width - rows.soft_values.size))
            weight = (weight * soft[:, None]).astype(weight.dtype)
        arrays |= _stored(name, mx.contiguous(weight.T), self.down)
        if self.dequantize:
            for projection in {n.rsplit(".", 2)[1] for n in arrays} - {"down_proj"}:
                module = f"{self.ffn.path}.{projection}"
                arrays[f"{module}.weight"] = _float_weight(arrays, module, self.config, module)
        mx.eval(list(arrays.values()))
        return arrays


def _padded(array: mx.array, width: int, projection: str) -> mx.array:
    """Add rows of zeros, which change no output, below each part of a fused projection."""
    count = len(stored_as(projection))
    short = width - array.shape[0] // count
    if not short:
        return array
    zeros = [(0, short)] + [(0, 0)] * (array.ndim - 1)
    return mx.concatenate([mx.pad(part, zeros) for part in mx.split(array, count)])


def _float_weight(
    arrays: dict[str, mx.array], module: str, config: dict[str, Any], path: str
) -> mx.array:
    """Return a module's weight as floats; its quantized parts are taken out of the dict."""
    weight = arrays.pop(f"{module}.weight")
    scales = arrays.pop(f"{module}.scales", None)
    if scales is None:
        return weight
    return mx.dequantize(
        weight, scales, arrays.pop(f"{module}.biases", None), **quantization_of(config, path)
    )


def _stored(module: str, weight: mx.array, how: dict[str, Any] | None) -> dict[str, mx.array]:
    if how is None:
        return {f"{module}.weight": weight}
    parts = zip(("weight", "scales", "biases"), mx.quantize(weight, **how), strict=False)
    return {f"{module}.{part}": array for part, array in parts}


def export(
    checkpoint: Checkpoint,
    tokenizer: TokenizerWrapper,
    save_path: str | Path,
    selection: Selection | None = None,
    *,
    dequantize: bool = False,
    gguf: bool = False,
) -> list[str]:
    """Write a sub-network as a stock mlx-lm model of ``intermediate_size`` k.

    Everything keeps the type it is stored in, except for a quantized down projection: mlx-lm's
    groups lie along k, but a checkpoint's lie along the hidden size. So it is quantized again in 8
    bits, or left in floats if k is no multiple of the group size. Soft values become part of the
    weights.

    Args:
        checkpoint (Checkpoint): from :func:`~mlx_ifp.checkpoint.directory.open_checkpoint`.
        tokenizer: the tokenizer of its LLM.
        save_path: the directory to make; it must not exist.
        selection (Selection): which channels to write; None writes all, the dense model.
        dequantize (bool): write floats only.
        gguf (bool): write ``ggml-model-f16.gguf`` too, through mlx-lm.

    Returns:
        list: notes on what could not be kept as it is.

    Raises:
        IFPError: if the selection is of another model, the path exists, mlx-lm has no GGUF of
            this architecture, or mlx-lm would not open what is written; nothing is left behind.
    """
    if selection is not None:
        check_selection(selection, checkpoint.ffns)
        if selection.checkpoint not in ("", checkpoint.digest):
            raise IFPError("The selection was made with another checkpoint.")
    ks = [checkpoint.d_ffn] if selection is None else selection.ks
    width = max(ks)
    config = copy.deepcopy(checkpoint.config)
    if dequantize:
        for name in ("quantization", "quantization_config"):
            config.pop(name, None)
    if gguf:
        check_gguf(config)
    notes = []
    if len(set(ks)) > 1:
        notes.append(f"k differs by layer; layers with fewer than {width} channels get zeros.")
    tensors = _trunk(checkpoint, dequantize)
    reader = ChannelReader(checkpoint.channels)
    again, left = 0, 0
    for i, ffn in enumerate(checkpoint.ffns):
        path = ffn.module_path("down_proj")
        was = _down_quantization(checkpoint, ffn)
        down = None
        if was is not None and not dequantize:
            down = {"group_size": max(32, was["group_size"]), "bits": DOWN_BITS, "mode": "affine"}
            if width % down["group_size"]:
                down = None
            config["quantization"].pop(path, None)
            if down is not None:
                config["quantization"][path] = down
            again, left = again + (down is not None), left + (down is None)
        layer = _Layer(
            ffn,
            width,
            partial(read_layer, reader, checkpoint.ffns, selection, i),
            _shapes(checkpoint, ffn, width, down, dequantize),
            checkpoint.config,
            down,
            dequantize,
        )
        tensors |= layer.tensors()
    if again:
        notes.append(
            f"The down projections of {again} layers are quantized again along k, in {DOWN_BITS} "
            "bits: mlx-lm's groups lie on the other axis."
        )
    if left:
        notes.append(
            f"The down projections of {left} layers are left unquantized: k = {width} is no "
            "multiple of the group size."
        )
    _record_quantized(config, tensors)
    config, more = config_of_width(config, checkpoint.d_ffn, width, tensors)
    notes += more
    save_path = Path(save_path)
    with new_directory(save_path) as directory, without_path(directory, f"{save_path}"):
        _write(directory, dict(sorted(tensors.items())), config)
        tokenizer.save_pretrained(str(directory))
        generation = checkpoint.path / "generation_config.json"
        if generation.exists():
            shutil.copy(generation, directory)
        create_model_card(directory, None)
        if gguf:
            notes += write_gguf(directory, config)
    return notes


def _record_quantized(config: dict[str, Any], tensors: dict[str, LazyTensor]) -> None:
    """Remove modules from a config's quantization that are not quantized in what is written."""
    said = config.get("quantization")
    if isinstance(said, dict):
        config["quantization"] = {
            name: how
            for name, how in said.items()
            if not isinstance(how, dict) or f"{name}.scales" in tensors
        }


def _down_quantization(checkpoint: Checkpoint, ffn: FFN) -> dict[str, Any] | None:
    if f"{ffn.path}.down_proj.scales" not in checkpoint.channels:
        return None
    return quantization_of(checkpoint.config, ffn.module_path("down_proj"))


def _shapes(
    checkpoint: Checkpoint,
    ffn: FFN,
    width: int,
    down: dict[str, Any] | None,
    dequantize: bool,
) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    """Find the shapes and types of a layer's tensors from those of one channel."""
    channels = checkpoint.channels
    one: dict[str, dict[str, mx.array]] = {}
    for (projection, part), names in parts_of(ffn, channels).items():
        info = channels[names[0]]
        row = mx.zeros((1, *info.shape[1:]), DTYPES[info.dtype])
        one.setdefault(projection, {})[f"x.{part}"] = row
    found = {}
    for projection, parts in one.items():
        module = f"{ffn.path}.{projection}"
        if projection == "down_proj":
            weight = _float_weight(parts, "x", checkpoint.config, module)
            parts = _stored("x", mx.zeros((ffn.hidden_size, width), weight.dtype), down)
        else:
            if dequantize:
                parts["x.weight"] = _float_weight(parts, "x", checkpoint.config, module)
            count = width * len(stored_as(projection))
            parts = {n: mx.zeros((count, *a.shape[1:]), a.dtype) for n, a in parts.items()}
        for name, array in parts.items():
            found[f"{module}{name[1:]}"] = (tuple(array.shape), array.dtype)
    return found


def _trunk(checkpoint: Checkpoint, dequantize: bool) -> dict[str, LazyTensor]:
    arrays = load_tensors(checkpoint.trunk, None)
    if dequantize:
        for module in [n.removesuffix(".scales") for n in arrays if n.endswith(".scales")]:
            arrays[f"{module}.weight"] = _float_weight(arrays, module, checkpoint.config, module)
    return {name: LazyTensor.of(arrays.pop(name)) for name in list(arrays)}


def _write(directory: Path, tensors: dict[str, LazyTensor], config: dict[str, Any]) -> None:
    """Write shards, index and config, as mlx-lm saves them."""
    shards = make_shards(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    tensors.clear()
    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="Exporting") as bar:
        for i, shard in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(shard, name)
            write_safetensors(directory / name, shard, bar.update)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=4))
    save_config(config, directory / "config.json")
