"""Build a model from its config, and read what the config says about quantization."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

# The name is private, but mlx-lm offers it as load_model's default `get_model_classes`.
from mlx_lm.utils import _get_classes

from ..errors import IFPError, one_line

_QUANTIZATION_DEFAULTS = ("group_size", "bits", "mode")


def build_model(config: dict[str, Any], quantized: set[str] | frozenset[str] = frozenset()):
    """Build the mlx-lm model of a config; its arrays are not evaluated yet.

    Args:
        config (dict): an mlx-lm ``config.json``.
        quantized (set): paths of the modules whose weights are quantized.

    Raises:
        IFPError: if mlx-lm does not know the architecture or the config lacks something.
    """
    model_type = config.get("model_type")
    if config.get("model_file") is not None:
        raise IFPError(
            f"The model needs code of its own ({config['model_file']}), which is not supported."
        )
    try:
        with one_line(f"mlx-lm cannot build a model of type {model_type!r}"):
            model_class, args_class = _get_classes(config)
            with untouched_random_state():
                # Some of mlx-lm's models change the config that they are given, so they get a copy.
                model = model_class(args_class.from_dict(copy.deepcopy(config)))
    except SystemExit as error:  # mlx-lm's olmo exits if its package is missing
        raise IFPError(f"mlx-lm cannot build a model of type {model_type!r} here.") from error
    if quantized:
        with untouched_random_state():
            nn.quantize(
                model,
                class_predicate=lambda path, _: (
                    quantization_of(config, path) if path in quantized else False
                ),
            )
    complete(model)
    model.eval()
    return model


def complete(model: nn.Module) -> None:
    """Mend in place what mlx-lm's models lack for some configs that they accept.

    Some classes do not call MLX's constructor, so that they can be neither frozen nor set to
    training (RecurrentGemma). Others look for the cache of the first layer with full attention
    though a model of few layers, such as a predictor, has none (Gemma 3, Cohere 2).
    """
    for module in model.modules():
        module.__dict__.setdefault("_no_grad", set())
        module.__dict__.setdefault("_training", True)
        layers = module.get("layers")
        pattern = getattr(getattr(module, "args", None), "sliding_window_pattern", None)
        if isinstance(layers, list) and isinstance(pattern, int) and pattern > len(layers):
            module.__class__ = _all_sliding(type(module))


def _all_sliding(kind: type[nn.Module]) -> type[nn.Module]:
    """Make a class of bodies that may look up a cache beyond the last, for a mask no layer uses."""

    def call(self: nn.Module, inputs: mx.array, cache: list | None = None, *args: Any) -> mx.array:
        missing = self.args.sliding_window_pattern - len(self.layers)
        caches = [None] * len(self.layers) if cache is None else list(cache)
        return kind.__call__(self, inputs, caches + caches[:1] * missing, *args)

    return type(kind.__name__, (kind,), {"__call__": call})


def settle(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Let a model adapt to the tensors that are stored, as it does when mlx-lm loads them.

    Gemma 3 drops its output layer in ``sanitize`` if none is stored, for instance.

    Args:
        model (nn.Module): from :func:`build_model`; changed in place.
        shapes (dict): names and shapes of the stored tensors.
    """
    if hasattr(model, "sanitize"):
        with contextlib.suppress(LookupError, ValueError, TypeError, AttributeError):
            model.sanitize({name: mx.zeros(shape) for name, shape in shapes.items()})


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """A new module draws random weights; the user's random state stays as it was."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def random_state() -> list[int]:
    """The state of MLX's random number generator, as two numbers."""
    key: mx.array = cast(list, mx.random.state)[0]
    return cast(list[int], key.tolist())


def set_random_state(state: list[int]) -> None:
    """Restore the state that :func:`random_state` returned."""
    high, low = state
    mx.random.seed(high << 32 | low)


def quantization_of(config: dict[str, Any], path: str, file: str = "config.json") -> dict[str, Any]:
    """Group size, bits and mode of a quantized module, by mlx-lm's convention in ``config.json``.

    Args:
        config (dict): its content.
        path (str): of the module.
        file (str): what an error calls the config.

    Raises:
        IFPError: if the config has no ``quantization``, or a malformed one.
    """
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        raise IFPError(f"{path} is quantized, but {file} has no 'quantization'.")
    own = quantization.get(path)
    chosen = own if isinstance(own, dict) else quantization
    chosen = {key: chosen[key] for key in _QUANTIZATION_DEFAULTS if key in chosen}
    if not {"group_size", "bits"} <= chosen.keys():
        raise IFPError(f"{file}: the quantization of {path} lacks group_size or bits.")
    for key in ("group_size", "bits"):
        if not isinstance(chosen[key], int) or chosen[key] < 1:
            raise IFPError(f"{file}: {key} of {path} must be a number, not {chosen[key]!r}.")
    return {"mode": "affine"} | chosen


def with_width(config: dict[str, Any], width: int) -> dict[str, Any]:
    """Change a config so that the same LLM has FFNs of another width.

    The width of Nemotron-NAS can only be a multiple of 256; any other width is rounded up to the
    next one.
    """
    config = dict(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = with_width(config["text_config"], width)
        if "intermediate_size" in config:
            config["intermediate_size"] = width
        return config
    if "hidden_dim_scale_factor" in config:  # AFM 7B: the width is this factor times hidden_dim
        config["hidden_dim_scale_factor"] = (width + 0.5) / config["hidden_dim"]
        return config
    if isinstance(config.get("block_configs"), list):  # Nemotron-NAS, 2/3 of that times hidden_size
        of_ffn = {"ffn_mult": (width - 0.5) * 1.5 / config["hidden_size"]}
        config["block_configs"] = [
            block | {"ffn": block["ffn"] | of_ffn} for block in config["block_configs"]
        ]
    elif "intermediate_size_mlp" in config:  # Llama 4's dense layers
        config["intermediate_size_mlp"] = width
    if config.get("model_type") == "recurrent_gemma":  # it counts gate and up together
        width *= 2
    found = config.get("intermediate_size")
    config["intermediate_size"] = [width] * len(found) if isinstance(found, list) else width
    return config
