"""The checkpoint directory: opening and checking it, and writing a new one.

CHECKPOINT.md describes the format.
"""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from mlx.utils import tree_flatten
from mlx_lm.utils import load_config, make_shards, save_config

from .config import CONFIG_FILE, IFPConfig
from .errors import IFPError
from .structure import (
    FFN,
    PROJECTIONS,
    build_model,
    evaluate,
    find_body,
    find_ffns,
    quantization_of,
    settle,
    with_width,
)
from .tensor_files import (
    FLOATS,
    LazyTensor,
    TensorInfo,
    check_tensors,
    read_header,
    write_safetensors,
)

TRUNK = "model"  # mlx-lm's own stem: `mlx_lm.load` then fails on the missing FFN, loudly
CHANNELS = "channels"
PREDICTOR = "predictor"
PREDICTOR_STEM = f"{PREDICTOR}/model"
HEAD_STEM = f"{PREDICTOR}/head"
HEAD_FILE = f"{HEAD_STEM}.safetensors"
STATIC_FILE = "static.safetensors"
TOKENIZER_PATTERNS = ["*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
HUB_PATTERNS = [*TOKENIZER_PATTERNS, "*.safetensors"]

Expected = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]


@dataclass
class Checkpoint:
    """An opened checkpoint: everything known about it from configs and headers, no weights yet.

    Attributes:
        path: the directory.
        config: the LLM's mlx-lm config.
        ifp: the content of ``ifp_config.json``.
        ffns: the L FFNs, in order.
        trunk: name -> tensor of all of the LLM but its FFN channels.
        channels: name -> tensor of the FFN channels; each is [d_ffn, ...], down_proj transposed.
        predictor_config: the predictor backbone's mlx-lm config, or None.
        predictor: name -> tensor of the backbone.
        head: name -> tensor of the predictor's head.
        static: name -> tensor of the static scores.
        digest: sha256 over the configs, which hold the sha256 of all weights.
    """

    path: Path
    config: dict[str, Any]
    ifp: IFPConfig
    ffns: list[FFN]
    trunk: dict[str, TensorInfo]
    channels: dict[str, TensorInfo]
    predictor_config: dict[str, Any] | None
    predictor: dict[str, TensorInfo]
    head: dict[str, TensorInfo]
    static: dict[str, TensorInfo]
    digest: str

    @property
    def d_ffn(self) -> int:
        """FFN channels of each layer."""
        return self.ffns[0].d_ffn

    @property
    def selectors(self) -> list[str]:
        """The selectors this checkpoint can be used with."""
        return ["predictor"] * bool(self.head) + ["activations"] + ["static"] * bool(self.static)


def expanded(path: str | Path) -> Path:
    """A path with ``~`` resolved; of a user that does not exist it stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def resolve(path_or_hf_repo: str | Path, revision: str | None = None) -> Path:
    """The directory of a checkpoint: a local one, or a hub repository that is downloaded.

    Raises:
        IFPError: if there is neither.
    """
    path = expanded(path_or_hf_repo)
    if path.is_dir():
        return path
    if path.exists():
        raise IFPError(f"{path} is a file, not a checkpoint directory.")
    try:
        return Path(
            snapshot_download(str(path_or_hf_repo), revision=revision, allow_patterns=HUB_PATTERNS)
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise IFPError(
            f"{path_or_hf_repo} is not a directory, and it could not be fetched from the "
            f"Hugging Face hub ({reason})"
        ) from error


def open_checkpoint(path: Path) -> Checkpoint:
    """Read configs and headers and check that they fit together.

    Raises:
        IFPError: one line that names the file and the tensor.
    """
    path = Path(path)
    if not (path / CONFIG_FILE).is_file():
        what = "a model that is not converted" if (path / "config.json").is_file() else "no model"
        raise IFPError(
            f"{path} has no {CONFIG_FILE}: it is {what}. "
            "Make a checkpoint with: mlx_ifp.convert --model MODEL --mlx-path OUT"
        )
    ifp = IFPConfig.load(path / CONFIG_FILE)
    config = _load_llm_config(path)
    files = {name: _checked_header(path, name, record) for name, record in ifp.files.items()}

    def tensors(prefix: str) -> dict[str, TensorInfo]:
        chosen: dict[str, TensorInfo] = {}
        for name, header in files.items():
            if name.startswith(prefix):
                chosen |= header
        return chosen

    trunk, channels = tensors(TRUNK), tensors(CHANNELS)
    model = _build_llm(config, trunk)
    ffns = find_ffns(model)
    check_tensors(path, trunk, trunk_tensors(model, ffns))
    check_tensors(path, channels, channel_tensors(config, ffns, channels))
    _check_k(path, ifp, ffns)
    predictor_config = None
    if ifp.head is not None:
        predictor_config = _load_llm_config(path / PREDICTOR)
        _check_predictor(path, ifp, predictor_config, ffns, tensors(PREDICTOR_STEM),
                         files.get(HEAD_FILE, {}))  # fmt: skip
    static = files.get(STATIC_FILE, {})
    if static or ifp.selector == "static":
        check_tensors(
            path / STATIC_FILE, static, {"scores": ((len(ffns), ffns[0].d_ffn), ("F32",))}
        )
    return Checkpoint(
        path=path,
        config=config,
        ifp=ifp,
        ffns=ffns,
        trunk=trunk,
        channels=channels,
        predictor_config=predictor_config,
        predictor=tensors(PREDICTOR_STEM),
        head=files.get(HEAD_FILE, {}),
        static=static,
        digest=_digest(path),
    )


def _load_llm_config(path: Path) -> dict[str, Any]:
    try:
        config = load_config(path)
    except FileNotFoundError as error:
        raise IFPError(f"{path / 'config.json'}: the file is missing.") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise IFPError(f"{path / 'config.json'}: not valid JSON ({error}).") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise IFPError(f"{path / 'config.json'}: model_type is missing.")
    return config


def _checked_header(path: Path, name: str, record: dict[str, Any]) -> dict[str, TensorInfo]:
    header = read_header(path / name)
    size = (path / name).stat().st_size
    if size != record["bytes"]:
        raise IFPError(
            f"{path / name}: {size:,} bytes, but {CONFIG_FILE} says {record['bytes']:,}; "
            "the file is truncated or from another checkpoint."
        )
    return header


def _digest(path: Path) -> str:
    """The weights' own digests are part of ``ifp_config.json``."""
    digest = hashlib.sha256()
    for file in (path / CONFIG_FILE, path / "config.json", path / PREDICTOR / "config.json"):
        digest.update(file.read_bytes() if file.exists() else b"none")
    return digest.hexdigest()


