"""The dense LLM runs layer by layer: each FFN is read once, for all pieces of text together.

mlx-lm's bodies run all layers on one piece of text. Here every piece passes a layer before the
next layer is read. A first pass through the body, in which each layer only notes what it is called
with, gives the hidden states before the first layer and each layer's mask. No architecture is known
by name. If a body does not call each of its layers once with one hidden state, or if its caches are
no keys and values, then pieces run one after the other, and each of them reads the FFNs again.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..llm.modules import PREFILL_STEP_SIZE, find_body, get_module, set_module, share
from ..llm.output import output_layer
from ..subnetwork.build import set_ffn
from ..subnetwork.parent import Parent
from ..subnetwork.rows import read_ffn

# (piece, z, FFN): z [B, n, d_ffn] is what goes into a layer's down projection for a piece of text,
# and the FFN is whole. The result is evaluated before the FFN is freed.
Measure = Callable[[int, mx.array, nn.Module], mx.array]

# (how many are done, of how many)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Piece:
    """Tokens that run through a layer at once.

    Attributes:
        tokens: int32 [B, n].
        cache: mlx-lm's prompt cache, which is filled; pieces of one text share it, in order. None
            if keys and values are not needed.
    """

    tokens: mx.array
    cache: list[Any] | None = None


@dataclass(frozen=True)
class DensePass:
    """What the dense LLM made of some pieces of text.

    Attributes:
        hidden: for each piece the final hidden states, after the last norm: [B, n, hidden size].
            They are lazy: what is not asked for is not computed.
        measured: for each layer and each piece what ``measure`` gave; empty without it.
        ffns_read: how often an FFN was read.
    """

    hidden: list[mx.array]
    measured: list[list[mx.array]]
    ffns_read: int


class _UnusualBody(Exception):
    """The body does not call each layer once with one hidden state."""


@dataclass
class _Call:
    """How a body calls a layer: everything but the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def values(self) -> list[Any]:
        """What is passed."""
        return [*self.args, *self.kwargs.values()]


class _Recording(nn.Module):
    """Stands in for a down projection, and hands what goes into it to a function."""

    def __init__(self, down_proj: nn.Module, record: Callable[[mx.array], None]) -> None:
        super().__init__()
        self._down_proj = down_proj
        self._record = record

    def __call__(self, z: mx.array) -> mx.array:
        self._record(z)
        return self._down_proj(z)


