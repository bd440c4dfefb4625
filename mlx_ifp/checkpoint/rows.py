"""How a checkpoint stores the FFN's channels: each is a row of every tensor.

``gate_proj`` and ``up_proj`` lie as mlx-lm has them; a fused ``gate_up_proj`` is stored as the two.
``down_proj`` is stored transposed, [d_ffn, hidden size], so that its quantization groups lie inside
a row like those of the others. Its bias belongs to no channel and is part of the trunk.
"""

from collections.abc import Callable, Container, Mapping
from typing import TypeVar

import mlx.core as mx

from ..llm.ffn import FFN, PROJECTIONS
from ..llm.modules import PARTS

Tensor = TypeVar("Tensor")


def _rows(array: mx.array, start: int, stop: int) -> mx.array:
    return array[start:stop]


def stored_as(projection: str) -> tuple[str, ...]:
    """List what a projection of the model is stored as, top to bottom: a fused one is two."""
    return ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)


def stored_modules(ffns: list[FFN]) -> dict[str, str]:
    """Map each projection as it is stored to the module that it is, or is a part of.

    The config says how modules are quantized, so this tells how a stored projection is.
    """
    return {
        f"{ffn.path}.{projection}": ffn.module_path(projection)
        for ffn in ffns
        for projection in PROJECTIONS
    }


def owners_of(ffns: list[FFN]) -> dict[str, FFN]:
    """Map each module of the model that holds channels to the FFN that it belongs to."""
    return {ffn.module_path(projection): ffn for ffn in ffns for projection in PROJECTIONS}


def to_rows(
    ffn: FFN,
    name: str,
    tensor: Tensor,
    *,
    turned: bool = False,
    # mypy accepts no default that fits only one kind of tensor; these two fit arrays.
    rows: Callable[[Tensor, int, int], Tensor] = _rows,  # type: ignore[assignment]
    transposed: Callable[[Tensor], Tensor] = mx.transpose,  # type: ignore[assignment]
) -> dict[str, Tensor]:
    """Turn one tensor of an FFN into what is stored.

    Args:
        ffn (FFN): the FFN that it belongs to.
        name (str): mlx-lm's name of the tensor in the whole model.
        tensor: an array, or another kind of tensor for which the functions below are given.
        turned (bool): whether a row of the down projection is a channel already.
        rows (Callable): takes the rows from start to stop of a tensor.
        transposed (Callable): exchanges rows and columns of a matrix.

    Returns:
        dict: names in the checkpoint -> tensors; empty for what belongs to the trunk.
    """
    module, _, part = name.rpartition(".")
    projection = module.rpartition(".")[2]
    pieces = stored_as(projection)
    if len(pieces) > 1:
        return {
            f"{ffn.path}.{piece}.{part}": rows(tensor, i * ffn.d_ffn, (i + 1) * ffn.d_ffn)
            for i, piece in enumerate(pieces)
        }
    if projection == "down_proj" and part == "bias":
        return {}
    turn = projection == "down_proj" and not turned
    return {name: transposed(tensor) if turn else tensor}


def parts_of(ffn: FFN, stored: Container[str]) -> dict[tuple[str, str], list[str]]:
    """List a model's FFN: (projection, part) -> names that are stored, top to bottom.

    Args:
        ffn (FFN): the FFN; if it is a fused one, its projection is ``gate_up_proj``.
        stored: the names that the checkpoint has.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for part in PARTS:
        for projection in PROJECTIONS:
            name = f"{ffn.path}.{projection}.{part}"
            if name in stored:
                module = ffn.module_path(projection).rpartition(".")[2]
                found.setdefault((module, part), []).append(name)
    return found


def from_rows(ffn: FFN, stored: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Make an FFN as mlx-lm has it, by mlx-lm's names: the inverse of :func:`to_rows`.

    Args:
        ffn (FFN): the FFN to make.
        stored: names in the checkpoint -> arrays. They must be floats, because a quantized down
            projection cannot be transposed.
    """
    made = {}
    for (projection, part), names in parts_of(ffn, stored).items():
        arrays = [stored[name] for name in names]
        array = mx.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        made[f"{ffn.path}.{projection}.{part}"] = array.T if projection == "down_proj" else array
    return made
