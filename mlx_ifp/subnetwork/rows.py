"""The rows of one layer's FFN that a sub-network keeps."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint.rows import parts_of
from ..files.tensor_files import cast
from ..llm.ffn import FFN
from ..selection.selection import Selection
from .channels import ChannelReader, Part


@dataclass
class FFNRows:
    """The rows of one layer's FFN that a sub-network keeps.

    Attributes:
        ffn: the FFN that they belong to.
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
        nbytes = sum(array.nbytes for array in self.arrays.values())
        # A down projection in floats has the soft values in its own rows.
        if self.soft_values is not None and ("down_proj", "scales") in self.arrays:
            nbytes += self.soft_values.nbytes
        return nbytes


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
        ffn (FFN): that of the layer.
        channels (array): int [k], or None for all of them.
        soft_values (array): float32 [k]: lambda of each channel. It is folded into the up
            projection where that is exact: scale the row, or the row's scales and biases; see
            :func:`folded_parts`.
        dtype (mx.Dtype): cast floats to this type; None keeps them.
    """
    wanted: dict[tuple[str, str], list[Part]] = {
        key: [(name, channels) for name in names] for key, names in parts_of(ffn, reader).items()
    }
    arrays = dict(zip(wanted, reader.read(list(wanted.values())), strict=True))
    bytes_read = sum(array.nbytes for array in arrays.values())
    arrays = {key: cast(array, dtype) for key, array in arrays.items()}
    mx.eval(list(arrays.values()))
    rows = FFNRows(ffn, arrays, bytes_read)
    if soft_values is not None:
        apply_soft_values(rows, mx.array(soft_values))
    return rows


def folded_parts(ffn: FFN, arrays: dict[tuple[str, str], mx.array]) -> list[tuple[str, str]]:
    """The (projection, part) of an FFN that soft values are multiplied into.

    They multiply a channel's row of the up projection (paper, section 3.1: FFN(X, m)): the row
    itself, or its scales and biases. 8-bit scales cannot be multiplied. Then the row of the down
    projection takes them, if it is in floats. Otherwise no part does, and they stay apart.
    """
    up = "gate_up_proj" if ffn.fused else "up_proj"
    parts: tuple[str, ...] = ("weight", "bias")
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
        factor (mx.array): float32 [k], what each row must still be multiplied by; None for lambda
            itself.
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
