"""The layout "split": ``llama/``, ``extractor.pt``, ``mask_head.pt``, ``predictor_meta.json``."""

from pathlib import Path

from mlx_ifp.checkpoint.config import MaskConfig
from mlx_ifp.errors import IFPError

from ..sources.files import PICKLES, open_tensors, read_json
from .parts import (
    Given,
    TrainedModel,
    TrainedPredictor,
    generation_config,
    has_tokenizer,
    read_config,
    take_head,
)

_HEAD = {
    "0.weight": "linear1.weight",
    "0.bias": "linear1.bias",
    "2.weight": "linear2.weight",
    "2.bias": "linear2.bias",
}
# The keys are its trainer's names of the masks, and the values are ours. "soft" keeps the values
# of SoftTopK at inference.
_MASKS = {
    "soft": MaskConfig("sigmoid", 1.0, keep_soft_values=True),
    "st": MaskConfig("topk"),
    "none": MaskConfig("topk"),
}
_FIELDS = {
    "num_layers": int,
    "intermediate_size": int,
    "topk": int,
    "mask_method": str,
    "extractor_config": dict,
}


def is_split(path: Path) -> bool:
    """Whether a directory looks like one of this layout."""
    return (path / "predictor_meta.json").is_file() or (path / "mask_head.pt").is_file()


def _file(path: Path, stem: str) -> Path:
    """Find ``STEM.pt``, or a file of another kind that holds the same."""
    for suffix in (".safetensors", *PICKLES):
        if (path / f"{stem}{suffix}").is_file():
            return path / f"{stem}{suffix}"
    raise IFPError(f"{path / stem}.pt: the file is missing.")


def open_split(path: Path, given: Given) -> TrainedModel:
    """Open a checkpoint of this layout.

    Raises:
        IFPError: if a field or tensor is wrong; the message names it and its file.
    """
    meta_file = path / "predictor_meta.json"
    meta = read_json(meta_file)
    for name, kind in _FIELDS.items():
        if not isinstance(meta.get(name), kind):
            raise IFPError(f"{meta_file}: {name} must be of type {kind.__name__}.")
    method = meta["mask_method"]
    if method not in _MASKS:
        raise IFPError(f"{meta_file}: mask_method must be one of {', '.join(_MASKS)}.")
    llm = path / "llama"
    if not llm.is_dir():
        raise IFPError(f"{llm}: the LLM's directory is missing.")
    keep, notes = given.keep, []
    if keep is None:
        keep = meta["topk"]
        if method == "none":
            keep = meta["intermediate_size"]
            notes.append("mask_method is 'none', dense: k is d_ffn. --keep takes another k.")
    own_tokenizer = str(llm) if has_tokenizer(llm) else None
    head_file = _file(path, "mask_head")
    return TrainedModel(
        layout="split",
        llm=open_tensors(llm),
        llm_config=read_config(given.llm_config or str(llm)),
        predictor=TrainedPredictor(
            backbone=open_tensors(_file(path, "extractor")),
            config=read_config(given.predictor_config)
            or {"model_type": "llama"} | meta["extractor_config"],
            head=take_head(open_tensors(head_file), _HEAD, str(head_file)),
            activation="gelu",
            feature_norm="none",
            tokenizer=given.predictor_tokenizer,
        ),
        mask=_MASKS[method],
        keep=keep,
        layers=meta["num_layers"],
        d_ffn=meta["intermediate_size"],
        tokenizer=given.tokenizer or own_tokenizer,
        extra_files=generation_config(llm),
        notes=notes,
    )
