"""Whether a model has positions for a prompt, found out before anything is computed."""

from typing import Any

from mlx_lm.models.cache import (
    ArraysCache,
    ChunkedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError
from ..llm.context import context_length
from ..llm.prompt import Encoded
from ..model import IFPModel
from .request import Request


def check_length(
    model: IFPModel, tokenizer: TokenizerWrapper, request: Request, tokens: Encoded
) -> None:
    """Refuse a prompt that is longer than the LLM's context.

    Where each layer keeps only the last tokens, or a state, a prompt may have any length.

    Args:
        model (IFPModel): what answers.
        tokenizer: its LLM's.
        request (Request): what is asked for.
        tokens: what the request's ``encode`` gives.

    Raises:
        IFPError: saying how to go on.
    """
    limit = context_length(model.checkpoint.config)
    if limit is None:
        return
    try:
        count = request.positions(tokenizer, tokens)
    except IFPError:
        # A stored prompt that cannot be read is refused, with the reason, where it is loaded.
        return
    cache = request.options.get("prompt_cache")
    if count <= limit or all(
        map(_is_bounded, cache or make_prompt_cache(model.trunk, request.kv.max_kv_size))
    ):
        return
    # mlx-lm heeds the flag only for models that make no caches of their own.
    heeded = not hasattr(model.trunk, "make_cache")
    also = (
        ", or give --max-kv-size (max_kv_size=) to let a token see only so many" if heeded else ""
    )
    raise IFPError(
        f"The prompt has {count:,} tokens, but this model reads at most {limit:,}. Shorten the "
        f"prompt{also}. If the model can read more, its config.json must say so "
        "(max_position_embeddings or rope_scaling)."
    )


def _is_bounded(layer: Any) -> bool:
    parts = getattr(layer, "caches", (layer,))
    return all(isinstance(part, RotatingKVCache | ArraysCache | ChunkedKVCache) for part in parts)
