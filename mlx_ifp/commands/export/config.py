"""Find the config from which mlx-lm builds the very model that an export writes."""

import copy
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ...errors import IFPError, reason_of
from ...files.tensor_files import LazyTensor
from ...llm.build import build_model, with_width


def config_of_width(
    config: dict[str, Any], d_ffn: int, width: int, tensors: dict[str, LazyTensor]
) -> tuple[dict[str, Any], list[str]]:
    """Find a config whose FFNs have another width; try it with the tensors that will be written.

    Most models take the width from ``intermediate_size``. Others halve it (RecurrentGemma) or have
    a factor in its place (AFM), so fields are scaled one by one until the model fits.

    Args:
        config (dict): the LLM's config, with the quantization of the tensors.
        d_ffn (int): the width of its FFNs.
        width (int): the width that they shall have.
        tensors (dict): all tensors of the model, by mlx-lm's names.

    Returns:
        tuple: the config, and what the user should know about it.

    Raises:
        IFPError: if no such config is found.
    """
    # The config as it is already has the whole width.
    plain = config if width == d_ffn else with_width(config, width)
    problem = misfit(plain, tensors)
    if problem is None:
        return plain, []
    for field, scaled in _scaled(config, width / d_ffn):
        if misfit(scaled, tensors) is None:
            return scaled, [f"FFNs have {width} channels; the config says so by its {field}."]
    raise IFPError(
        f"mlx-lm's {config.get('model_type')!r} does not take the width of its FFNs from "
        f"intermediate_size, so a sub-network of {width} channels cannot be a stock model "
        f"({problem}). mlx_ifp.generate can use it."
    )


def misfit(config: dict[str, Any], tensors: dict[str, LazyTensor]) -> str | None:
    """Say why mlx-lm would not load a model with this config and tensors; None if it would.

    mlx-lm's own model is built and given placeholders, which are never evaluated.
    """
    quantized = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    try:
        model = build_model(config, quantized)
        arrays = {name: mx.zeros(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        if hasattr(model, "sanitize"):
            arrays = model.sanitize(arrays)
        model.load_weights(list(arrays.items()), strict=True)
    except Exception as error:
        return reason_of(error).rstrip(".")
    return None


def _scaled(config: dict[str, Any], factor: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield configs in which one number of the text model is scaled, with that number's name."""
    where = "text_config" if isinstance(config.get("text_config"), dict) else None
    for name, value in (config[where] if where else config).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        exact = value * factor
        # A model rounds channels down from a float, so the float may have to be slightly larger.
        values = [round(exact)] if isinstance(value, int) else [exact, exact * (1 + 1e-9)]
        for new in values:
            changed = copy.deepcopy(config)
            (changed[where] if where else changed)[name] = new
            yield name, changed
