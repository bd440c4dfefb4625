"""FFN channels on disk -> chosen rows in memory. Nothing else is read."""

import math
import os
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
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
# Rows of at least this length are read straight to where they belong also where they lie alone: one
# request takes many targets, and what lies between goes to a scratch that stays in the processor's
# cache. For shorter rows a list of targets takes longer than to pick them out.
_LONG_ROW_BYTES = 8 << 10
# The system takes so many targets in one request: at least 16 by POSIX, whatever it says.
_TARGETS = max(16, min(1024, os.sysconf("SC_IOV_MAX")))
# A run of at least this length is read straight to where it belongs. Shorter ones are read with
# their surroundings and picked out.
_RUN_BYTES = 256 << 10
# Such reads have this size, so that they stay in the processor's cache until rows are picked out.
_BLOCK_BYTES = 1 << 20
# A thread reads tensors for at least so many bytes of rows at a time.
_WORK_BYTES = 512 << 10

# What a thread reads: rows of a tensor in a file, to uint8 [k, bytes of a row].
_Read = tuple["_File", TensorInfo, np.ndarray | None, np.ndarray]


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
        self._bytes_read = self._bytes_touched = 0
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="channels")
        self._files = {path: _File(path) for path in {tensor.path for tensor in tensors.values()}}

    @property
    def bytes_read(self) -> int:
        """Bytes of rows read so far, over all calls."""
        return self._bytes_read

    @property
    def bytes_touched(self) -> int:
        """Bytes asked of the system so far: those of rows, and what was read between them."""
        return self._bytes_touched

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
        return self.begin(groups).arrays()

    def begin(self, groups: list[list[Part]]) -> "Reading":
        """Begin to read rows; the arguments are those of :meth:`read`."""
        return Reading(self, groups)

    def count(self, nbytes: int, touched: int) -> None:
        """Add to :attr:`bytes_read` and :attr:`bytes_touched`."""
        with self._lock:
            self._bytes_read += nbytes
            self._bytes_touched += touched

    def _count(self, part: Part) -> int:
        name, rows = part
        return self._tensors[name].shape[0] if rows is None else len(rows)

    def shape_and_type(self, group: list[Part]) -> tuple[tuple[int, ...], mx.Dtype]:
        """Those of the array that a group's parts are read to."""
        first = self._tensors[group[0][0]]
        return (sum(map(self._count, group)), *first.shape[1:]), DTYPES[first.dtype]

    def submit(self, groups: list[list[Part]], targets: list[np.ndarray]) -> list[Future]:
        """Let the pool read each group's rows to its target, uint8 [rows, bytes of a row]."""
        works: list[list[_Read]] = [[]]
        for group, target in zip(groups, targets, strict=True):
            start = 0
            for part in group:
                name, rows = part
                info, stop = self._tensors[name], start + self._count(part)
                # A thread gets several small tensors at once.
                if sum(read[-1].nbytes for read in works[-1]) >= _WORK_BYTES:
                    works.append([])
                works[-1].append((self._files[info.path], info, rows, target[start:stop]))
                start = stop
        return [self.pool.submit(_read_all, work) for work in works]

    def check(self, groups: list[list[Part]]) -> None:
        """Raises IFPError if a file of these was changed, also if no read has noticed."""
        for path in {self._tensors[name].path for group in groups for name, _ in group}:
            self._files[path].check()


