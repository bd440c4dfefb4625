"""Trunk + chosen FFN channels -> a plain mlx-lm model with a narrower FFN."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .channels import ChannelReader, Part
from .errors import IFPError
from .masks import Selection
from .structure import (
    FFN,
    PARTS,
    PROJECTIONS,
    evaluate,
    get_module,
    linear,
    quantization_of,
    quantized_linear,
)
from .tensor_files import cast


class ChannelMajorLinear(nn.Module):
    """A quantized down projection whose rows are channels: ``x @ dequantize(weight)``.

    Quantization groups lie inside a row, so any choice of rows is exact.

    Args:
        weight (mx.array): uint32 [k, packed hidden size].
        scales, biases: of ``weight``; biases is None for the modes that have none.
        how (dict): group_size, bits and mode.
        bias (mx.array): [hidden size], or None.
        soft_values (mx.array): float32 [k], multiplied with the activation, or None.
    """

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None,
        how: dict[str, Any],
        bias: mx.array | None = None,
        soft_values: mx.array | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.scales = scales
        if biases is not None:
            self.biases = biases
        if bias is not None:
            self.bias = bias
        if soft_values is not None:
            self.soft_values = soft_values
        self.group_size, self.bits, self.mode = how["group_size"], how["bits"], how["mode"]
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        if "soft_values" in self:
            x = x * self["soft_values"].astype(x.dtype)
        # Two dimensions: MLX's vector kernel for transpose=False is in doubt for (n, 1, k).
        y = mx.quantized_matmul(
            x.reshape(-1, x.shape[-1]),
            self["weight"],
            scales=self["scales"],
            biases=self.get("biases"),
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y + self["bias"] if "bias" in self else y


@dataclass
class FFNRows:
    """The rows of one layer's FFN that a sub-network keeps.

    Attributes:
        ffn: where they belong.
        arrays: (projection, part) -> array; ``gate_up_proj`` is the projection of a fused FFN.
        bytes_read: bytes of channels read for them.
        soft_values: float32 [k], if they could not be folded into the arrays, else None.
        channels_reused: how many of the channels were in memory already.
    """

    ffn: FFN
    arrays: dict[tuple[str, str], mx.array]
    bytes_read: int
    soft_values: mx.array | None = None
    channels_reused: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        # A float down projection takes the soft values in.
        apart = self.soft_values is not None and ("down_proj", "scales") in self.arrays
        soft_values = self.soft_values.nbytes if apart else 0
        return soft_values + sum(array.nbytes for array in self.arrays.values())


def read_ffn(
    reader: ChannelReader,
    ffn: FFN,
    channels: np.ndarray | None,
    soft_values: np.ndarray | None = None,
    dtype: mx.Dtype | None = None,
) -> FFNRows:
    """Read the rows of one layer's FFN.

    Args:
        reader (ChannelReader): of the checkpoint.
        ffn (FFN): the layer's.
        channels (array): int [k], or None for all of them.
        soft_values (array): float32 [k]: lambda of each channel. It is folded into the up
            projection where that is exact: scale the row, or the row's scales and biases; see
            :func:`folded_parts`.
        dtype (mx.Dtype): cast floats to this type; None keeps them.
    """
    wanted: dict[tuple[str, str], list[Part]] = {
        key: [(name, channels) for name in names]
        for key, names in parts_on_disk(reader, ffn).items()
    }
    arrays = dict(zip(wanted, reader.read(list(wanted.values())), strict=True))
    bytes_read = sum(array.nbytes for array in arrays.values())
    arrays = {key: cast(array, dtype) for key, array in arrays.items()}
    mx.eval(list(arrays.values()))
    rows = FFNRows(ffn, arrays, bytes_read)
    if soft_values is not None:
        apply_soft_values(rows, mx.array(soft_values))
    return rows


def parts_on_disk(reader: ChannelReader, ffn: FFN) -> dict[tuple[str, str], list[str]]:
    """(projection, part) of an FFN in memory -> the tensors that it is made of, top to bottom."""
    found: dict[tuple[str, str], list[str]] = {}
    for part in PARTS:
        for projection in PROJECTIONS:
            name = f"{ffn.path}.{projection}.{part}"
            if name in reader:
                module = ffn.module_path(projection).rpartition(".")[2]
                found.setdefault((module, part), []).append(name)
    return found


def folded_parts(ffn: FFN, arrays: dict[tuple[str, str], mx.array]) -> list[tuple[str, str]]:
    """The (projection, part) of an FFN that soft values are multiplied into.

    They multiply a channel's row of the up projection (paper, section 3.1: FFN(X, m)): the row,
    or the row's scales and biases. 8-bit scales can't take them. Then it is the row of the down
    projection, if that is in floats; else there is none, and they stay apart.
    """
    up = "gate_up_proj" if ffn.fused else "up_proj"
    parts = ("weight", "bias")
    if (up, "scales") in arrays:
        if (up, "biases") not in arrays:
            return [("down_proj", "weight")] * (("down_proj", "scales") not in arrays)
        parts = ("scales", "biases", "bias")
    return [(up, part) for part in parts if (up, part) in arrays]


def apply_soft_values(rows: FFNRows, soft_values: mx.array, factor: mx.array | None = None) -> None:
    """Multiply channels by lambda, or keep it beside them where that is not exact.

    Args:
        rows (FFNRows): changed; arrays are replaced by new ones.
        soft_values (mx.array): float32 [k], lambda.
        factor (mx.array): float32 [k], what is still missing of it in each row; None for all.
    """
    folded = folded_parts(rows.ffn, rows.arrays)
    if not folded:
        rows.soft_values = soft_values
        return
    factor = soft_values if factor is None else factor
    for key in folded:
        array = rows.arrays[key]
        own = factor
        if key[0] == "gate_up_proj":
            own = mx.concatenate([mx.ones_like(factor), factor])
        own = own if array.ndim == 1 else own[:, None]
        rows.arrays[key] = (array.astype(mx.float32) * own).astype(array.dtype)
    mx.eval(list(rows.arrays.values()))


def set_ffn(module: nn.Module, rows: FFNRows, config: dict[str, Any]) -> None:
    """Put rows into an FFN.

    Args:
        module (nn.Module): mlx-lm's FFN; its down projection's bias, if any, is kept.
        rows (FFNRows): from :func:`read_ffn`.
        config (dict): the LLM's, which says how weights are quantized.
    """
    ffn = rows.ffn
    for projection in sorted({projection for projection, _ in rows.arrays}):
        weight, scales, biases, bias = (rows.arrays.get((projection, p)) for p in PARTS)
        how = quantization_of(config, ffn.module_path(projection)) if scales is not None else None
        if projection == "down_proj":
            bias = module.down_proj.get("bias")
        if how is None:
            # Transposing is a change of strides: the array on disk is the array in memory.
            down = projection == "down_proj"
            module[projection] = linear(weight.T if down else weight, bias)
        elif projection == "down_proj":
            module.down_proj = ChannelMajorLinear(
                weight, scales, biases, how, bias, rows.soft_values
            )
        else:
            module[projection] = quantized_linear(weight, scales, biases, how, bias)


def share(model: nn.Module) -> nn.Module:
    """A copy of a module tree that holds the very same arrays."""
    return _copied(model, {})


_SAME = (mx.array, str, int, float, type(None))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """As copy.deepcopy, but for arrays; modules are copied here, which is five times as fast.

    Objects of other classes than modules and containers are deepcopy's, arrays in them included.
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
        return set(value)  # of names, in every module
    if type(value) is tuple:
        return tuple(_copied(item, memo) for item in value)
    if type(value) is dict:
        new = memo[id(value)] = {}
        new.update((name, _copied(item, memo)) for name, item in value.items())
        return new
    if type(value) is list:
        new = memo[id(value)] = []
        new.extend(_copied(item, memo) for item in value)
        return new
    return copy.deepcopy(value, memo)


