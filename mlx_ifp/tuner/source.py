"""Load the model that training starts from, with float weights."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, load_config, load_model, load_tokenizer

from ..checkpoint.config import CONFIG_FILE
from ..checkpoint.directory import Checkpoint, open_checkpoint
from ..checkpoint.locate import expanded, resolve, source_name
from ..checkpoint.rows import from_rows
from ..checkpoint.tokenizers import load_tokenizer_of
from ..checkpoint.weights import load_tensors
from ..device import default_dtype
from ..errors import IFPError, one_line
from ..llm.build import build_model, complete
from ..llm.ffn import FFN, find_ffns
from ..llm.hf_config import buildable, mlx_config
from ..llm.support import check_support
from ..llm.trial import check_runs

# The type that weights are trained in, whatever they are stored in. In float16 AdamW's epsilon and
# the squares of most gradients are 0, and its first update divides 0 by 0. In bfloat16 most updates
# are smaller than a weight's last bit (at a rate of 1e-5, 97% of the weights of a small model did
# not change in 100 steps).
TRAINED_IN = mx.float32


@dataclass
class Source:
    """What training starts from.

    Attributes:
        name: the model's name, as the checkpoint will have it.
        path: the model's directory.
        config: the LLM's mlx-lm config, without a quantization.
        tokenizer: the LLM's.
        llm: an mlx-lm model with float weights.
        ffns: its FFNs.
        checkpoint: if it is a checkpoint of ours, what it says.
        digest: digest of the weights' files.
        dtype: the type that the weights are stored in.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tokenizer: TokenizerWrapper
    llm: nn.Module
    ffns: list[FFN]
    checkpoint: Checkpoint | None
    digest: str
    dtype: mx.Dtype


def load_source(
    model: str,
    dtype: mx.Dtype | None = None,
    trust_remote_code: bool = False,
    *,
    frozen: bool = False,
) -> Source:
    """Load a dense mlx-lm model, or the LLM of a checkpoint, so that it can be trained.

    Quantized weights are dequantized.

    Args:
        model (str): a directory or hub id.
        dtype (mx.Dtype): the type that weights are cast to; None for :data:`TRAINED_IN`.
        trust_remote_code (bool): let the tokenizer run code of its repository.
        frozen (bool): whether its own weights are not trained. Then, without a ``dtype``, they keep
            the type they are stored in, except on a CPU.

    Raises:
        IFPError: if it cannot be loaded or pruned.
    """
    path, tokenizer_config = expanded(model), {"trust_remote_code": trust_remote_code}
    if not path.exists():
        path = resolve(model, converted=False)
    checkpoint = None
    if (path / CONFIG_FILE).is_file():
        checkpoint = open_checkpoint(path)
        tokenizer = load_tokenizer_of(checkpoint, tokenizer_config)
        config = dict(checkpoint.config)
        llm = _assemble(checkpoint)
    else:
        llm, tokenizer, config = _load_dense(model, path, tokenizer_config)
    for name in ("quantization", "quantization_config"):
        config.pop(name, None)
    ffns = find_ffns(llm)
    check_runs(llm)
    stored = next(a.dtype for a in dict(tree_flatten(llm.parameters())).values() if _is_float(a))
    llm = _cast(llm, dtype or (default_dtype() if frozen else TRAINED_IN))
    mx.eval(llm.parameters())
    files = sorted(path.glob("*.safetensors"))
    return Source(
        source_name(model), path, config, tokenizer, llm, ffns, checkpoint, _digest(files), stored
    )


def _load_dense(
    model: str, path: Path, tokenizer_config: dict[str, Any]
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Load a dense model, its tokenizer and its config, which may be Hugging Face's."""
    with one_line(f"{model} cannot be loaded"):
        config = buildable(mlx_config(load_config(path)))
        llm, config = load_model(path, lazy=True, model_config=config)
        tokenizer = load_tokenizer(path, tokenizer_config, eos_token_ids=config.get("eos_token_id"))
        llm = dequantize_model(llm)
    complete(llm)
    for note in check_support(llm, config):
        print(f"[INFO] {note}", file=sys.stderr)
    return llm, tokenizer, config


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def _cast(model: nn.Module, dtype: mx.Dtype | None) -> nn.Module:
    if dtype is not None:
        model.update(tree_map(lambda a: a.astype(dtype) if _is_float(a) else a, model.parameters()))
    return model


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _assemble(checkpoint: Checkpoint) -> nn.Module:
    """Put together the dense model of a checkpoint, with mlx-lm's layout of down projections."""
    quantization = checkpoint.config.get("quantization")
    if quantization is not None:
        raise IFPError(
            f"{checkpoint.path} is quantized; train from the checkpoint it was made of, "
            "or dequantize it with mlx_ifp.convert -d."
        )
    model = build_model(checkpoint.config)
    arrays = load_tensors(checkpoint.trunk, None)
    channels = load_tensors(checkpoint.channels, None)
    for ffn in checkpoint.ffns:
        arrays |= from_rows(ffn, channels)
    model.load_weights(list(arrays.items()), strict=False)
    return model