class Reading:
    """Rows that are being read.

    Their arrays are made at once, in the background. A read can begin when they are there.

    Args:
        reader (ChannelReader): what reads.
        groups (list): as in :meth:`ChannelReader.read`.
    """

    def __init__(self, reader: ChannelReader, groups: list[list[Part]]) -> None:
        self._reader, self._groups = reader, groups
        self._wanted = [reader.shape_and_type(group) for group in groups]
        self._shared = shares_memory()
        self._arrays: list[mx.array] = []
        self._targets: list[np.ndarray] = []
        self._futures: list[Future] | None = None
        if self._shared:
            self._arrays = [mx.zeros(*each) for each in self._wanted]
            mx.async_eval(self._arrays)

    def start(self) -> None:
        """Let the pool read, unless it does already."""
        if self._futures is not None:
            return
        if self._shared:
            self._targets = row_bytes(self._arrays)
        else:
            self._targets = [
                np.empty((shape[0], math.prod(shape[1:]) * dtype.size), np.uint8)
                for shape, dtype in self._wanted
            ]
        self._futures = self._reader.submit(self._groups, self._targets)

    def arrays(self) -> list[mx.array]:
        """Wait for them: see :meth:`ChannelReader.read`."""
        self.start()
        assert self._futures is not None  # they were just started
        # If one fails, the others must not read on behind the caller's back.
        failures = [future.exception() for future in self._futures]
        for failure in filter(None, failures):
            raise failure
        self._reader.check(self._groups)
        if not self._shared:
            self._arrays = [
                copy_to_device(target).view(dtype).reshape(shape)
                for target, (shape, dtype) in zip(self._targets, self._wanted, strict=True)
            ]
            mx.eval(self._arrays)
        touched = sum(future.result() for future in self._futures)
        self._reader.count(sum(array.nbytes for array in self._arrays), touched)
        return self._arrays


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


def _read_all(reads: list[_Read]) -> int:
    """Read rows of some tensors; how many bytes were asked for."""
    return sum(_read_rows(*read) for read in reads)


def _read_rows(file: "_File", info: TensorInfo, rows: np.ndarray | None, target: np.ndarray) -> int:
    """Read rows of a tensor to ``target``, uint8 [k, bytes of a row]; the bytes asked for."""
    if info.places is not None:
        return _read_places(file, info, info.places if rows is None else info.places[rows], target)
    if rows is None or not len(rows):
        return file.read_into(target, info.offset)
    row = target.shape[1]
    # numpy takes rows by numbers of this type without another copy of them.
    rows = rows.astype(np.intp)
    if row >= _LONG_ROW_BYTES:
        return _read_long_rows(file, info, rows, target)
    span = int(rows[-1] - rows[0]) + 1
    if span * row <= _BLOCK_BYTES and (span - len(rows)) * row <= len(rows) * _GAP_BYTES:
        # All are read at once: in a small tensor it costs more to find wide gaps than to read them.
        stretches = [(0, len(rows), int(rows[0]), span)]
    else:
        starts, stops = _stretches(rows, row)
        heights = rows[stops - 1] - rows[starts] + 1
        columns = (starts, stops, rows[starts], heights)
        stretches = list(zip(*(column.tolist() for column in columns), strict=True))
    touched = 0
    for start, stop, top, height in stretches:
        part, offset = target[start:stop], info.offset + top * row
        if height == stop - start:
            touched += file.read_into(part, offset)
        else:
            block = _scratch(height * row).reshape(height, row)
            touched += file.read_into(block, offset)
            # mode="clip" lets numpy write to `out` directly; the rows are all there.
            block.take(rows[start:stop] - top, axis=0, out=part, mode="clip")
    return touched


def _read_long_rows(file: "_File", info: TensorInfo, rows: np.ndarray, target: np.ndarray) -> int:
    """Read runs of rows straight to where they belong, many in one request."""
    row = target.shape[1]
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    starts, stops = np.append(0, ends), np.append(ends, len(rows))
    # The last run has nothing behind it.
    gaps = np.append((rows[starts[1:]] - rows[stops[:-1] - 1] - 1) * row, _GAP_BYTES + 1)
    between = _scratch(_GAP_BYTES).data
    targets: list[memoryview] = []
    touched = 0
    columns = (starts, stops, rows[starts], gaps)
    for start, stop, top, gap in zip(*(column.tolist() for column in columns), strict=True):
        if not targets:
            offset = info.offset + top * row
        targets.append(target[start:stop].data.cast("B"))
        if gap > _GAP_BYTES or len(targets) + 1 >= _TARGETS:
            touched += file.read_all_into(targets, offset)
            targets = []
        else:
            targets.append(between[:gap])
    return touched


def _read_places(file: "_File", info: TensorInfo, places: np.ndarray, target: np.ndarray) -> int:
    """Read channels that are stored in another order: row ``places[i]`` goes to ``i``."""
    row = target.shape[1]
    order = np.argsort(places)
    rows = places[order]
    # Each row is one item, which numpy moves as a whole.
    target = target.view(f"V{row}")[:, 0]
    touched = 0
    for start, stop in zip(*_stretches(rows, row, cut_runs=True), strict=True):
        first, height = int(rows[start]), int(rows[stop - 1] - rows[start]) + 1
        block = _scratch(height * row)
        touched += file.read_into(block, info.offset + first * row)
        block = block.view(f"V{row}")
        if height > stop - start:
            block = block[rows[start:stop] - first]
        target[order[start:stop]] = block
    return touched


