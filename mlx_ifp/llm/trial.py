"""Try lazily whether a model can do what generating, exporting and training will ask of it."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..errors import IFPError, one_line
from .modules import _name, find_body, get_module

# The trial reads a prompt of 3 tokens, and then one more token.
_STEPS = (3, 1)


def check_runs(model: nn.Module, *, body_only: bool = False) -> None:
    """Run a model over a few tokens and then one more, up to the shapes of what comes out.

    MLX is lazy, so no weight is read and nothing is computed. The model runs as a whole and, as
    selectors and training use it, as its body alone.

    Args:
        model (nn.Module): an mlx-lm model; its arrays have their shapes, but need no values.
        body_only (bool): only the final hidden states will be used, as those of a predictor are.

    Raises:
        IFPError: if a part does not run, or gives something of another shape.
    """
    _check_runs(model, get_module(model, find_body(model)), "layers do")
    if not body_only:
        _check_runs(model, model, "model does")


def _check_runs(model: nn.Module, part: nn.Module, what: str) -> None:
    failure = f"{_name(model)} is not supported: mlx-lm's {what} not run on token ids with a cache"
    with one_line(failure):
        cache = make_prompt_cache(model)
        found = [part(mx.zeros((1, tokens), mx.int32), cache=cache) for tokens in _STEPS]
    for tokens, output in zip(_STEPS, found, strict=True):
        shape = getattr(output, "shape", ())
        if len(shape) != 3 or shape[:2] != (1, tokens):
            raise IFPError(f"{failure} (of {tokens} tokens they make {shape or type(output)}).")
