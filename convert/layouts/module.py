"""The layout "module": one state dict with ``llm.*`` and ``sparsity_predictor.*``."""

import contextlib
from pathlib import Path

from mlx_ifp.checkpoint.config import MaskConfig
from mlx_ifp.errors import IFPError

from ..sources.files import below, open_tensors
from ..sources.tensor import SourceTensor
from .parts import (
    Given,
    TrainedModel,
    TrainedPredictor,
    generation_config,
    read_config,
    take_head,
)

_LLM = "llm."
_PREDICTOR = "sparsity_predictor."
_BACKBONE = "sparsity_predictor.feature_extractor."
_HEAD = {
    "prediction_head1.weight": "linear1.weight",
    "prediction_head1.bias": "linear1.bias",
    "prediction_head2.weight": "linear2.weight",
    "prediction_head2.bias": "linear2.bias",
}


def is_module(path: Path) -> bool:
    """Whether a model's directory has this layout."""
    with contextlib.suppress(IFPError):
        _find_prefix(path, open_tensors(path))
        return True
    return False


def _find_prefix(path: Path, tensors: dict[str, SourceTensor]) -> str:
    """Find what stands before ``llm.`` in every name: nothing, or a wrapper such as ``model.``."""
    for name in sorted(tensors, key=len):
        prefix, found, _ = name.partition(_LLM)
        whole = not prefix or prefix.endswith(".")
        if found and whole and any(n.startswith(prefix + _BACKBONE) for n in tensors):
            return prefix
    some = ", ".join(sorted(tensors)[:3])
    raise IFPError(
        f"{path} is no checkpoint of a known layout (split, module, manifest) and no model: it "
        f"has no {_LLM}* and {_BACKBONE}* but {some}, ..."
    )


def open_module(path: Path, given: Given) -> TrainedModel:
    """Open a checkpoint of this layout; the user must name its configs, tokenizers and k.

    Raises:
        IFPError: if a tensor is wrong; the message names it.
    """
    tensors = open_tensors(path)
    prefix = _find_prefix(path, tensors)
    own = below(tensors, prefix)
    others = {}
    for name in sorted(tensors):
        if not name.startswith(prefix):
            others[name] = f"training state: not below {prefix}"
    for name in sorted(own):
        if not name.startswith((_LLM, _PREDICTOR)):
            raise IFPError(f"{path}: the tensor {prefix}{name} is left over.")
    predictor = below(own, _PREDICTOR)
    head = {name: t for name, t in predictor.items() if not name.startswith("feature_extractor.")}
    return TrainedModel(
        layout="module",
        llm=below(own, _LLM),
        llm_config=read_config(given.llm_config),
        predictor=TrainedPredictor(
            backbone=below(own, _BACKBONE),
            config=read_config(given.predictor_config),
            head=take_head(head, _HEAD, f"{path}: {prefix}{_PREDICTOR[:-1]}"),
            activation="none",
            feature_norm="none",
            tokenizer=given.predictor_tokenizer,
        ),
        mask=MaskConfig("topk"),
        keep=given.keep,
        layers=None,
        d_ffn=None,
        tokenizer=given.tokenizer,
        extra_files=generation_config(given.llm_config),
        others=others,
    )
