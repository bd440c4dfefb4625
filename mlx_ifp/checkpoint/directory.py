"""Open and check a checkpoint directory, and write a new one.

docs/checkpoint.md describes the format.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_config, make_shards, save_config

from ..errors import IFPError, reason_of
from ..files.tensor_files import LazyTensor, TensorInfo, read_header, write_safetensors
from ..llm.build import build_model, settle
from ..llm.ffn import FFN, find_ffns
from ..llm.modules import embedding_shape, find_embedding, get_module
from .config import CONFIG_FILE, HeadConfig, IFPConfig
from .expected import (
    backbone_tensors,
    channel_tensors,
    check_tensors,
    head_tensors,
    quantized_modules,
    trunk_tensors,
)

TRUNK = "model"  # mlx-lm's own stem, so that `mlx_lm.load` fails loudly: FFNs are missing
CHANNELS = "channels"
PREDICTOR = "predictor"
PREDICTOR_STEM = f"{PREDICTOR}/model"
HEAD_STEM = f"{PREDICTOR}/head"
HEAD_FILE = f"{HEAD_STEM}.safetensors"
STATIC_FILE = "static.safetensors"
ORDER_FILE = "order.safetensors"
ORDER_TENSOR = "order"


@dataclass
class Checkpoint:
    """An opened checkpoint: what configs and headers say about it; no weights are read yet.

    Attributes:
        path: the directory.
        config: the LLM's mlx-lm config.
        ifp: the content of ``ifp_config.json``.
        ffns: the L FFNs, in order.
        trunk: name -> tensor of all of the LLM but its FFN channels.
        channels: name -> tensor of the FFN channels; each is [d_ffn, ...], down_proj transposed.
        predictor_config: the predictor backbone's mlx-lm config, or None; also if the backbone is
            the LLM.
        predictor: name -> tensor of the backbone.
        head: name -> tensor of the predictor's head.
        static: name -> tensor of the static scores.
        order: name -> tensor of the order in which channels are stored.
        digest: sha256 over the configs, which hold the sha256 of all weights.
        token_rows, predictor_rows: the rows of the embeddings of LLM and predictor, as in
            :func:`token_rows`.
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
    token_rows: int | None = None
    predictor_rows: int | None = None

    @property
    def d_ffn(self) -> int:
        """FFN channels of each layer."""
        return self.ffns[0].d_ffn

    @property
    def reads_own_state(self) -> bool:
        """Whether it has a predictor whose backbone is the dense LLM."""
        return bool(self.head) and self.ifp.predictor_backbone == "llm"

    @property
    def fitted(self) -> bool:
        """Whether its predictor is one of ``mlx_ifp.fit``: its scores are GRIFFIN's statistic.

        Such a head is a linear map, while one that was trained has a norm before it. The scores of
        a trained one mean nothing but their order.
        """
        head = self.ifp.head
        linear = head is not None and (head.activation, head.feature_norm) == ("none", "none")
        return self.reads_own_state and linear

    @property
    def has_predictor_tokenizer(self) -> bool:
        """Whether the predictor reads with a tokenizer of its own."""
        return not self.reads_own_state and self.ifp.predictor_embedding == "own"

    @property
    def selectors(self) -> list[str]:
        """The selectors this checkpoint can be used with."""
        stored = ["static", "glass"] if self.static else []
        return ["predictor"] * bool(self.head) + ["activations"] + stored

    def checked_selector(self, selector: str) -> str:
        """Return the selector, if the checkpoint has it.

        Raises:
            IFPError: if it does not.
        """
        if selector == "glass" and not self.static:
            raise IFPError(
                f"{self.path} has no prior, which the selector 'glass' needs; convert it with "
                "--prior, or name a task from examples."
            )
        if selector not in self.selectors:
            raise IFPError(
                f"{self.path} has no selector {selector!r}; it has: {', '.join(self.selectors)}."
            )
        return selector


def open_checkpoint(path: Path) -> Checkpoint:
    """Read configs and headers and check that they fit together.

    Raises:
        IFPError: if they do not; the message is one line that names the file and the tensor.
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
    model = build_llm(config, trunk)
    ffns = find_ffns(model)
    check_tensors(path, trunk, trunk_tensors(model, ffns))
    check_tensors(path, channels, channel_tensors(config, ffns, channels))
    _check_k(path, ifp, ffns)
    predictor_config, predictor_rows = None, None
    if ifp.head is not None and ifp.predictor_backbone == "llm":
        _check_own_head(path, ifp.head, ffns, files.get(HEAD_FILE, {}))
    elif ifp.head is not None:
        predictor_config = _load_llm_config(path / PREDICTOR)
        backbone = _check_predictor(path, ifp, predictor_config, model, tensors(PREDICTOR_STEM))
        predictor_rows = token_rows(backbone)
        _check_head(path, ifp.head, predictor_config, ffns, files.get(HEAD_FILE, {}))
    static = files.get(STATIC_FILE, {})
    if static or ifp.selector in ("static", "glass"):
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
        token_rows=token_rows(model),
        predictor_rows=predictor_rows,
    )


def token_rows(model: nn.Module) -> int | None:
    """Count the rows of a model's embedding of tokens; None if it does not have exactly one."""
    try:
        return _embedding(model)[1][0]
    except IFPError:
        return None


