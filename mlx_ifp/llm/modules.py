"""Find modules of an mlx-lm model by structure, and copy models so that they share arrays."""

import copy
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import IFPError

PREFILL_STEP_SIZE = 2048  # mlx-lm's default

# A linear layer, quantized or not, has arrays of these names.
PARTS = ("weight", "scales", "biases", "bias")

_SAME = (mx.array, str, int, float, type(None))


def _name(model: nn.Module) -> str:
    return f"The architecture {getattr(model, 'model_type', type(model).__name__)!r}"


def linear(weight: mx.array, bias: mx.array | None = None) -> nn.Linear:
    """Make a Linear of an array [output, input], without making random weights first."""
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
    """Make a QuantizedLinear of packed weights [output, ...]; ``how``: group_size, bits, mode."""
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
    """Find the path of the module that turns tokens into final hidden states, last norm included.

    Raises:
        IFPError: if there is none.
    """
    layers = getattr(model, "layers", None)
    for path, module in model.named_modules():
        own = module.get("layers") if path else None
        if isinstance(own, list) and own and layers and own[0] is layers[0]:
            # PLaMo's list is inside a decoder that is called layers and takes no token ids.
            return path.removesuffix(".layers")
    raise IFPError(f"{_name(model)} has no module that holds its layers.")


def final_hidden(
    body: nn.Module, tokens: mx.array, cache: list[Any], step: int = PREFILL_STEP_SIZE
) -> mx.array:
    """Compute the final hidden states of a text's last tokens.

    A long text runs in steps with a KV cache, which bounds the memory of attention.

    Args:
        body (nn.Module): the module that :func:`find_body` finds.
        tokens (mx.array): int32 [n], n >= 1.
        cache (list): mlx-lm's cache for the model, still empty.
        step (int): tokens to process at a time.

    Returns:
        mx.array: [1, m, hidden size] of the last step.
    """
    for start in range(0, tokens.size, step):
        hidden = body(tokens[None, start : start + step], cache=cache)
        mx.eval([layer.state for layer in cache], hidden)
    return hidden


def find_embedding(model: nn.Module) -> str:
    """Find the path of the token embedding, quantized or not, that the model's body begins with.

    Raises:
        IFPError: if there is none, or more than one.
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


def scalar(array: mx.array) -> float:
    """The value of an array with one real element."""
    return cast(float, array.item())


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path."""
    for part in path.split("."):
        model = model[int(part)] if isinstance(model, list) else model[part]
    return model


def evaluate(
    model: nn.Module | list[nn.Module], prefix: str = "", leave_out: tuple[str, ...] = ()
) -> None:
    """Evaluate all arrays of a model, also those that are no parameters (rotary tables).

    A lazy array belongs to the stream of the thread that made it: no other thread could use it.

    Args:
        model: the model, or several modules.
        prefix (str): only what is below this path.
        leave_out (tuple): paths of modules that stay as they are.
    """
    mx.eval(
        [
            array
            for name, array in dict(tree_flatten(model)).items()
            if isinstance(array, mx.array)
            and name.startswith(prefix)
            and not name.startswith(tuple(f"{path}." for path in leave_out))
        ]
    )


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path."""
    parent, _, name = path.rpartition(".")
    (get_module(model, parent) if parent else model)[name] = module


def share(model: nn.Module) -> nn.Module:
    """A copy of a module tree that holds the very same arrays."""
    return _copied(model, {})


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy as copy.deepcopy does, but share arrays; copying modules here is five times as fast.

    Objects of other classes than modules and containers go to deepcopy, which copies their arrays.
    """
    if isinstance(value, _SAME):
        return value
    if (found := memo.get(id(value))) is not None:
        return found
    if isinstance(value, nn.Module):
        new = memo[id(value)] = value.__class__.__new__(value.__class__)
        for name, item in value.items():
            dict.__setitem__(new, name, _copied(item, memo))
        for name, item in value.__dict__.items():
            new.__dict__[name] = _copied(item, memo)
        return new
    if type(value) is set:
        return set(value)  # every module has sets of names
    if type(value) is tuple:
        return tuple(_copied(item, memo) for item in value)
    if type(value) is dict:
        items: dict[Any, Any] = {}
        memo[id(value)] = items
        items.update((name, _copied(item, memo)) for name, item in value.items())
        return items
    if type(value) is list:
        elements: list[Any] = []
        memo[id(value)] = elements
        elements.extend(_copied(item, memo) for item in value)
        return elements
    return copy.deepcopy(value, memo)
