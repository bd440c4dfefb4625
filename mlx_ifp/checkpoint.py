"""The checkpoint directory: opening and checking it, and writing a new one.

CHECKPOINT.md describes the format.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from mlx_lm.utils import load_config, make_shards, save_config

from .config import CONFIG_FILE, HeadConfig, IFPConfig
from .errors import IFPError, reason_of
from .expected import (
    backbone_tensors,
    channel_tensors,
    head_tensors,
    quantized_modules,
    trunk_tensors,
)
from .structure import (
    FFN,
    build_model,
    embedding_shape,
    evaluate,
    find_body,
    find_embedding,
    find_ffns,
    get_module,
    set_module,
    settle,
    with_width,
)
from .tensor_files import LazyTensor, TensorInfo, check_tensors, read_header, write_safetensors

TRUNK = "model"  # mlx-lm's own stem: `mlx_lm.load` then fails on the missing FFN, loudly
CHANNELS = "channels"
PREDICTOR = "predictor"
PREDICTOR_STEM = f"{PREDICTOR}/model"
HEAD_STEM = f"{PREDICTOR}/head"
HEAD_FILE = f"{HEAD_STEM}.safetensors"
STATIC_FILE = "static.safetensors"
ORDER_FILE = "order.safetensors"
ORDER_TENSOR = "order"
TOKENIZER_PATTERNS = ["*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
HUB_PATTERNS = [*TOKENIZER_PATTERNS, "*.safetensors"]
# The package's own checkpoint, for those who name none.
DEFAULT_MODEL = Path(__file__).with_name("default_model")


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
        order: name -> tensor of the order in which channels are stored.
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
    order: dict[str, TensorInfo]
    digest: str

    @property
    def d_ffn(self) -> int:
        """FFN channels of each layer."""
        return self.ffns[0].d_ffn

    @property
    def selectors(self) -> list[str]:
        """The selectors this checkpoint can be used with."""
        return ["predictor"] * bool(self.head) + ["activations"] + ["static"] * bool(self.static)


def source_name(model: str | Path) -> str:
    """A source as a checkpoint names it: a hub id, or the last part of a path.

    The rest of a path is nobody else's business, and would make two checkpoints of one model
    differ.
    """
    path = expanded(model)
    return path.resolve().name if path.exists() else str(model)


def expanded(path: str | Path) -> Path:
    """A path with ``~`` resolved; of a user that does not exist it stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def resolve(
    path_or_hf_repo: str | Path | None, revision: str | None = None, *, converted: bool = True
) -> Path:
    """The directory of a checkpoint: a local one, or a hub repository that is downloaded.

    Args:
        path_or_hf_repo: which; None for the package's own.
        revision (str): of a hub repository.
        converted (bool): an ordinary model is refused before its weights are downloaded.

    Raises:
        IFPError: if there is neither.
    """
    if path_or_hf_repo is None:
        if not DEFAULT_MODEL.is_dir():
            raise IFPError(
                f"No model was named, and {DEFAULT_MODEL}, the default, is missing. "
                "Name one with --model, or make one: mlx_ifp.convert --model MODEL --mlx-path OUT"
            )
        return DEFAULT_MODEL
    path = expanded(path_or_hf_repo)
    if path.is_dir():
        return path
    if path.exists():
        raise IFPError(
            f"{path} is a file, not a checkpoint directory. "
            "Make one of it with: mlx_ifp.convert --model FILE --mlx-path OUT"
        )
    try:
        if converted:
            _require_converted(str(path_or_hf_repo), revision)
        return Path(
            snapshot_download(str(path_or_hf_repo), revision=revision, allow_patterns=HUB_PATTERNS)
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise IFPError(
            f"{path_or_hf_repo} is not a directory, and it could not be fetched from the "
            f"Hugging Face hub ({reason_of(error)})"
        ) from error


def _require_converted(repo: str, revision: str | None) -> None:
    try:
        hf_hub_download(repo, CONFIG_FILE, revision=revision)
    except LocalEntryNotFoundError:
        # Without a network nothing is known; the download will say so.
        pass
    except EntryNotFoundError as error:
        raise IFPError(
            f"{repo} has no {CONFIG_FILE}: it is a model that is not converted. "
            f"Make a checkpoint with: mlx_ifp.convert --model {repo} --mlx-path OUT"
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
            f"Make a checkpoint with: mlx_ifp.convert --model {path} --mlx-path OUT"
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
        _check_predictor(path, ifp, predictor_config, model, tensors(PREDICTOR_STEM))
        _check_head(path, ifp.head, predictor_config, ffns, files.get(HEAD_FILE, {}))
    static = files.get(STATIC_FILE, {})
    if static or ifp.selector == "static":
        check_tensors(
            path / STATIC_FILE, static, {"scores": ((len(ffns), ffns[0].d_ffn), ("F32",))}
        )
    order = files.get(ORDER_FILE, {})
    if ifp.channel_order == "stored":
        channels = _with_places(path / ORDER_FILE, order, channels, ffns)
    elif order:
        raise IFPError(f"{path / CONFIG_FILE}: channel_order must be 'stored' with {ORDER_FILE}.")
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
        order=order,
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
    model = build_model(config, quantized_modules(trunk))
    settle(model, {name: tensor.shape for name, tensor in trunk.items()})
    return model


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
    llm: nn.Module,
    tensors: dict[str, TensorInfo],
) -> None:
    """The backbone is a stock mlx-lm model without its output layer, and maybe its embedding."""
    backbone = build_model(config, quantized_modules(tensors))
    own = ifp.predictor_embedding == "own"
    if not own:
        _check_shared_embedding(path, llm, backbone)
    check_tensors(path / PREDICTOR, tensors, backbone_tensors(backbone, own))


def _check_shared_embedding(path: Path, llm: nn.Module, backbone: nn.Module) -> None:
    shapes, names = [], []
    for model in (llm, backbone):
        name = find_embedding(model)
        shapes.append(embedding_shape(get_module(model, name)))
        names.append(f"{name}.weight")
    if shapes[0] != shapes[1]:
        raise IFPError(
            f"{path / PREDICTOR / 'config.json'}: the backbone's {names[1]} is to be the LLM's "
            f"(predictor_embedding is 'llm'), but it needs {shapes[1][0]} tokens of "
            f"{shapes[1][1]} values, and {names[0]} in {path / TRUNK}*.safetensors has "
            f"{shapes[0][0]} of {shapes[0][1]}."
        )


def _check_head(
    path: Path,
    head: HeadConfig,
    config: dict[str, Any],
    ffns: list[FFN],
    tensors: dict[str, TensorInfo],
) -> None:
    scores = len(ffns) * ffns[0].d_ffn
    if head.widths[-1] != scores:
        raise IFPError(
            f"{path / CONFIG_FILE}: the head gives {head.widths[-1]} scores, but {len(ffns)} "
            f"layers of {ffns[0].d_ffn} channels need {scores}."
        )
    check_tensors(path / HEAD_FILE, tensors, head_tensors(head, config, tensors))


def _with_places(
    path: Path, order: dict[str, TensorInfo], channels: dict[str, TensorInfo], ffns: list[FFN]
) -> dict[str, TensorInfo]:
    """The channels' tensors, which know where each channel is."""
    shape = (len(ffns), ffns[0].d_ffn)
    check_tensors(path, order, {ORDER_TENSOR: (shape, ("U32",))})
    stored = np.array(mx.load(str(path))[ORDER_TENSOR]).astype(np.int64)
    for layer in range(len(ffns)):
        if not np.array_equal(np.sort(stored[layer]), np.arange(shape[1])):
            raise IFPError(f"{path}: layer {layer} does not hold each channel once.")
    places = {ffn.path: np.argsort(row) for ffn, row in zip(ffns, stored, strict=True)}
    return {
        name: replace(info, places=places[name.rsplit(".", 2)[0]])
        for name, info in channels.items()
    }


def load_tensors(tensors: dict[str, TensorInfo], dtype: mx.Dtype | None) -> dict[str, mx.array]:
    """Lazy arrays of all the tensors, floats cast to ``dtype`` if one is given.

    Channels come in their own order, however they are stored.
    """
    arrays: dict[str, mx.array] = {}
    for path in sorted({tensor.path for tensor in tensors.values()}):
        arrays |= {k: v for k, v in mx.load(str(path)).items() if k in tensors}
    for name, array in arrays.items():
        if (places := tensors[name].places) is not None:
            arrays[name] = mx.take(array, mx.array(places), axis=0)
    return {name: cast(array, dtype) for name, array in arrays.items()}


def cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """Cast a float array; packed weights and 8-bit scales stay what they are."""
    if dtype is None or not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array.astype(dtype)


def build_backbone(checkpoint: Checkpoint, trunk: nn.Module | None = None) -> nn.Module:
    """The modules of the predictor's backbone, of which no tensor is read.

    Raises:
        ValueError: if it shares the trunk's embedding and there is no trunk.
    """
    model = build_model(checkpoint.predictor_config, quantized_modules(checkpoint.predictor))
    if checkpoint.ifp.predictor_embedding == "llm":
        if trunk is None:
            raise ValueError("The predictor shares the LLM's embedding: the trunk is needed.")
        set_module(model, find_embedding(model), get_module(trunk, find_embedding(trunk)))
    return model


def load_backbone(
    checkpoint: Checkpoint, dtype: mx.Dtype | None, trunk: nn.Module | None = None
) -> nn.Module:
    """The predictor's backbone, a stock mlx-lm model; its output layer, if any, stays unset.

    Args:
        checkpoint (Checkpoint): one that has a predictor.
        dtype (mx.Dtype): cast floats to this type; None keeps them.
        trunk (nn.Module): from :func:`load_trunk`; needed if ``predictor_embedding`` is ``llm``.
            Its embedding module becomes the backbone's.

    Raises:
        ValueError: if it is needed and missing.
    """
    model = build_backbone(checkpoint, trunk)
    arrays = load_tensors(checkpoint.predictor, dtype)
    model.load_weights(list(arrays.items()), strict=False)
    evaluate(model, prefix=f"{find_body(model)}.")
    return model


def build_trunk(checkpoint: Checkpoint, width: int) -> nn.Module:
    """The modules of the LLM, of which no tensor is read; their ``intermediate_size`` is width."""
    return _build_llm(with_width(checkpoint.config, width), checkpoint.trunk)


def load_trunk(checkpoint: Checkpoint, width: int, dtype: mx.Dtype | None) -> nn.Module:
    """A stock mlx-lm model with the trunk's arrays in memory and FFNs that are still to be set.

    Args:
        checkpoint (Checkpoint): an opened checkpoint.
        width (int): the ``intermediate_size`` that the model reports.
        dtype (mx.Dtype): cast floats to this type; None keeps them.
    """
    model = build_trunk(checkpoint, width)
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
