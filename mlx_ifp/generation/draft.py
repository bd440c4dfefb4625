"""A draft model for speculative decoding."""

import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError, one_line


def load_draft_model(name: str, tokenizer: TokenizerWrapper) -> nn.Module:
    """Load a draft model by its directory or hub id.

    Args:
        name (str): which.
        tokenizer: of the model that it drafts for.

    Raises:
        IFPError: if it cannot be loaded, or has another vocabulary.
    """
    with one_line(f"--draft-model {name} cannot be loaded"):
        draft_model, own = mlx_lm.load(name)
    if own.vocab_size != tokenizer.vocab_size:
        raise IFPError(
            f"--draft-model {name} has another tokenizer than the model: {own.vocab_size} tokens, "
            f"not {tokenizer.vocab_size}."
        )
    return draft_model
