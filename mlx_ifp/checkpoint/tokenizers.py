"""Load a checkpoint's tokenizers: that of its LLM, and the predictor's own."""

import contextlib
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from ..errors import IFPError, one_line
from .directory import PREDICTOR, Checkpoint


def tokens_without_rows(tokenizer: TokenizerWrapper, rows: int | None, where: str) -> list[str]:
    """Find tokens that were added to a tokenizer and whose ids have no row in the embedding.

    MLX reads beyond the array for such an id, and answers become garbage. Some published models
    have a few such tokens, which no text is meant to use (Gemma 3's ``<image_soft_token>``). If
    ordinary tokens lie beyond the embedding, the tokenizer is another model's.

    Args:
        tokenizer: the model's tokenizer.
        rows (int): the rows of its embedding; None skips the check.
        where (str): names the tokenizer in messages.

    Returns:
        list: the tokens, in the order of their ids.

    Raises:
        IFPError: if an id beyond the embedding is not that of an added token.
    """
    # A tokenizer whose class is not transformers' may lack a vocabulary.
    with contextlib.suppress(AttributeError, NotImplementedError):
        if rows is None:
            return []
        vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
        beyond = sorted((id, token) for token, id in vocabulary.items() if id >= rows)
        for id, token in beyond:
            if token not in added:
                raise IFPError(
                    f"{where}: the token {token!r} has the id {id}, but the model's embedding has "
                    f"only {rows} rows. Use the tokenizer that belongs to the model."
                )
        return [token for _, token in beyond]
    return []


def _fits(tokenizer: TokenizerWrapper, rows: int | None) -> bool:
    """Whether no token is beyond the rows; this is a thousand times faster than a list."""
    with contextlib.suppress(AttributeError, NotImplementedError, TypeError):
        return rows is None or (
            tokenizer.vocab_size <= rows
            and all(id < rows for id in tokenizer.get_added_vocab().values())
        )
    return False


def _load_tokenizer(
    path: Path, config: dict[str, Any] | None, rows: int | None, eos_token_ids: Any = None
) -> TokenizerWrapper:
    with one_line(f"{path}: the tokenizer cannot be loaded"):
        tokenizer = load_tokenizer(path, config, eos_token_ids=eos_token_ids)
    if not _fits(tokenizer, rows):
        tokens_without_rows(tokenizer, rows, str(path))
    return tokenizer


def load_tokenizer_of(
    checkpoint: Checkpoint, config: dict[str, Any] | None = None
) -> TokenizerWrapper:
    """Load the tokenizer of a checkpoint's LLM; ``config`` is passed on, as in mlx-lm.

    Raises:
        IFPError: if it cannot be loaded, or is another model's.
    """
    ids = checkpoint.config.get("eos_token_id")
    return _load_tokenizer(checkpoint.path, config, checkpoint.token_rows, ids)


def load_predictor_tokenizer(
    checkpoint: Checkpoint, config: dict[str, Any] | None = None
) -> TokenizerWrapper:
    """Load the tokenizer of a checkpoint's predictor, which has one of its own.

    Raises:
        IFPError: if it cannot be loaded, or is another model's.
    """
    return _load_tokenizer(checkpoint.path / PREDICTOR, config, checkpoint.predictor_rows)
