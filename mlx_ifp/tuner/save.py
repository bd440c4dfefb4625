"""Save a trained student as a checkpoint that ``mlx_ifp.load`` opens."""

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import save_config

from ..checkpoint.directory import (
    CHANNELS,
    HEAD_STEM,
    PREDICTOR,
    PREDICTOR_STEM,
    STATIC_FILE,
    TRUNK,
    open_checkpoint,
    write_checkpoint,
)
from ..checkpoint.expected import trunk_tensors
from ..checkpoint.rows import owners_of, to_rows
from ..files.atomic import new_directory
from ..files.tensor_files import cast
from ..llm.ffn import FFN
from ..llm.modules import find_body, share
from .source import Source
from .student import Student


def fused(llm: nn.Module) -> nn.Module:
    """Make a copy in which LoRA's updates are part of the weights."""
    llm = share(llm)
    layers = [(n, m.fuse()) for n, m in llm.named_modules() if isinstance(m, LoRALinear)]
    if layers:
        llm.update_modules(tree_unflatten(layers))
    return llm


def channel_rows(llm: nn.Module, ffns: list[FFN]) -> dict[str, mx.array]:
    """Lay out the FFNs as a checkpoint does: every channel is a row, so down_proj is transposed."""
    owners = owners_of(ffns)
    rows: dict[str, mx.array] = {}
    for name, array in dict(tree_flatten(llm.parameters())).items():
        ffn = owners.get(name.rpartition(".")[0])
        if ffn is not None:
            rows |= to_rows(ffn, name, array)
    return rows


def save_student(
    student: Student,
    source: Source,
    path: str | Path,
    *,
    dtype: mx.Dtype,
    predictor_config: dict[str, Any] | None = None,
    predictor_tokenizer: TokenizerWrapper | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint, either completely or not at all.

    Args:
        student (Student): what was trained.
        source (Source): what it was made of.
        path: a directory that does not exist.
        dtype (mx.Dtype): type of the floats.
        predictor_config (dict): the backbone's mlx-lm config.
        predictor_tokenizer: the predictor's, if it is not the LLM's.
        training (dict): how it was trained; kept in ``ifp_config.json``.

    Raises:
        IFPError: if the path exists.
    """
    llm = fused(student.llm)
    ifp = copy.deepcopy(student.ifp)
    ifp.source = {
        "model": source.name,
        "format": "mlx_ifp.train",
        "mlx": mx.__version__,  # type: ignore[attr-defined]  # MLX's stubs lack it.
        "mlx_lm": version("mlx_lm"),
        "mlx_ifp": version("mlx_ifp"),
        "training": training or {},
    }
    everything = dict(tree_flatten(llm.parameters()))
    tensors = {
        TRUNK: {name: everything[name] for name in trunk_tensors(llm, source.ffns)},
        CHANNELS: channel_rows(llm, source.ffns),
    }
    if student.static is None:
        prefix = f"{find_body(student.backbone)}."
        body = dict(tree_flatten(student.backbone.parameters()))
        tensors[PREDICTOR_STEM] = {n: a for n, a in body.items() if n.startswith(prefix)}
        tensors[HEAD_STEM] = {
            f"linear{i + 1}.{part}": array
            for i, layer in enumerate(student.head.linears)
            for part, array in layer.parameters().items()
        }
    tensors = {stem: {n: cast(a, dtype) for n, a in t.items()} for stem, t in tensors.items()}
    if student.static is not None:
        tensors[Path(STATIC_FILE).stem] = {"scores": student.static}
    with new_directory(Path(path)) as directory:
        if student.static is None:
            assert predictor_config is not None and predictor_tokenizer is not None
            (directory / PREDICTOR).mkdir()
            save_config(dict(predictor_config), directory / PREDICTOR / "config.json")
            if ifp.predictor_embedding == "own":
                predictor_tokenizer.save_pretrained(directory / PREDICTOR)
        source.tokenizer.save_pretrained(directory)
        write_checkpoint(directory, source.config, ifp, tensors)
        open_checkpoint(directory)
