"""Find what a config asks for and mlx-lm's model does not do; refuse it, or say so."""

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import IFPError
from .ffn import FFN, find_ffns
from .modules import get_module, linear

# transformers' names of the activations.
_ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "gelu_new": nn.gelu_approx,
    "relu": nn.relu,
}


def check_support(network: nn.Module, config: dict[str, Any]) -> list[str]:
    """Compare a config with the model that mlx-lm builds of it.

    mlx-lm's models ignore fields that they do not know, so an unsupported model would convert
    without a word and answer with other numbers.

    Args:
        network (nn.Module): the model that mlx-lm builds of the config.
        config (dict): of Hugging Face, as mlx-lm reads it.

    Returns:
        list: notes on what only differs for some prompts.

    Raises:
        IFPError: if the model's activation or pattern of layers is not the config's.
    """
    text = config.get("text_config") or config
    known = _known_fields(network)
    _check_layer_types(text, known)
    _check_activation(network, text)
    window, context = text.get("sliding_window"), text.get("max_position_embeddings")
    used = text.get("use_sliding_window", True) and isinstance(window, int)
    types = text.get("layer_types") or ["sliding_attention"]
    used = used and "sliding_attention" in types
    layered = "layer_types" in known and text.get("layer_types")
    if not used or layered or known & {"sliding_window_pattern", "attention_window_size"}:
        return []
    if isinstance(context, int) and isinstance(window, int) and window >= context:
        return []
    return [
        f"mlx-lm's {text.get('model_type')} has no sliding window: prompts of more than {window} "
        "tokens give other numbers than in transformers."
    ]


def _known_fields(network: nn.Module) -> set[str]:
    """Collect the fields of a config that a model, or the text model inside it, reads."""
    known: set[str] = set()
    for module in (network, getattr(network, "language_model", None)):
        args = getattr(module, "args", None)
        if dataclasses.is_dataclass(args):
            known |= {f.name for f in dataclasses.fields(args)}
    return known


def _check_layer_types(config: dict[str, Any], known: set[str]) -> None:
    """Check that the layers have a period, if the model knows only a period."""
    types = config.get("layer_types")
    for name in ("sliding_window_pattern", "full_attention_interval"):
        every = config.get(name)
        if not types or name not in known or "layer_types" in known or isinstance(every, str):
            continue
        fits = every and all((kind == "full_attention") == (i % every == 0)
                             for i, kind in enumerate(types, 1))  # fmt: skip
        if not fits:
            raise IFPError(
                f"config.json: mlx-lm's {config.get('model_type')} has one full layer in every "
                f"few, which layer_types is not: {', '.join(types[:8])}, ..."
            )


def _check_activation(network: nn.Module, config: dict[str, Any]) -> None:
    """Try the FFN's activation, and compare it with the one that the config names."""
    name = config.get("hidden_activation") or config.get("hidden_act")
    expected = _ACTIVATIONS.get(str(name))
    try:
        ffn = find_ffns(network)[0]
    except IFPError:
        return  # a predictor's backbone may have another FFN
    if expected is None:
        if name is None:
            return
        raise IFPError(f"config.json: the activation {name!r} is not known.")
    x = mx.linspace(-3, 3, 13)[:, None]
    # The tolerance admits the tanh approximation of GELU, which differs by up to 5e-4.
    if not mx.allclose(_activation_of(network, ffn, x), expected(x), atol=1e-3):
        raise IFPError(
            f"config.json: the activation is {name!r}, but mlx-lm's {config.get('model_type')} "
            "has another one."
        )


def _activation_of(network: nn.Module, ffn: FFN, x: mx.array) -> mx.array:
    """Run the FFN on [n, 1]; all weights are 1, except that the up projection always gives 1."""
    module = get_module(network, ffn.path)
    one, ones = mx.ones((1, 1)), mx.ones((1,))
    kept = {name: module[name] for name in module.children()}
    try:
        if ffn.fused:
            module.gate_up_proj = linear(mx.array([[1.0], [0.0]]), mx.array([0.0, 1.0]))
        else:
            module.gate_proj = linear(one)
            module.up_proj = linear(mx.zeros((1, 1)), ones)
        module.down_proj = linear(one)
        return module(x)
    finally:
        for name, child in kept.items():
            module[name] = child