def _embedding(model: nn.Module) -> tuple[str, tuple[int, int]]:
    """Find where a model's embedding of tokens is, and its rows and columns."""
    name = find_embedding(model)
    module = get_module(model, name)
    assert isinstance(module, nn.Embedding | nn.QuantizedEmbedding)  # find_embedding finds these
    return name, embedding_shape(module)


def _load_llm_config(path: Path) -> dict[str, Any]:
    try:
        config = load_config(path)
    except FileNotFoundError as error:
        raise IFPError(f"{path / 'config.json'}: the file is missing.") from error
    except Exception as error:
        raise IFPError(f"{path / 'config.json'}: not valid JSON ({reason_of(error)}).") from error
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
    """Hash the configs; the weights count too, as ``ifp_config.json`` has their digests."""
    digest = hashlib.sha256()
    for file in (path / CONFIG_FILE, path / "config.json", path / PREDICTOR / "config.json"):
        digest.update(file.read_bytes() if file.exists() else b"none")
    return digest.hexdigest()


def build_llm(config: dict[str, Any], trunk: dict[str, TensorInfo]) -> nn.Module:
    """Build the LLM's modules; those whose tensors are quantized become quantized modules."""
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
) -> nn.Module:
    """Check the backbone: a stock mlx-lm model without output layer and maybe embedding."""
    backbone = build_model(config, quantized_modules(tensors))
    own = ifp.predictor_embedding == "own"
    if not own:
        _check_shared_embedding(path, llm, backbone)
    check_tensors(path / PREDICTOR, tensors, backbone_tensors(backbone, own))
    return backbone


def _check_shared_embedding(path: Path, llm: nn.Module, backbone: nn.Module) -> None:
    shapes, names = [], []
    for model in (llm, backbone):
        name, shape = _embedding(model)
        shapes.append(shape)
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


def _check_own_head(
    path: Path, head: HeadConfig, ffns: list[FFN], tensors: dict[str, TensorInfo]
) -> None:
    """Check a head that reads the LLM's own hidden state."""
    if head.widths[0] != ffns[0].hidden_size:
        raise IFPError(
            f"{path / CONFIG_FILE}: the head reads {head.widths[0]} values, but the LLM's hidden "
            f"state has {ffns[0].hidden_size}."
        )
    _check_head(path, head, {}, ffns, tensors)


def _with_places(
    path: Path, order: dict[str, TensorInfo], channels: dict[str, TensorInfo], ffns: list[FFN]
) -> dict[str, TensorInfo]:
    """Tell the channels' tensors in which row each channel is."""
    shape = (len(ffns), ffns[0].d_ffn)
    check_tensors(path, order, {ORDER_TENSOR: (shape, ("U32",))})
    arrays = cast(dict[str, mx.array], mx.load(str(path)))
    stored = np.array(arrays[ORDER_TENSOR]).astype(np.int64)
    for layer in range(len(ffns)):
        if not np.array_equal(np.sort(stored[layer]), np.arange(shape[1])):
            raise IFPError(f"{path}: layer {layer} does not hold each channel once.")
    places = {ffn.path: np.argsort(row) for ffn, row in zip(ffns, stored, strict=True)}
    return {
        name: replace(info, places=places[name.rsplit(".", 2)[0]])
        for name, info in channels.items()
    }


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    ifp: IFPConfig,
    tensors: dict[str, dict[str, LazyTensor]] | dict[str, dict[str, mx.array | LazyTensor]],
    progress: Callable[[int], Any] = lambda _: None,
) -> None:
    """Write configs and tensors into a directory of :func:`~mlx_ifp.files.atomic.new_directory`.

    Args:
        directory (Path): where to write; it holds the tokenizer already, or gets it later.
        config (dict): the LLM's mlx-lm config.
        ifp (IFPConfig): its ``files`` are filled in here.
        tensors (dict): file stem (``model``, ``channels``, ``predictor/model``,
            ``predictor/head``, ``static``) -> name -> array or LazyTensor; it is emptied.
        progress (Callable): is called with the bytes of each block that is written.
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
