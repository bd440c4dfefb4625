"""What an mlx-lm model is made of, found by looking at its modules, not at its name."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

# A private name, but mlx-lm offers it as load_model's default `get_model_classes`.
from mlx_lm.utils import _get_classes

from .errors import IFPError

PREFILL_STEP_SIZE = 2048  # mlx-lm's
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Of a linear layer, quantized or not.
PARTS = ("weight", "scales", "biases", "bias")
_SEPARATE = frozenset(PROJECTIONS)
_FUSED = frozenset(("gate_up_proj", "down_proj"))
# mlx-lm's.
QUANTIZATION_MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
_QUANTIZATION_DEFAULTS = ("group_size", "bits", "mode")


@dataclass(frozen=True)
class FFN:
    """Where one layer's gated FFN is, and its shape.

    Attributes:
        path: of the module in the model, such as ``model.layers.0.mlp``.
        fused: gate and up are one ``gate_up_proj`` of 2 * d_ffn rows, gate first.
        d_ffn: intermediate channels.
        hidden_size: input and output width.
        biases: which of gate_proj, up_proj and down_proj have a bias.
    """

    path: str
    fused: bool
    d_ffn: int
    hidden_size: int
    biases: frozenset[str]

    def module_path(self, projection: str) -> str:
        """The path in the model of the module that holds a projection."""
        name = "gate_up_proj" if self.fused and projection != "down_proj" else projection
        return f"{self.path}.{name}"


def build_model(config: dict[str, Any], quantized: set[str] | frozenset[str] = frozenset()):
    """An mlx-lm model of a config, its arrays not yet evaluated.

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
        model_class, args_class = _get_classes(config)
        with _untouched_random_state():
            # Some of mlx-lm's models change what they are given.
            model = model_class(args_class.from_dict(copy.deepcopy(config)))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise IFPError(f"mlx-lm cannot build a model of type {model_type!r}: {error}") from error
    except SystemExit as error:  # mlx-lm's olmo, if the package it needs is missing
        raise IFPError(f"mlx-lm cannot build a model of type {model_type!r} here.") from error
    except AssertionError as error:
        raise IFPError(f"mlx-lm cannot build this model of type {model_type!r}.") from error
    if quantized:
        with _untouched_random_state():
            nn.quantize(
                model,
                class_predicate=lambda path, _: (
                    quantization_of(config, path) if path in quantized else False
                ),
            )
    model.eval()
    return model


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
def _untouched_random_state() -> Iterator[None]:
    """A module is born with random weights; a user's seed must not feel that."""
    high, low = mx.random.state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def quantization_of(config: dict[str, Any], path: str, file: str = "config.json") -> dict[str, Any]:
    """Group size, bits and mode of a quantized module, by mlx-lm's convention in ``config.json``.

    Args:
        config (dict): its content.
        path (str): of the module.
        file (str): what an error calls the config.

    Raises:
        IFPError: if the config has no ``quantization``, or one that is none.
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
    """The config of the same LLM with FFNs of another width."""
    config = dict(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = with_width(config["text_config"], width)
    if "intermediate_size" in config or "text_config" not in config:
        config["intermediate_size"] = width
    return config


def find_ffns(model: nn.Module) -> list[FFN]:
    """The gated FFN of every layer.

    Raises:
        IFPError: if a layer has no such FFN, has experts, or its channels depend on each other;
            the message says what was found instead.
    """
    layers = getattr(model, "layers", None)
    if not layers:
        raise IFPError(f"{_name(model)} has no list of layers, so no FFN to prune.")
    paths = {id(module): path for path, module in model.named_modules()}
    ffns = [_find_ffn(layer, paths[id(layer)], _name(model)) for layer in layers]
    widths = sorted({ffn.d_ffn for ffn in ffns})
    if len(widths) > 1:
        raise IFPError(
            f"{_name(model)} has FFNs of different widths, {widths}; one width is needed."
        )
    return ffns


def _name(model: nn.Module) -> str:
    return f"The architecture {getattr(model, 'model_type', type(model).__name__)!r}"


def _find_ffn(layer: nn.Module, layer_path: str, name: str) -> FFN:
    modules = list(layer.named_modules())
    for path, module in modules:
        if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
            raise IFPError(
                f"{name} is a mixture of experts ({layer_path}.{path}); "
                "only dense models with one gated FFN a layer can be pruned."
            )
    found = []
    for path, module in modules:
        children = frozenset(module.children()) if path else frozenset()
        if children >= _SEPARATE or children >= _FUSED:
            found.append((f"{layer_path}.{path}", module, children >= _FUSED))
    if len(found) != 1:
        raise IFPError(
            f"{name} has {len(found) or 'no'} FFN with gate_proj, up_proj and down_proj "
            f"(or gate_up_proj and down_proj) in {layer_path}; found: {_describe(layer)}."
        )
    path, module, fused = found[0]
    needed = _FUSED if fused else _SEPARATE
    _check_ffn(path, module, needed, name)
    d_ffn = module.down_proj.weight.shape[1]
    if isinstance(module.down_proj, nn.QuantizedLinear):
        d_ffn = d_ffn * 32 // module.down_proj.bits
    biases = {child for child in needed if "bias" in module[child]}
    if "gate_up_proj" in biases:
        biases |= {"gate_proj", "up_proj"}
    hidden_size = module.down_proj.weight.shape[0]
    return FFN(path, fused, d_ffn, hidden_size, frozenset(biases & _SEPARATE))


def _describe(layer: nn.Module) -> str:
    return ", ".join(
        f"{child}({', '.join(module.children())})"
        for child, module in layer.children().items()
        if isinstance(module, nn.Module)
    )


def _check_ffn(path: str, module: nn.Module, needed: frozenset[str], name: str) -> None:
    for child in sorted(needed):
        if not isinstance(module[child], (nn.Linear, nn.QuantizedLinear)):
            kind = type(module[child]).__name__
            raise IFPError(f"{name}: {path}.{child} is a {kind}, not a Linear.")
    others = sorted(
        {key.split(".")[0] for key, _ in tree_flatten(module.parameters())} - needed,
    )
    if others:
        raise IFPError(f"{name}: {path} also has {', '.join(others)}; channels cannot be cut out.")
    if not _channels_add_up(module, needed):
        raise IFPError(f"{name}: in {path} the channels depend on one another.")


def _channels_add_up(module: nn.Module, needed: frozenset[str]) -> bool:
    """Whether the FFN is a sum over its channels, tried with small random weights.

    A norm or a top-k over the channels would break that, and with it all pruning.
    """
    width, half, dims = 16, 8, 8
    fused = "gate_up_proj" in needed
    keys = mx.random.split(mx.random.key(0), 4)
    gate, up, down = (mx.random.normal((width, dims), key=key) for key in keys[:3])
    x = mx.random.normal((3, dims), key=keys[3])

    def run(rows: slice) -> mx.array:
        trial = copy.copy(module)
        projections = {"down_proj": down[rows].T}
        if fused:
            projections["gate_up_proj"] = mx.concatenate([gate[rows], up[rows]])
        else:
            projections |= {"gate_proj": gate[rows], "up_proj": up[rows]}
        for child, weight in projections.items():
            trial[child] = linear(weight)
        return trial(x)

    whole = run(slice(None))
    parts = run(slice(0, half)) + run(slice(half, width))
    return bool(mx.allclose(whole, parts, rtol=1e-3, atol=1e-3))


def linear(weight: mx.array, bias: mx.array | None = None) -> nn.Linear:
    """A Linear around an array [output, input], without the random one it would be born with."""
    module = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(module)
    module.weight = weight
    if bias is not None:
        module.bias = bias
    return module


def quantized_linear(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    how: dict[str, Any],
    bias: mx.array | None = None,
) -> nn.QuantizedLinear:
    """The same around packed weights [output, ...]; ``how`` is group_size, bits and mode."""
    module = nn.QuantizedLinear.__new__(nn.QuantizedLinear)
    nn.Module.__init__(module)
    module.group_size, module.bits, module.mode = how["group_size"], how["bits"], how["mode"]
    module.weight, module.scales = weight, scales
    if biases is not None:
        module.biases = biases
    if bias is not None:
        module.bias = bias
    module.freeze()
    return module


def find_body(model: nn.Module) -> str:
    """The path of the part that turns tokens into the final hidden states, after the last norm.

    Raises:
        IFPError: if there is none.
    """
    layers = getattr(model, "layers", None)
    for path, module in model.named_modules():
        own = module.get("layers") if path else None
        if isinstance(own, list) and layers and own[0] is layers[0]:
            return path
    raise IFPError(f"{_name(model)} has no module that holds its layers.")


def final_hidden(
    body: nn.Module, tokens: mx.array, cache: list[Any], step: int = PREFILL_STEP_SIZE
) -> mx.array:
    """The final hidden states of a text's last tokens.

    A long text runs in steps with a KV cache, which bounds the memory of attention.

    Args:
        body (nn.Module): at :func:`find_body`.
        tokens (mx.array): int32 [n], n >= 1.
        cache (list): mlx-lm's, of the model, and empty.
        step (int): tokens to process at a time.

    Returns:
        mx.array: [1, m, hidden size] of the last step.
    """
    for start in range(0, tokens.size, step):
        hidden = body(tokens[None, start : start + step], cache=cache)
        mx.eval([layer.state for layer in cache], hidden)
    return hidden


def find_embedding(model: nn.Module) -> str:
    """The path of the embedding of tokens, quantized or not, which the model's body begins with.

    Raises:
        IFPError: if there is none, or another one besides.
    """
    body = find_body(model)
    found = [
        f"{body}.{path}"
        for path, module in get_module(model, body).named_modules()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
    ]
    if len(found) != 1:
        names = f" ({', '.join(sorted(found))})" if found else ""
        raise IFPError(
            f"{_name(model)} has {len(found)} embeddings in {body}{names}; "
            "only one that is alone can be shared."
        )
    return found[0]


def embedding_shape(module: nn.Embedding | nn.QuantizedEmbedding) -> tuple[int, int]:
    """Vocabulary and hidden size."""
    rows, width = module.weight.shape
    quantized = isinstance(module, nn.QuantizedEmbedding)
    return rows, width * 32 // module.bits if quantized else width


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path."""
    for part in path.split("."):
        model = model[int(part)] if isinstance(model, list) else model[part]
    return model


def evaluate(model: nn.Module, prefix: str = "", leave_out: tuple[str, ...] = ()) -> None:
    """Evaluate all arrays of a model, those that are no parameters (rotary tables) included.

    A lazy array belongs to the stream of the thread that made it: no other thread could use it.

    Args:
        model (nn.Module): the model.
        prefix (str): only what is below this path.
        leave_out (tuple): paths of modules that stay as they are.
    """
    mx.eval(
        [
            array
            for name, array in tree_flatten(model)
            if isinstance(array, mx.array)
            and name.startswith(prefix)
            and not name.startswith(tuple(f"{path}." for path in leave_out))
        ]
    )


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path."""
    parent, _, name = path.rpartition(".")
    (get_module(model, parent) if parent else model)[name] = module
