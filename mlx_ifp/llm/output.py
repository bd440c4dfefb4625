"""From tokens to final hidden states, and from these to logits, for any architecture."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .modules import find_body, get_module, set_module, share


def hidden_states(model: nn.Module, tokens: mx.array) -> mx.array:
    """Compute final hidden states, after the last norm: int32 [B, S] -> [B, S, d]."""
    # StableLM's body has no default for the cache.
    return get_module(model, find_body(model))(tokens, cache=None)


class _GivenHidden(nn.Module):
    """Stands in for a model's body: its input is already the hidden state."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        # The output layer may use the body's embedding, and also numbers that the body holds.
        for name, child in body.children().items():
            if isinstance(child, (nn.Embedding, nn.QuantizedEmbedding)):
                self[name] = child
        for name, value in vars(body).items():
            self.__dict__.setdefault(name, value)

    def __call__(self, *args: mx.array, **kwargs: mx.array) -> mx.array:
        # The first argument is the hidden state, whatever its name is.
        return next(iter((*args, *kwargs.values())))


def output_layer(model: nn.Module) -> tuple[dict, Callable[[dict, mx.array], mx.array]]:
    """Give the function that turns final hidden states into logits, for any architecture.

    Returns:
        tuple: the trainable parameters it uses, a tree, and a function (parameters, [..., d]) ->
        logits [..., vocabulary].
    """
    path = find_body(model)
    top = share(model)
    set_module(top, path, _GivenHidden(get_module(top, path)))
    trainable = top.trainable_parameters()

    def logits(parameters: dict, hidden: mx.array) -> mx.array:
        top.update(parameters)
        return top(hidden[None])[0]

    return trainable, logits