def byte_ranges(info: TensorInfo, channels: np.ndarray | None) -> list[tuple[int, int]]:
    """Where in its file a tensor's rows lie, with small gaps: (first byte, bytes) of each stretch.

    Args:
        info (TensorInfo): the tensor.
        channels (np.ndarray): int [k], ascending; None for all.
    """
    if channels is None:
        return [(info.offset, info.nbytes)]
    rows = channels if info.places is None else np.sort(info.places[channels])
    row = info.nbytes // info.shape[0]
    return [
        (info.offset + int(rows[start]) * row, int(rows[stop - 1] - rows[start] + 1) * row)
        for start, stop in zip(*_stretches(rows, row, cut_runs=True), strict=True)
    ]


_local = threading.local()


def _scratch(nbytes: int) -> np.ndarray:
    """Memory that this thread keeps: new pages for every read would cost more than the read."""
    have = getattr(_local, "scratch", None)
    if have is None or have.nbytes < nbytes:
        have = _local.scratch = np.empty(max(nbytes, _BLOCK_BYTES), np.uint8)
    return have[:nbytes]


def _stretches(rows: np.ndarray, row: int, cut_runs: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Cut ascending rows of ``row`` bytes into stretches to read at once.

    A long run is a stretch of its own. Others are read some rows at a time, together with their
    gaps if those are small. With ``cut_runs`` all runs are treated in this way.

    Returns:
        tuple: where each stretch starts among the rows, and where it stops: int64 [n].
    """
    block, run = max(1, _BLOCK_BYTES // row), -(-_RUN_BYTES // row)
    steps = np.diff(rows)
    # A run as long as this is one if its last row is that far from its first.
    long_runs = not cut_runs and bool((rows[run - 1 :] - rows[: 1 - run or None] == run - 1).any())
    cuts = steps > 1 + _GAP_BYTES // row
    if long_runs:
        ends = np.flatnonzero(steps != 1) + 1
        long = np.diff(ends, prepend=0, append=len(rows)) >= run
        cuts[ends[long[1:] | long[:-1]] - 1] = True
    ends = np.flatnonzero(cuts) + 1
    starts, stops = np.append(0, ends)[: len(rows)], np.append(ends, len(rows))[: len(rows)]
    heights = rows[stops - 1] - rows[starts] + 1
    large = heights > block
    if not cut_runs:
        large &= heights != stops - starts
    if not large.any():
        return starts, stops
    edges = [
        np.searchsorted(rows[:stop], np.arange(rows[start], rows[stop - 1] + 1 + block, block))
        if is_large
        else np.array([start, stop])
        for start, stop, is_large in zip(starts, stops, large, strict=True)
    ]
    starts = np.concatenate([each[:-1] for each in edges])
    stops = np.concatenate([each[1:] for each in edges])
    return starts[starts < stops], stops[starts < stops]


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

    def read_into(self, target: np.ndarray, offset: int) -> int:
        """Fill a contiguous array with the bytes from an offset on; how many there were."""
        return self.read_all_into([target.data.cast("B")], offset) if target.size else 0

    def read_all_into(self, targets: list[memoryview], offset: int) -> int:
        """Fill targets one after another with the bytes from an offset on; how many there were."""
        nbytes = sum(map(len, targets))
        while targets:
            try:
                count = os.preadv(self._descriptor, targets, offset)
            except OSError as error:
                raise IFPError(f"{self._path} cannot be read: {error.strerror}.") from error
            if count == 0:
                raise IFPError(
                    f"{self._path} was changed while in use: it ends at byte {offset:,}. "
                    "Load the checkpoint again."
                )
            offset += count
            full = 0
            while full < len(targets) and count >= len(targets[full]):
                count -= len(targets[full])
                full += 1
            targets = targets[full:]
            if targets:
                targets[0] = targets[0][count:]
        return nbytes