def _build_llm(config: dict[str, Any], trunk: dict[str, TensorInfo]) -> nn.Module:
    model = build_model(config, _quantized(trunk))
    settle(model, {name: tensor.shape for name, tensor in trunk.items()})
    return model


def _quantized(tensors: dict[str, TensorInfo]) -> set[str]:
    return {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}


def trunk_tensors(model: nn.Module, ffns: list[FFN]) -> Expected:
    """What the trunk of a model is made of: name -> (shape, allowed dtypes).

    It is every parameter but the FFN's, and the down projection's bias, which no channel owns.
    """
    prefixes = tuple(f"{ffn.path}." for ffn in ffns)
    biases = {f"{ffn.path}.down_proj.bias" for ffn in ffns if "down_proj" in ffn.biases}
    return {
        name: (tuple(array.shape), _allowed(array))
        for name, array in tree_flatten(model.parameters())
        if not name.startswith(prefixes) or name in biases
    }


def backbone_tensors(model: nn.Module) -> Expected:
    """What a predictor's backbone is made of: the model without its output layer."""
    prefix = f"{find_body(model)}."
    return {
        name: (tuple(array.shape), _allowed(array))
        for name, array in tree_flatten(model.parameters())
        if name.startswith(prefix)
    }


def _allowed(array: mx.array) -> tuple[str, ...]:
    if array.dtype == mx.uint32:
        return ("U32",)
    return ("U8",) if array.dtype == mx.uint8 else FLOATS


