"""Make a new sparsity predictor from a pretrained model, or from the LLM's own first layers."""

import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.config import HeadConfig
from ..checkpoint.tokenizers import load_predictor_tokenizer
from ..errors import IFPError
from ..llm.build import build_model
from ..llm.modules import find_body, find_embedding, get_module, set_module
from ..llm.trial import check_runs
from ..selectors.predictor import PredictorHead, load_predictor
from .source import TRAINED_IN, Source, load_source

HEAD_WIDTH = 128  # the paper's, section 3.1


@dataclass
class PredictorStart:
    """A predictor to be trained.

    Attributes:
        backbone: an mlx-lm model. If it has the LLM's embedding, an empty module stands there.
        config: its mlx-lm config.
        head: the head, with random weights that give scores near 0.
        embedding: where in the backbone the LLM's embedding is put, or "" if it has its own.
        tokenizer: the tokenizer of the text that it reads.
    """

    backbone: nn.Module
    config: dict[str, Any]
    head: PredictorHead
    embedding: str
    tokenizer: TokenizerWrapper


def from_layers(
    source: Source, layers: int, head_width: int = HEAD_WIDTH, dtype: mx.Dtype | None = None
) -> PredictorStart:
    """Make a predictor from a copy of the LLM's first layers; it shares the LLM's embedding.

    Args:
        source (Source): the LLM.
        layers (int): how many layers to copy.
        head_width (int): P, width of the head's hidden layer.
        dtype (mx.Dtype): the weights' type; None for :data:`~mlx_ifp.tuner.source.TRAINED_IN`.

    Raises:
        IFPError: if the LLM has fewer layers.
    """
    if not 1 <= layers <= len(source.ffns):
        raise IFPError(
            f"--predictor-layers must be between 1 and the LLM's {len(source.ffns)}, not {layers}."
        )
    config = _first_layers(source.config, len(source.ffns), layers)
    try:
        backbone = build_model(config)
        check_runs(backbone, body_only=True)
        body, embedding = find_body(backbone), find_embedding(backbone)
    except IFPError as error:
        reason = str(error).rstrip(".")
        raise IFPError(
            f"The LLM's first layers ({layers} of them) make no predictor: {reason}. "
            "Name other --predictor-layers, or a --predictor-model."
        ) from error
    arrays = dict(tree_flatten(source.llm.parameters()))
    own = {
        name for name in dict(tree_flatten(backbone.parameters())) if name.startswith(f"{body}.")
    }
    embedding = find_embedding(backbone)
    own = {name for name in own if not name.startswith(f"{embedding}.")}
    # A frozen LLM may be in half precision, but its copy is trained.
    weights = [(name, arrays[name].astype(dtype or TRAINED_IN)) for name in own]
    backbone.load_weights(weights, strict=False)
    width = _embedding_width(get_module(backbone, embedding))
    set_module(backbone, embedding, nn.Module())
    _keep_body(backbone)
    head = new_head(width, head_width, source)
    return PredictorStart(backbone, config, head, embedding, source.tokenizer)


def from_model(
    model: str,
    source: Source,
    dtype: mx.Dtype | None = None,
    head_width: int = HEAD_WIDTH,
    trust_remote_code: bool = False,
) -> PredictorStart:
    """Make a predictor whose backbone is a pretrained mlx-lm model, as in the paper.

    Args:
        model (str): a directory or hub id.
        source (Source): of the LLM.
        dtype (mx.Dtype): the type that weights are cast to.
        head_width (int): P, width of the head's hidden layer.
        trust_remote_code (bool): let the tokenizer run code of its repository.
    """
    other = load_source(model, dtype, trust_remote_code)
    width = _embedding_width(get_module(other.llm, find_embedding(other.llm)))
    _keep_body(other.llm)
    head = new_head(width, head_width, source)
    return PredictorStart(other.llm, other.config, head, "", other.tokenizer)


def _embedding_width(embedding: nn.Module) -> int:
    return embedding.weight.shape[-1]


def _keep_body(backbone: nn.Module) -> None:
    """Drop the output layer, which a predictor does not use."""
    body = find_body(backbone).split(".")[0]
    for name in [name for name in backbone.children() if name != body]:
        backbone.pop(name)


def _first_layers(config: dict[str, Any], of: int, layers: int) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for part in (config, config.get("text_config") or {}):
        for name, value in part.items():
            if name in ("num_hidden_layers", "n_layers", "num_layers") and value == of:
                part[name] = layers
            elif isinstance(value, list) and len(value) == of:
                part[name] = value[:layers]
        for name in ("num_kv_shared_layers", "num_kv_reuse_layers"):
            if isinstance(part.get(name), int):
                # So many of the last layers use the keys and values of earlier ones.
                part[name] = max(0, layers - (of - part[name]))
    return config


def head_config(width: int, head_width: int, source: Source) -> HeadConfig:
    """Describe a head D -> P -> L * d_ffn with an exact GELU between (paper, section 3.1)."""
    scores = len(source.ffns) * source.ffns[0].d_ffn
    return HeadConfig([width, head_width, scores], [True, True], "gelu", "layer_norm")


def new_head(width: int, head_width: int, source: Source) -> PredictorHead:
    """Make a head whose last layer begins small, so that at first all texts score alike."""
    config = head_config(width, head_width, source)
    first = nn.Linear(width, head_width)
    arrays = {
        "linear1.weight": first.weight,
        "linear1.bias": mx.zeros((head_width,)),
        "linear2.weight": mx.random.normal((config.widths[-1], head_width)) * 0.01,
        "linear2.bias": mx.zeros((config.widths[-1],)),
    }
    return PredictorHead(config, arrays)


def from_checkpoint(
    source: Source, dtype: mx.Dtype | None = None, trust_remote_code: bool = False
) -> PredictorStart:
    """Take the predictor that a checkpoint has already.

    Args:
        source (Source): of the checkpoint.
        dtype (mx.Dtype): the weights' type; None for :data:`~mlx_ifp.tuner.source.TRAINED_IN`.
        trust_remote_code (bool): let its tokenizer run code of its repository.

    Raises:
        IFPError: if it has none.
    """
    checkpoint = source.checkpoint
    config = None if checkpoint is None else checkpoint.predictor_config
    if checkpoint is None or config is None:
        raise IFPError(f"{source.path} has no predictor; name --predictor-layers or another one.")
    predictor = load_predictor(checkpoint, dtype or TRAINED_IN, source.llm)
    embedding = ""
    tokenizer = source.tokenizer
    if checkpoint.ifp.predictor_embedding == "llm":
        embedding = find_embedding(predictor.backbone)
        set_module(predictor.backbone, embedding, nn.Module())
    else:
        options = {"trust_remote_code": trust_remote_code}
        tokenizer = load_predictor_tokenizer(checkpoint, options)
    _keep_body(predictor.backbone)
    return PredictorStart(predictor.backbone, config, predictor.head, embedding, tokenizer)
