"""How many positions a model has."""

from collections.abc import Iterator, Mapping
from typing import Any

# Configs have these names for the number of positions.
_LENGTHS = ("max_position_embeddings", "n_positions")
_ROPE = ("rope_scaling", "rope_parameters")


def context_length(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a model reads, or None if its config does not say.

    Some configs state the length before their rotary embeddings are stretched, others the length
    after that. The larger reading counts, so that no prompt is refused that may fit.

    Args:
        config: the LLM's, as transformers 4 or 5 or mlx-lm writes it.
    """
    text = config.get("text_config")
    both = [config, text] if isinstance(text, Mapping) else [config]
    stated = [length for part in both for name in _LENGTHS if (length := _length(part.get(name)))]
    if not stated:
        return None
    longest = max(stated)
    for part in both:
        for rope in _ropes(part):
            factor = rope.get("factor")
            if isinstance(factor, int | float) and factor > 1:
                original = _length(rope.get("original_max_position_embeddings"))
                longest = max(longest, int((original or max(stated)) * factor))
    return longest


def _length(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All settings of rotary embeddings; some configs have separate ones for each type of layer."""
    for name in _ROPE:
        rope = config.get(name)
        if isinstance(rope, Mapping):
            yield rope
            yield from (each for each in rope.values() if isinstance(each, Mapping))
