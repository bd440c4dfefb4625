"""FFN channels on disk -> chosen rows in memory, and nothing else."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from .errors import IFPError
from .tensor_files import DTYPES, TensorInfo

Part = tuple[str, np.ndarray | None]

# Copying rows releases the GIL; more threads help a cold disk and do no harm to a warm one.
_THREADS = 4


class ChannelReader:
    """Reads rows of channel tensors through a memory map, straight into MLX's buffers.

    The operating system's page cache is the only cache. Thread-safe.

    Args:
        tensors (dict): name -> tensor, as :class:`~mlx_ifp.checkpoint.Checkpoint` has them.
    """

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._lock = threading.Lock()
        self._bytes_read = 0
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="channels")
        self._maps = {path: _Map(path) for path in {tensor.path for tensor in tensors.values()}}

    @property
    def bytes_read(self) -> int:
        """Bytes of rows read so far, over all calls."""
        return self._bytes_read

    @property
    def nbytes(self) -> int:
        """Bytes of all channels on disk."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, groups: list[list[Part]]) -> list[mx.array]:
        """Read rows of several tensors.

        Args:
            groups (list): for each wanted array, its parts from top to bottom. A part is
                (name, rows): rows is an int array [k] of channels, or None for all. A fused
                ``gate_up_proj`` is two parts, which are read to where they belong, uncopied.

        Returns:
            list: for each group an evaluated array [sum of its k, ...] in the type it has on disk.

        Raises:
            IFPError: if a file has been changed since it was opened.
        """
        for path in {self._tensors[name].path for group in groups for name, _ in group}:
            self._maps[path].check()
        # Rows are moved as plain bytes: numpy has no bfloat16, and a tensor in a safetensors
        # file need not be aligned.
        buffers, copies = [], []
        for group in groups:
            sources = [self._rows(name) for name, _ in group]
            counts = [
                len(source) if rows is None else len(rows)
                for source, (_, rows) in zip(sources, group, strict=True)
            ]
            buffer = mx.zeros((sum(counts), sources[0].shape[1]), mx.uint8)
            buffers.append(buffer)
            start = 0
            for source, (_, rows), count in zip(sources, group, counts, strict=True):
                copies.append((source, rows, buffer, start, start + count))
                start += count
        mx.eval(buffers)
        list(self._pool.map(_copy_rows, copies))
        with self._lock:
            self._bytes_read += sum(buffer.nbytes for buffer in buffers)
        arrays = []
        for group, buffer in zip(groups, buffers, strict=True):
            info = self._tensors[group[0][0]]
            shape = (buffer.shape[0], *info.shape[1:])
            arrays.append(buffer.view(DTYPES[info.dtype]).reshape(shape))
        mx.eval(arrays)
        return arrays

    def _rows(self, name: str) -> np.ndarray:
        """A tensor's bytes, uint8 [rows, bytes of a row], in the memory map."""
        info = self._tensors[name]
        data = self._maps[info.path].bytes[info.offset : info.offset + info.nbytes]
        return data.reshape(info.shape[0], -1)


def _copy_rows(copy: tuple[np.ndarray, np.ndarray | None, mx.array, int, int]) -> None:
    source, rows, buffer, start, stop = copy
    # The array was just made and evaluated, and nobody else has seen it, so its buffer may be
    # written in place (unified memory: on Metal too).
    target = np.frombuffer(memoryview(buffer), np.uint8).reshape(buffer.shape)[start:stop]
    if rows is None:
        target[...] = source
    else:
        # mode="clip" lets numpy write to `out` directly; a Selection's channels are in range.
        np.take(source, rows, axis=0, out=target, mode="clip")


class _Map:
    """A file mapped to memory, which must stay as it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = self._now()
        self.bytes = np.memmap(path, dtype=np.uint8, mode="r")

    def _now(self) -> tuple[int, int]:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise IFPError(f"{self._path}: {error.strerror}; the checkpoint is gone.") from error
        return stat.st_size, stat.st_mtime_ns

    def check(self) -> None:
        """A shorter file would crash the process at the first page beyond its end."""
        if self._now() != self._state:
            raise IFPError(f"{self._path} was changed while in use. Load the checkpoint again.")