def check_selection(selection: Selection, ffns: list[FFN]) -> None:
    """Raises IFPError if a selection does not have the shape of a model's FFNs."""
    if len(selection.layers) != len(ffns) or selection.d_ffn != ffns[0].d_ffn:
        raise IFPError(
            f"The selection is for {len(selection.layers)} layers of {selection.d_ffn} channels, "
            f"the model has {len(ffns)} of {ffns[0].d_ffn}."
        )


def read_layer(
    reader: ChannelReader,
    ffns: list[FFN],
    selection: Selection | None,
    layer: int,
    dtype: mx.Dtype | None = None,
) -> FFNRows:
    """The rows of one layer that a selection keeps; None takes all. See :func:`read_ffn`."""
    if selection is None:
        return read_ffn(reader, ffns[layer], None, dtype=dtype)
    soft_values = None if selection.soft_values is None else selection.soft_values[layer]
    return read_ffn(reader, ffns[layer], selection.layers[layer], soft_values, dtype)


def build_subnetwork(
    trunk: nn.Module,
    ffns: list[FFN],
    config: dict[str, Any],
    selection: Selection | None,
    read: Callable[[int], FFNRows],
) -> tuple[nn.Module, int, int]:
    """The sub-network of a selection: a stock mlx-lm model, trunk shared.

    Args:
        trunk (nn.Module): from :func:`~mlx_ifp.weights.load_trunk`.
        ffns (list): the checkpoint's FFNs.
        config (dict): the LLM's config.
        selection (Selection): which channels; None takes all of them, the dense model.
        read (Callable): gives the rows of a layer, as :func:`read_layer` does.

    Returns:
        tuple: the model, the bytes its own FFN takes in memory, and the bytes read for it.
    """
    if selection is not None:
        check_selection(selection, ffns)
    model = share(trunk)
    nbytes = bytes_read = 0
    for i, ffn in enumerate(ffns):
        rows = read(i)
        module = get_module(model, ffn.path)
        set_ffn(module, rows, config)
        # The trunk is evaluated already.
        evaluate(module)
        nbytes += rows.nbytes
        bytes_read += rows.bytes_read
    return model, nbytes, bytes_read
