"""A checkpoint's tokenizers: its LLM's, and its predictor's own."""

from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from ..errors import one_line
from .directory import PREDICTOR, Checkpoint


def _load_tokenizer(
    path: Path, config: dict[str, Any] | None, eos_token_ids: Any = None
) -> TokenizerWrapper:
    with one_line(f"{path}: the tokenizer cannot be loaded"):
        return load_tokenizer(path, config, eos_token_ids=eos_token_ids)


def load_tokenizer_of(
    checkpoint: Checkpoint, config: dict[str, Any] | None = None
) -> TokenizerWrapper:
    """The tokenizer of a checkpoint's LLM; ``config`` is passed on, as in mlx-lm.

    Raises:
        IFPError: if it cannot be loaded.
    """
    return _load_tokenizer(checkpoint.path, config, checkpoint.config.get("eos_token_id"))


def load_predictor_tokenizer(
    checkpoint: Checkpoint, config: dict[str, Any] | None = None
) -> TokenizerWrapper:
    """The tokenizer of a checkpoint's predictor, which has one of its own."""
    return _load_tokenizer(checkpoint.path / PREDICTOR, config)