class _StreamedFFN(nn.Module):
    """Stands in for an FFN: it is read when it is called, and freed afterwards."""

    def __init__(self, call: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self._call = call

    def __call__(self, x: mx.array) -> mx.array:
        return self._call(x)


def run_layers(
    parent: Parent,
    pieces: list[Piece],
    measure: Measure | None = None,
    progress: Progress = lambda done, of: None,
) -> DensePass:
    """Run the dense LLM over pieces of text, with one FFN in memory at a time.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        pieces (list): at least one, each with at least one token. A piece that goes on in the cache
            of an earlier one comes after it.
        measure (Callable): called for each layer and piece; see :data:`Measure`.
        progress (Callable): called with how often a piece has passed a layer, and how often all do.

    Raises:
        IFPError: if channels cannot be read.
    """
    if len(pieces) > 1:
        try:
            return _by_layer(parent, pieces, *_trace(parent, pieces), measure, progress)
        except _UnusualBody:
            pass
    return _by_piece(parent, pieces, measure, progress)


def pieces_of(
    tokens: list[int] | mx.array, cache: list[Any] | None, step: int = PREFILL_STEP_SIZE
) -> list[Piece]:
    """Cut one text into pieces of nearly equal length, which bounds the memory of attention.

    Args:
        tokens (list or mx.array): [n] ids, n >= 1.
        cache (list): mlx-lm's prompt cache for them; without one the text is not cut.
        step (int): the most tokens of a piece.
    """
    tokens = mx.array(tokens, dtype=mx.int32)
    # A rotating cache has another mask for one token alone, so a last piece of one is avoided.
    count = 1 if cache is None else -(-tokens.size // max(step, 2))
    bounds = [round(tokens.size * i / count) for i in range(count + 1)]
    return [Piece(tokens[None, a:b], cache) for a, b in itertools.pairwise(bounds)]


def logits_of(parent: Parent, hidden: mx.array) -> mx.array:
    """The dense LLM's logits of final hidden states: [B, n, hidden size] -> [B, n, V]."""
    parameters, logits = output_layer(parent.trunk)
    return logits(parameters, hidden)


def _by_layer(
    parent: Parent,
    pieces: list[Piece],
    states: list[mx.array],
    calls: list[list[_Call]],
    measure: Measure | None,
    progress: Progress,
) -> DensePass:
    """Every piece passes a layer before the next layer is read.

    ``states`` are the hidden states before the first layer, and ``calls`` say how each piece calls
    each layer.
    """
    model = share(parent.trunk)
    passed, of = itertools.count(1), len(parent.ffns) * len(pieces)
    measured = [
        # In a function of its own, so that no name holds an FFN while the next one is read.
        _pass_layer(
            parent,
            model,
            number,
            pieces,
            states,
            [of_piece[number] for of_piece in calls],
            measure,
            lambda: progress(next(passed), of),
        )
        for number in range(len(parent.ffns))
    ]
    hidden = [_final(parent, p.tokens, x) for p, x in zip(pieces, states, strict=True)]
    return DensePass(hidden, measured if measure else [], len(parent.ffns))


def _pass_layer(
    parent: Parent,
    model: nn.Module,
    number: int,
    pieces: list[Piece],
    states: list[mx.array],
    calls: list[_Call],
    measure: Measure | None,
    passed: Callable[[], None],
) -> list[mx.array]:
    """Let every piece pass one layer, which changes ``states``; returns what is measured."""
    results: list[mx.array] = []
    layer = model.layers[number]
    with _whole_ffn(parent, model, number) as ffn:
        for i, (piece, call) in enumerate(zip(pieces, calls, strict=True)):
            with _measured(ffn, i, measure) as result:
                states[i] = layer(states[i], *call.args, **call.kwargs)
            if not isinstance(states[i], mx.array):
                raise _UnusualBody
            filled = [c.state for c in piece.cache or [] if _is_among(c, call.values())]
            mx.eval(states[i], result, filled)
            results += result
            passed()
    return results


def _trace(parent: Parent, pieces: list[Piece]) -> tuple[list[mx.array], list[list[_Call]]]:
    """The hidden states before the first layer, and for each piece how the layers are called.

    Raises:
        _UnusualBody: if pieces cannot pass layer by layer.
    """
    states: list[mx.array] = []
    calls: list[list[_Call]] = []
    ahead: dict[int, int] = {}  # for each cache, the tokens of earlier pieces
    for piece in pieces:
        notes: list[_Call] = []
        inputs: list[mx.array] = []

        def note(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            if not isinstance(x, mx.array):
                raise _UnusualBody
            # Some bodies assign to parts of what the last layer gives, so this is another object.
            inputs.append(mx.array(x))  # noqa: B023
            notes.append(_Call(args, kwargs))  # noqa: B023
            return x

        model = share(parent.trunk)
        layers = _replace_layers(model, note)
        if piece.cache is not None and len(piece.cache) != layers:
            raise _UnusualBody  # Some layers use the keys and values of others.
        n = ahead.get(id(piece.cache), 0)
        cache = None if piece.cache is None else [_ahead(layer, n) for layer in piece.cache]
        try:
            get_module(model, find_body(model))(piece.tokens, cache=cache)
        except (TypeError, ValueError) as error:
            # The body wants more of a layer than one hidden state.
            raise _UnusualBody from error
        if len(notes) != layers:
            raise _UnusualBody
        if cache is not None and piece.cache is not None:
            ahead[id(piece.cache)] = n + piece.tokens.shape[1]
            real = {id(a): b for a, b in zip(cache, piece.cache, strict=True)}
            notes = [
                _Call(
                    tuple(real.get(id(value), value) for value in call.args),
                    {name: real.get(id(value), value) for name, value in call.kwargs.items()},
                )
                for call in notes
            ]
        mx.eval(inputs[0])
        states.append(inputs[0])
        calls.append(notes)
    return states, calls


def _ahead(cache: Any, n: int) -> Any:
    """A copy of one layer's cache that says it holds n tokens more: masks are made with it."""
    if not isinstance(getattr(cache, "offset", None), int):
        raise _UnusualBody
    cache = copy.copy(cache)
    cache.offset += n
    return cache


def _is_among(value: Any, values: list[Any]) -> bool:
    return any(value is other for other in values)


def _final(parent: Parent, tokens: mx.array, hidden: mx.array) -> mx.array:
    """What the body makes of the last layer's output [B, n, d]; lazy."""
    model, first = share(parent.trunk), [hidden]

    def hand_on(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return first.pop() if first else x

    _replace_layers(model, hand_on)
    return get_module(model, find_body(model))(tokens, cache=None)


def _replace_layers(model: nn.Module, act: Callable[..., mx.array]) -> int:
    """Let a function act in the place of each layer; returns the number of layers.

    Bodies ask layers for their attributes and classes, so a stand-in is a copy of its layer, and
    its class is derived from the layer's.
    """
    body = get_module(model, find_body(model))
    own = next(
        module["layers"]
        for _, module in body.named_modules()
        if isinstance(module.get("layers"), list) and module["layers"][0] is model.layers[0]
    )
    if len(own) != len(model.layers):
        raise _UnusualBody
    for i, layer in enumerate(own):
        kind = type(layer)
        own[i] = share(layer)
        call = lambda _, x, *args, **kwargs: act(x, *args, **kwargs)  # noqa: E731
        own[i].__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return len(own)


def _by_piece(
    parent: Parent, pieces: list[Piece], measure: Measure | None, progress: Progress
) -> DensePass:
    """Every piece passes all layers, and reads them again."""
    hidden: list[mx.array] = []
    measured: list[list[mx.array]] = [[] for _ in parent.ffns]
    passed, of = itertools.count(1), len(parent.ffns) * len(pieces)
    for i, piece in enumerate(pieces):
        model = share(parent.trunk)
        for number, ffn in enumerate(parent.ffns):
            call = _streaming(
                parent, number, i, measure, measured[number], lambda: progress(next(passed), of)
            )
            set_module(model, ffn.path, _StreamedFFN(call))
        hidden.append(get_module(model, find_body(model))(piece.tokens, cache=piece.cache))
        mx.eval(hidden[-1], [layer.state for layer in piece.cache or []])
    return DensePass(hidden, measured if measure else [], len(pieces) * len(parent.ffns))


def _streaming(
    parent: Parent,
    number: int,
    piece: int,
    measure: Measure | None,
    results: list[mx.array],
    passed: Callable[[], None],
) -> Callable[[mx.array], mx.array]:
    """What runs one layer's FFN, and adds what is measured to ``results``."""

    def call(x: mx.array) -> mx.array:
        # Without this, lazy evaluation would want the FFNs of all layers at once.
        mx.eval(x)
        model = share(parent.trunk)
        with (
            _whole_ffn(parent, model, number) as ffn,
            _measured(ffn, piece, measure) as result,
        ):
            y = ffn(x)
            mx.eval(y, result)
        results.extend(result)
        passed()
        return y

    return call


@contextmanager
def _whole_ffn(parent: Parent, model: nn.Module, number: int) -> Iterator[nn.Module]:
    """One layer's FFN with all its channels, in the model while the block runs."""
    ffn = parent.ffns[number]
    empty = get_module(model, ffn.path)
    whole = share(empty)
    set_ffn(whole, read_ffn(parent.reader, ffn, None, dtype=parent.dtype), parent.config)
    set_module(model, ffn.path, whole)
    try:
        yield whole
    finally:
        set_module(model, ffn.path, empty)


@contextmanager
def _measured(ffn: nn.Module, piece: int, measure: Measure | None) -> Iterator[list[mx.array]]:
    """What ``measure`` gives for the FFN while the block runs, in a list."""
    result: list[mx.array] = []
    if measure is None:
        yield result
        return
    down_proj, whole = ffn.down_proj, share(ffn)
    ffn.down_proj = _Recording(down_proj, lambda z: result.append(measure(piece, z, whole)))
    try:
        yield result
    finally:
        ffn.down_proj = down_proj
