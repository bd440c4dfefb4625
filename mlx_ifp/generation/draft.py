"""A draft model for speculative decoding."""

from typing import Any

import mlx.nn as nn
import mlx_lm
from mlx_lm.models.cache import (
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    make_prompt_cache,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError, one_line
from .request import Request


def draft_model_of(
    request: Request, trunk: nn.Module, tokenizer: TokenizerWrapper
) -> nn.Module | None:
    """The draft model of a request, checked and loaded; None if it has none.

    Args:
        request (Request): what is asked for.
        trunk (nn.Module): the trunk of the model that answers.
        tokenizer: of that model.

    Raises:
        IFPError: if it cannot be loaded, or one of the two models cannot take tokens back.
    """
    draft_model = request.options.get("draft_model")
    if draft_model is None:
        return None
    # mlx-lm has one list for both, in which the answering model's layers come first.
    prompt_cache = request.options.get("prompt_cache") or []
    check_rollback(trunk, "this model", prompt_cache[: len(trunk.layers)])
    if isinstance(draft_model, str):
        draft_model = load_draft_model(draft_model, tokenizer)
    check_rollback(draft_model, "the draft model", prompt_cache[len(trunk.layers) :])
    return draft_model


def load_draft_model(name: str, tokenizer: TokenizerWrapper) -> nn.Module:
    """Load a draft model by its directory or hub id.

    Args:
        name (str): which.
        tokenizer: of the model that it drafts for.

    Raises:
        IFPError: if it cannot be loaded, or has another vocabulary.
    """
    with one_line(f"--draft-model {name} cannot be loaded"):
        draft_model, own = mlx_lm.load(name)[:2]
    if own.vocab_size != tokenizer.vocab_size:
        raise IFPError(
            f"--draft-model {name} has another tokenizer than the model: {own.vocab_size} tokens, "
            f"not {tokenizer.vocab_size}."
        )
    return draft_model


def check_rollback(network: nn.Module, what: str, prompt_cache: list[Any] | None = None) -> None:
    """Refuse speculative decoding where rejected tokens could not be taken back.

    mlx-lm takes them out of the cache of keys and values. A sliding window has overwritten older
    ones by then, and the answer goes on from a wrong state, without an error. A recurrent state
    cannot go back either.

    Args:
        network (nn.Module): an mlx-lm model: the one that answers, or the one that drafts.
        what (str): which of the two it is, for the error.
        prompt_cache (list): its cache, if there is one already.

    Raises:
        IFPError: naming the kind of cache.
    """
    for layer in prompt_cache or make_prompt_cache(network):
        for cache in getattr(layer, "caches", (layer,)):
            if not isinstance(cache, KVCache | QuantizedKVCache | ConcatenateKVCache):
                raise IFPError(
                    f"A draft model cannot be used: {what} keeps a {type(cache).__name__}, from "
                    "which rejected tokens cannot be taken back. Leave out --draft-model "
                    "(draft_model=)."
                )
