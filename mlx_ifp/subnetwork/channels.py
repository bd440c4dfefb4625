"""FFN channels on disk -> chosen rows in memory. Nothing else is read."""

import math
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..device import copy_to_device, shares_memory
from ..errors import IFPError
from ..files.tensor_files import DTYPES, TensorInfo

Part = tuple[str, np.ndarray | None]

# Reading and copying release the GIL. More threads help with a cold disk and do no harm with a
# warm one.
_THREADS = 4
# Rows that are closer in the file than this are read together with what lies between them, because
# one request of some more bytes costs less than two. In a small tensor the mean of all gaps counts.
_GAP_BYTES = 64 << 10
# A run of at least this length is read straight to where it belongs. Shorter ones are read with
# their surroundings and picked out.
_RUN_BYTES = 256 << 10
# Such reads have this size, so that they stay in the processor's cache until rows are picked out.
_BLOCK_BYTES = 1 << 20


class ChannelReader:
    """Reads rows of channel tensors. Rows that lie in runs are read straight to where they belong.

    They belong in MLX's buffers. If the device has memory of its own, they are read to the host's
    memory and then copied.

    Files are read, not mapped: if one is truncated meanwhile, there is an error, whereas a memory
    map would end the process. The operating system's page cache is the only cache. Thread-safe.

    Args:
        tensors (dict): name -> tensor, as in
            :class:`~mlx_ifp.checkpoint.directory.Checkpoint`.

    Attributes:
        pool: threads for reading and copying rows.
    """

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._lock = threading.Lock()
        self._bytes_read = 0
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="channels")
        self._files = {path: _File(path) for path in {tensor.path for tensor in tensors.values()}}

    @property
    def bytes_read(self) -> int:
        """Bytes of rows read so far, over all calls."""
        return self._bytes_read

    @property
    def nbytes(self) -> int:
        """Bytes of all channels on disk."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def read(self, groups: list[list[Part]]) -> list[mx.array]:
        """Read rows of several tensors.

        Args:
            groups (list): for each wanted array, its parts from top to bottom. A part is
                (name, rows), where rows is an int array [k] of channels, ascending, or None for
                all. A fused ``gate_up_proj`` is two parts, which are read without another copy.

        Returns:
            list: for each group an evaluated array [sum of its k, ...] in the type it has on disk.

        Raises:
            IFPError: if a file has been changed since it was opened, or cannot be read.
        """
        wanted = [self._shape_and_type(group) for group in groups]
        shared = shares_memory()
        if shared:
            arrays = [mx.zeros(*each) for each in wanted]
            targets = row_bytes(arrays)
        else:
            targets = [
                np.empty((shape[0], math.prod(shape[1:]) * dtype.size), np.uint8)
                for shape, dtype in wanted
            ]
        self._read_into(groups, targets)
        if not shared:
            arrays = [
                copy_to_device(target).view(dtype).reshape(shape)
                for target, (shape, dtype) in zip(targets, wanted, strict=True)
            ]
            mx.eval(arrays)
        with self._lock:
            self._bytes_read += sum(array.nbytes for array in arrays)
        return arrays

    def _count(self, part: Part) -> int:
        name, rows = part
        return self._tensors[name].shape[0] if rows is None else len(rows)

    def _shape_and_type(self, group: list[Part]) -> tuple[tuple[int, ...], mx.Dtype]:
        """Those of the array that a group's parts are read to."""
        first = self._tensors[group[0][0]]
        return (sum(map(self._count, group)), *first.shape[1:]), DTYPES[first.dtype]

    def _read_into(self, groups: list[list[Part]], targets: list[np.ndarray]) -> None:
        """Read each group's rows to its target, uint8 [rows, bytes of a row]."""
        reads = []
        for group, target in zip(groups, targets, strict=True):
            start = 0
            for part in group:
                name, rows = part
                info, stop = self._tensors[name], start + self._count(part)
                reads.append((self._files[info.path], info, rows, target[start:stop]))
                start = stop
        list(self.pool.map(_read_rows, reads))
        # This finds any change since the file was opened, also one that no read has noticed.
        for file in {file for file, *_ in reads}:
            file.check()


def row_bytes(arrays: list[mx.array]) -> list[np.ndarray]:
    """The arrays' own memory, each as uint8 [rows, bytes of a row].

    This works only where :func:`~mlx_ifp.device.shares_memory`. Whoever writes to it must be the
    only one who has seen the array. They are plain bytes, because numpy has no bfloat16.
    """
    views = [array.view(mx.uint16) if array.dtype == mx.bfloat16 else array for array in arrays]
    mx.eval(arrays, views)
    return [
        np.asarray(view).reshape(len(view), -1).view(np.uint8)
        if view.size
        else np.empty((0, math.prod(view.shape[1:]) * view.itemsize), np.uint8)
        for view in views
    ]