def channel_tensors(
    config: dict[str, Any], ffns: list[FFN], found: dict[str, TensorInfo]
) -> Expected:
    """What the channels are made of: name -> (shape, allowed dtypes).

    A projection is quantized if its ``scales`` are there; how is in the LLM's config.
    """
    expected: Expected = {}
    for ffn in ffns:
        for projection in PROJECTIONS:
            name = f"{ffn.path}.{projection}"
            rows, width = ffn.d_ffn, ffn.hidden_size
            if f"{name}.scales" in found:
                how = quantization_of(config, ffn.module_path(projection))
                groups = width // how["group_size"]
                expected[f"{name}.weight"] = ((rows, width * how["bits"] // 32), ("U32",))
                if how["mode"] == "affine":
                    expected[f"{name}.scales"] = ((rows, groups), FLOATS)
                    expected[f"{name}.biases"] = ((rows, groups), FLOATS)
                else:
                    expected[f"{name}.scales"] = ((rows, groups), ("U8",))
            else:
                expected[f"{name}.weight"] = ((rows, width), FLOATS)
            if projection in ffn.biases and projection != "down_proj":
                expected[f"{name}.bias"] = ((rows,), FLOATS)
    return expected


def _check_k(path: Path, ifp: IFPConfig, ffns: list[FFN]) -> None:
    if isinstance(ifp.k, list) and len(ifp.k) != len(ffns):
        raise IFPError(f"{path / CONFIG_FILE}: k has {len(ifp.k)} entries for {len(ffns)} layers.")
    if max(ifp.k if isinstance(ifp.k, list) else [ifp.k]) > ffns[0].d_ffn:
        raise IFPError(
            f"{path / CONFIG_FILE}: k must be between 1 and d_ffn = {ffns[0].d_ffn}, not {ifp.k}."
        )


def _check_predictor(
    path: Path,
    ifp: IFPConfig,
    config: dict[str, Any],
    ffns: list[FFN],
    backbone: dict[str, TensorInfo],
    head: dict[str, TensorInfo],
) -> None:
    """The backbone is a stock mlx-lm model without its output layer; the head is ours."""
    check_tensors(
        path / PREDICTOR, backbone, backbone_tensors(build_model(config, _quantized(backbone)))
    )
    widths = ifp.head.widths
    scores = len(ffns) * ffns[0].d_ffn
    if widths[-1] != scores:
        raise IFPError(
            f"{path / CONFIG_FILE}: the head gives {widths[-1]} scores, but {len(ffns)} layers of "
            f"{ffns[0].d_ffn} channels need {scores}."
        )
    expected = {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        expected[f"linear{i + 1}.weight"] = ((outputs, inputs), FLOATS)
        if ifp.head.biases[i]:
            expected[f"linear{i + 1}.bias"] = ((outputs,), FLOATS)
    check_tensors(path / HEAD_FILE, head, expected)


def load_tensors(tensors: dict[str, TensorInfo], dtype: mx.Dtype | None) -> dict[str, mx.array]:
    """Lazy arrays of all the tensors, floats cast to ``dtype`` if one is given."""
    arrays: dict[str, mx.array] = {}
    for path in sorted({tensor.path for tensor in tensors.values()}):
        arrays |= {k: v for k, v in mx.load(str(path)).items() if k in tensors}
    return {name: cast(array, dtype) for name, array in arrays.items()}


def cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """Cast a float array; packed weights and 8-bit scales stay what they are."""
    if dtype is None or not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array.astype(dtype)


def load_backbone(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> nn.Module:
    """The predictor's backbone, a stock mlx-lm model; its output layer, if any, stays unset."""
    model = build_model(checkpoint.predictor_config, _quantized(checkpoint.predictor))
    arrays = load_tensors(checkpoint.predictor, dtype)
    model.load_weights(list(arrays.items()), strict=False)
    evaluate(model, prefix=f"{find_body(model)}.")
    return model


def load_trunk(checkpoint: Checkpoint, width: int, dtype: mx.Dtype | None) -> nn.Module:
    """A stock mlx-lm model with the trunk's arrays in memory and FFNs that are still to be set.

    Args:
        checkpoint (Checkpoint): an opened checkpoint.
        width (int): the ``intermediate_size`` that the model reports.
        dtype (mx.Dtype): cast floats to this type; None keeps them.
    """
    model = _build_llm(with_width(checkpoint.config, width), checkpoint.trunk)
    arrays = load_tensors(checkpoint.trunk, dtype)
    model.load_weights(list(arrays.items()), strict=False)
    mx.eval(list(arrays.values()))
    evaluate(model, leave_out=tuple(ffn.path for ffn in checkpoint.ffns))
    return model


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    ifp: IFPConfig,
    tensors: dict[str, dict[str, mx.array | LazyTensor]],
    progress: Callable[[int], Any] = lambda _: None,
) -> None:
    """Write configs and tensors into a directory made by :func:`~mlx_ifp.atomic.new_directory`.

    Args:
        directory (Path): where to; it holds the tokenizer already, or gets it later.
        config (dict): the LLM's mlx-lm config.
        ifp (IFPConfig): its ``files`` are filled in here.
        tensors (dict): file stem (``model``, ``channels``, ``predictor/model``,
            ``predictor/head``, ``static``) -> name -> array or LazyTensor; emptied on the way.
        progress (Callable): called with the bytes of each block written.
    """
    for stem in list(tensors):
        arrays = tensors.pop(stem)
        shards = make_shards(arrays)
        # The caller may still hold this dict, and with it every array.
        arrays.clear()
        for i in range(len(shards)):
            name = f"{stem}.safetensors"
            if len(shards) > 1:
                name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (directory / name).parent.mkdir(exist_ok=True)
            ifp.files[name] = write_safetensors(directory / name, shards[i], progress)
    save_config(dict(config), directory / "config.json")
    (directory / CONFIG_FILE).write_text(ifp.to_json())
