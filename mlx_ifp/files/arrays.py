"""Arrays on disk that are filled row by row."""

from pathlib import Path

import numpy as np


def write_zeros(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """Make a zeroed ``.npy`` file, and write every byte of it.

    Otherwise a full disk would only show when the mapped array is filled, as a SIGBUS.

    Raises:
        OSError: if the disk is full or the path cannot be written.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
              "shape": shape}  # fmt: skip
    left = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        while left:
            left -= file.write(bytes(min(left, 1 << 24)))


def is_array(path: Path, dtype: type, shape: tuple[int, ...]) -> bool:
    """Whether a whole ``.npy`` file of this type and shape is there."""
    if not path.exists():
        return False
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except ValueError:
        return False
    return found.shape == shape and found.dtype == dtype
