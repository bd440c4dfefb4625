"""Translate a Hugging Face config into the form that mlx-lm's models read."""

import contextlib
from typing import Any

from transformers import CONFIG_MAPPING

from ..errors import IFPError, one_line
from .build import build_model

# transformers 5 names the kinds of layers alike for all models; mlx-lm differs for these.
_LAYER_KINDS = {
    "granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"},
}

# For these models mlx-lm takes the pattern as letters: L means local and G means global.
_LETTERS = ("exaone4",)


def mlx_config(config: dict[str, Any]) -> dict[str, Any]:
    """Translate a Hugging Face config into the form that mlx-lm's models read.

    Raises:
        IFPError: if its fields are not of the kinds they should be.
    """
    with one_line("config.json: rope, layer_types or the like is malformed"):
        return _translated(config)


def buildable(config: dict[str, Any]) -> dict[str, Any]:
    """Rename a config's model type to the name by which mlx-lm has the model.

    mlx-lm has some text models (Qwen3.5) only under the name of their multimodal wrapper.

    Args:
        config (dict): a config that :func:`mlx_config` made.

    Raises:
        IFPError: if mlx-lm cannot build it.
    """
    model_type = str(config.get("model_type"))
    try:
        build_model(config)
    except IFPError:
        if not model_type.endswith("_text"):
            raise
        wrapper = config | {"model_type": model_type.removesuffix("_text")}
        with contextlib.suppress(IFPError):
            build_model(wrapper)
            return wrapper
        raise
    return config


def _translated(config: dict[str, Any]) -> dict[str, Any]:
    """Do the work of :func:`mlx_config`.

    transformers 5 writes some values in other places than mlx-lm's models look for them, and
    those would silently take their defaults: rotary embeddings in ``rope_parameters``, the
    pattern of the layers in ``layer_types``, other heads of some layers in ``per_layer_config``,
    the size of the vocabulary in ``text_config`` alone, some fields under another name. A field
    that the config already has is kept.
    """
    config = {name: _plain(value) for name, value in config.items()}
    if config.get("text_config") is not None:
        if not isinstance(config["text_config"], dict):
            raise TypeError("text_config must be an object")
        config["text_config"] = _translated(config["text_config"])
        if "vocab_size" in config["text_config"]:
            config.setdefault("vocab_size", config["text_config"]["vocab_size"])
        if "tie_word_embeddings" in config:
            tied = config["tie_word_embeddings"]
            config["text_config"].setdefault("tie_word_embeddings", tied)
    _add_aliases(config)
    _add_rope(config)
    _add_layers(config)
    return config


def _plain(value: Any) -> Any:
    """Copy a field; an object by which transformers 5 writes an infinite number becomes a float."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _add(config: dict[str, Any], name: str, value: Any) -> None:
    """Set a field that is absent or null."""
    if config.get(name) is None:
        config[name] = value


def _add_aliases(config: dict[str, Any]) -> None:
    """Add the names that transformers' class has for a field besides the one that it saves."""
    model_type = str(config.get("model_type"))
    if model_type in CONFIG_MAPPING:
        for alias, name in CONFIG_MAPPING[model_type].attribute_map.items():
            if config.get(name) is not None:
                _add(config, alias, config[name])


def _add_rope(config: dict[str, Any]) -> None:
    """Write ``rope_parameters``, of all layers or of each kind, as transformers 4 wrote them."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    sliding = rope.get("sliding_attention")
    full = rope.get("full_attention") or sliding or rope
    if "rope_theta" in full:
        _add(config, "rope_theta", full["rope_theta"])
    if "partial_rotary_factor" in rope:
        _add(config, "partial_rotary_factor", rope["partial_rotary_factor"])
    if sliding and "rope_theta" in sliding:
        _add(config, "rope_local_base_freq", sliding["rope_theta"])
    if "original_max_position_embeddings" in full:
        positions = full["original_max_position_embeddings"]
        _add(config, "original_max_position_embeddings", positions)
    if config.get("rope_scaling") is None:
        kind = full.get("rope_type", "default")
        # Some of mlx-lm's models look for the type under its older name.
        config["rope_scaling"] = None if kind == "default" else {"type": kind} | full


def _add_layers(config: dict[str, Any]) -> None:
    """Add what follows from ``layer_types``, which transformers prefers to any pattern."""
    types = config.get("layer_types")
    model_type = str(config.get("model_type"))
    if not isinstance(types, list) or not types:
        # transformers derives the types from a period, and keeps the period under this name.
        if "_sliding_window_pattern" in config:
            config.setdefault("sliding_window_pattern", config["_sliding_window_pattern"])
        return
    names = _LAYER_KINDS.get(model_type, {})
    every = _period(types, config.get("_sliding_window_pattern"))
    if every is not None:
        if len(set(types)) > 1 or "linear_num_value_heads" in config:
            config["full_attention_interval"] = every
        if "sliding_attention" in types or isinstance(config.get("sliding_window"), int):
            config["sliding_window_pattern"] = _pattern(config, every)
    if "full_attention" in types and len(set(types)) > 1:
        last = config.get("per_layer_config") or {}
        last = last.get(str(types.index("full_attention")), {})
        if "head_dim" in config:
            config.setdefault("global_head_dim", last.get("head_dim", config["head_dim"]))
        if "num_key_value_heads" in last:
            config.setdefault("num_global_key_value_heads", last["num_key_value_heads"])
    config["layer_types"] = [names.get(kind, kind) for kind in types]


def _period(types: list[str], given: int | None) -> int | None:
    """The n for which exactly every n-th layer has full attention; None if there is no such n."""
    if "full_attention" in types:
        every = types.index("full_attention") + 1
    else:
        # No layer has full attention. Any n above the number of layers says so; a given n is kept.
        every = max(len(types) + 1, given or 0)
    fits = all((kind == "full_attention") == (i % every == 0) for i, kind in enumerate(types, 1))
    return every if fits else None


def _pattern(config: dict[str, Any], every: int) -> int | str | None:
    """The period in the form that ``sliding_window_pattern`` has for this model."""
    found = config.get("sliding_window_pattern")
    if config.get("model_type") in _LETTERS and not isinstance(found, str):
        return None if every == 1 else "L" * (every - 1) + "G"
    return found if isinstance(found, str) else every
