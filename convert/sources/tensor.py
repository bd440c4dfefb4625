"""A tensor of a source file: its shape and type are known now, its rows are read when needed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_ifp.errors import IFPError
from mlx_ifp.files.tensor_files import BLOCK_BYTES, BLOCKS_HELD, DTYPES, LazyTensor, len_of


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a file.

    Attributes:
        path: the file, for messages.
        name: its name in that file.
        dtype: its type by safetensors' names: ``F32``, ``BF16``, ``I64``, ...
        shape: its shape.
        read: returns rows start to stop, as a numpy array of unsigned bits.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]

    def lazy(self) -> LazyTensor:
        """Make a tensor that can be written as it is.

        Raises:
            IFPError: if MLX has no such type.
        """
        if self.dtype not in DTYPES:
            raise IFPError(
                f"{self.path}: {self.name} has the type {self.dtype}, which is not supported."
            )
        dtype = DTYPES[self.dtype]
        row = max(int(np.prod(self.shape[1:])) * dtype.size, 1)
        return LazyTensor(self.shape, dtype, self.read, max(BLOCK_BYTES // row, 1))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor; a value of an unknown type counts as one byte."""
        size = DTYPES[self.dtype].size if self.dtype in DTYPES else 1
        return int(np.prod(self.shape)) * size

    def array(self) -> mx.array:
        """Read the whole tensor into memory."""
        lazy = self.lazy()
        bits = self.read(0, len_of(self.shape))
        return mx.array(bits).view(lazy.dtype).reshape(self.shape)


class _Buffers:
    """Memory that is used again and again: fresh pages would cost more than reading into them.

    Blocks take turns, so a writer may still hold the last ones. A block that is transposed takes
    two buffers. A larger read gets a buffer of its own, which lasts until the next larger read.
    """

    def __init__(self) -> None:
        self.blocks = [np.empty(0, np.uint8)] * (2 * BLOCKS_HELD + 4)
        self.large = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """Return uint8 [nbytes] whose content is undefined."""
        if nbytes > BLOCK_BYTES:
            if self.large.size < nbytes:
                self.large = np.empty(nbytes, np.uint8)
            return self.large[:nbytes]
        self.blocks.append(self.blocks.pop(0))
        if self.blocks[-1].size < nbytes:
            self.blocks[-1] = np.empty(BLOCK_BYTES, np.uint8)
        return self.blocks[-1][:nbytes]


buffers = _Buffers()


def file_rows(
    path: Path, offset: int, shape: tuple[int, ...], size: int
) -> Callable[[int, int], np.ndarray]:
    """Make a reader of rows that lie in a file one after another.

    What the reader returns stays valid for BLOCKS_HELD more reads.

    Args:
        path: the file.
        offset: where the first row starts, in bytes.
        shape: the tensor's shape.
        size: the bytes of a value.
    """
    row = int(np.prod(shape[1:])) * size

    def read(start: int, stop: int) -> np.ndarray:
        data = buffers.take((stop - start) * row)
        with open(path, "rb", buffering=0) as file:
            file.seek(offset + start * row)
            done = 0
            # One call reads 2 GB at most, so it is repeated.
            while done < data.size and (count := file.readinto(data.data[done:])):
                done += count
        if done < data.size:
            raise IFPError(f"{path}: the file was truncated while it was read; get it again.")
        bits = data.view(f"<u{size}")
        return bits.reshape(stop - start, *shape[1:]) if shape else bits.reshape(())

    return read
