"""The rows of one layer's FFN that a sub-network keeps."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint.rows import parts_of
from ..files.tensor_files import cast
from ..llm.ffn import FFN
from ..selection.selection import Selection
from .channels import ChannelReader, Part, Reading

# So many layers are read, or their arrays are made, before the first of them is used. What is cast
# is held twice only in these.
_AHEAD = 3


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


class FFNReading:
    """The rows of one layer's FFN while they are read.

    Args:
        reading (Reading): of the arrays.
        finish (Callable): makes the rows of the arrays that were read.
    """

    def __init__(self, reading: Reading, finish: Callable[[list[mx.array]], FFNRows]) -> None:
        self._reading, self._finish = reading, finish

    def start(self) -> None:
        """See :meth:`Reading.start`."""
        self._reading.start()

    def rows(self) -> FFNRows:
        """Wait for the rows.

        Raises:
            IFPError: if a file has been changed since it was opened, or cannot be read.
        """
        return self._finish(self._reading.arrays())


def begin_ffn(
    reader: ChannelReader,
    ffn: FFN,
    channels: np.ndarray | None,
    soft_values: np.ndarray | None = None,
    dtype: mx.Dtype | None = None,
) -> FFNReading:
    """Begin to read the rows of one layer's FFN.

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

    def finish(read: list[mx.array]) -> FFNRows:
        rows = FFNRows(ffn, cast_all(wanted, read, dtype), sum(array.nbytes for array in read))
        if soft_values is not None:
            apply_soft_values(rows, mx.array(soft_values))
        return rows

    return FFNReading(reader.begin(list(wanted.values())), finish)


def cast_all(
    keys: Iterable[tuple[str, str]], arrays: list[mx.array], dtype: mx.Dtype | None
) -> dict[tuple[str, str], mx.array]:
    """Name arrays, and cast floats to a type; None keeps them."""
    named = dict(zip(keys, arrays, strict=True))
    changed = {key: cast(array, dtype) for key, array in named.items()}
    mx.eval([array for key, array in changed.items() if array is not named[key]])
    return changed


def read_ffn(
    reader: ChannelReader,
    ffn: FFN,
    channels: np.ndarray | None,
    soft_values: np.ndarray | None = None,
    dtype: mx.Dtype | None = None,
) -> FFNRows:
    """Read the rows of one layer's FFN: see :func:`begin_ffn`."""
    return begin_ffn(reader, ffn, channels, soft_values, dtype).rows()


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


def begin_layer(
    reader: ChannelReader,
    ffns: list[FFN],
    selection: Selection | None,
    layer: int,
    dtype: mx.Dtype | None = None,
) -> FFNReading:
    """Begin to read the rows of one layer that a selection keeps; None takes all."""
    if selection is None:
        return begin_ffn(reader, ffns[layer], None, dtype=dtype)
    soft_values = None if selection.soft_values is None else selection.soft_values[layer]
    return begin_ffn(reader, ffns[layer], selection.layers[layer], soft_values, dtype)


def read_layer(
    reader: ChannelReader,
    ffns: list[FFN],
    selection: Selection | None,
    layer: int,
    dtype: mx.Dtype | None = None,
) -> FFNRows:
    """The rows of one layer that a selection keeps: see :func:`begin_layer`."""
    return begin_layer(reader, ffns, selection, layer, dtype).rows()


def read_in_turn(readings: Iterable[FFNReading]) -> Iterator[FFNRows]:
    """The rows of layers in order, while those of the next layers are read.

    Args:
        readings: gives those of each layer; each begins when it is taken from this.
    """
    begun: deque[FFNReading] = deque()
    for reading in readings:
        # The arrays of the last one have been made while the ones before it were read.
        if begun:
            begun[-1].start()
        begun.append(reading)
        if len(begun) > _AHEAD:
            yield begun.popleft().rows()
    while begun:
        # There may be only one, which nothing has started.
        begun[-1].start()
        yield begun.popleft().rows()