def _read_rows(read: tuple["_File", TensorInfo, np.ndarray | None, np.ndarray]) -> None:
    """Read rows of a tensor to ``target``, uint8 [k, bytes of a row]."""
    file, info, rows, target = read
    if info.places is not None:
        _read_places(file, info, info.places if rows is None else info.places[rows], target)
        return
    if rows is None or not len(rows):
        file.read_into(target, info.offset)
        return
    row = target.shape[1]
    span = int(rows[-1] - rows[0]) + 1
    if span * row <= _BLOCK_BYTES and (span - len(rows)) * row <= len(rows) * _GAP_BYTES:
        # All are read at once: in a small tensor it costs more to find wide gaps than to read them.
        stretches: Iterable[tuple[int, int]] = [(0, len(rows))]
    else:
        stretches = _stretches(rows, row)
    for start, stop in stretches:
        first, height = int(rows[start]), int(rows[stop - 1] - rows[start]) + 1
        part = target[start:stop]
        offset = info.offset + first * row
        if height == stop - start:
            file.read_into(part, offset)
        else:
            block = _scratch(height * row).reshape(height, row)
            file.read_into(block, offset)
            # mode="clip" lets numpy write to `out` directly; the rows are all there.
            np.take(block, rows[start:stop] - first, axis=0, out=part, mode="clip")


def _read_places(file: "_File", info: TensorInfo, places: np.ndarray, target: np.ndarray) -> None:
    """Read channels that are stored in another order: row ``places[i]`` goes to ``i``."""
    row = target.shape[1]
    order = np.argsort(places)
    rows = places[order]
    # Each row is one item, which numpy moves as a whole.
    target = target.view(f"V{row}")[:, 0]
    for start, stop in _stretches(rows, row, cut_runs=True) if len(rows) else ():
        first, height = int(rows[start]), int(rows[stop - 1] - rows[start]) + 1
        block = _scratch(height * row)
        file.read_into(block, info.offset + first * row)
        block = block.view(f"V{row}")
        if height > stop - start:
            block = block[rows[start:stop] - first]
        target[order[start:stop]] = block


_local = threading.local()


def _scratch(nbytes: int) -> np.ndarray:
    """Memory that this thread keeps: new pages for every read would cost more than the read."""
    have = getattr(_local, "scratch", None)
    if have is None or have.nbytes < nbytes:
        have = _local.scratch = np.empty(max(nbytes, _BLOCK_BYTES), np.uint8)
    return have[:nbytes]


def _stretches(rows: np.ndarray, row: int, cut_runs: bool = False) -> Iterator[tuple[int, int]]:
    """Cut ascending rows of ``row`` bytes into stretches to read at once: (start, stop).

    A long run is a stretch of its own. Shorter ones are read some rows at a time, together with
    their gaps if those are small. With ``cut_runs`` long runs are treated in the same way.
    """
    steps = np.diff(rows)
    starts = np.concatenate([[0], np.flatnonzero(steps != 1) + 1])
    cuts = (steps[starts[1:] - 1] - 1) * row > _GAP_BYTES
    if not cut_runs:
        long = np.diff(starts, append=len(rows)) * row >= _RUN_BYTES
        cuts |= long[1:] | long[:-1]
    cuts = starts[1:][cuts].tolist()
    block = max(1, _BLOCK_BYTES // row)
    for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        while start < stop:
            end = start + int(np.searchsorted(rows[start:stop], rows[start] + block))
            if not cut_runs and rows[stop - 1] - rows[start] + 1 == stop - start:
                end = stop
            yield start, end
            start = end


class _File:
    """An open file, which must stay as it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise IFPError(f"{path}: {error.strerror}; the checkpoint is gone.") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._state = self._now()

    def _now(self) -> tuple[int, int]:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise IFPError(f"{self._path}: {error.strerror}; the checkpoint is gone.") from error
        return stat.st_size, stat.st_mtime_ns

    def check(self) -> None:
        """Raises IFPError if it is another file now, or has another content."""
        if self._now() != self._state:
            raise IFPError(f"{self._path} was changed while in use. Load the checkpoint again.")

    def read_into(self, target: np.ndarray, offset: int) -> None:
        """Fill a contiguous array with the bytes from an offset on."""
        view = target.data.cast("B") if target.size else memoryview(b"")
        while view:
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise IFPError(f"{self._path} cannot be read: {error.strerror}.") from error
            if count == 0:
                raise IFPError(
                    f"{self._path} was changed while in use: it ends at byte {offset:,}. "
                    "Load the checkpoint again."
                )
            view = view[count:]
            offset += count
