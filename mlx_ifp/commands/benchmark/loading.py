"""What loading is compared with: a copy in memory, and a sequential read of the same files."""

import os
import statistics
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...errors import IFPError
from ...model import IFPModel
from ...selection.selection import Selection
from ...subnetwork.rows import begin_layer, read_in_turn

_COPY_BYTES = 256 << 20
_COPIES = 5
_READ_BYTES = 8 << 20
# So many pages of a file are tried, to see whether they are in memory.
_PROBES = 64


def copy_seconds(nbytes: int) -> float:
    """Seconds numpy takes to copy so many bytes to newly allocated memory, as loading does.

    The median of a few times: whether the system has pages at hand makes a large difference.
    """
    source = np.ones(min(nbytes, _COPY_BYTES), np.uint8)

    def once() -> float:
        left, copies = nbytes, []
        start = time.perf_counter()
        while left:
            copies.append(source[: min(left, _COPY_BYTES)].copy())
            left -= len(copies[-1])
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(_COPIES))


def loading_parts(model: IFPModel, selection: Selection) -> dict[str, float]:
    """What loading consists of, each part alone, while the files are in the system's memory.

    Returns:
        dict: seconds of ``rows``, all of the sub-network's rows as loading reads them; of
        ``arrays``, making as many arrays of their sizes; of ``read``, one thread's sequential read
        of as many bytes as are touched; and ``touched_bytes``, which include what lies between
        wanted rows.
    """
    reader, ffns, dtype = model.reader, model.checkpoint.ffns, model.parent.dtype
    # Where MLX keeps freed buffers, they would be at hand.
    mx.clear_cache()
    before, start = reader.bytes_touched, time.perf_counter()
    readings = (begin_layer(reader, ffns, selection, i, dtype) for i in range(len(ffns)))
    rows = list(read_in_turn(readings))
    seconds = {"rows": time.perf_counter() - start}
    touched = reader.bytes_touched - before
    shapes = [(array.shape, array.dtype) for layer in rows for array in layer.arrays.values()]
    del rows
    mx.clear_cache()
    start = time.perf_counter()
    mx.eval([mx.zeros(*each) for each in shapes])
    seconds["arrays"] = time.perf_counter() - start
    paths = sorted({tensor.path for tensor in model.checkpoint.channels.values()})
    start = time.perf_counter()
    read_files(paths, touched)
    return seconds | {"read": time.perf_counter() - start, "touched_bytes": touched}


def read_files(paths: list[Path], nbytes: int | None = None) -> int:
    """Read bytes one after another, from the beginning of some files on.

    Args:
        paths (list): of the files.
        nbytes (int): how many; None reads all.

    Returns:
        int: how many there were.
    """
    size = sum(path.stat().st_size for path in paths)
    left = wanted = size if nbytes is None else min(nbytes, size)
    buffer = memoryview(bytearray(_READ_BYTES))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while left and (count := file.readinto(buffer[: min(left, _READ_BYTES)])):
                left -= count
    return wanted - left


class ColdFiles:
    """Files whose content the system can be made to forget.

    Args:
        paths (list): of the files.

    Raises:
        IFPError: where the system has no such call: macOS.
    """

    def __init__(self, paths: list[Path]) -> None:
        check_cold()
        self.paths = paths

    def drop(self) -> float:
        """Let the system forget the files.

        Returns:
            float: the share of the files that was tried and found in memory still; -1 if the
            file system cannot tell. Pages that a process has mapped are not forgotten.
        """
        for path in self.paths:
            with open(path, "rb") as file:
                # What is not on the disk yet cannot be forgotten.
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = [there for path in self.paths for there in _in_memory(path)]
        return sum(found) / len(found) if found else -1.0

    def read(self, nbytes: int | None = None) -> int:
        """See :func:`read_files`."""
        return read_files(self.paths, nbytes)


def check_cold() -> None:
    """Raises IFPError if files cannot be made cold here."""
    if not hasattr(os, "posix_fadvise"):
        raise IFPError("--cold works on Linux only: this system has no posix_fadvise.")


def _in_memory(path: Path) -> list[bool]:
    """Whether pages spread over a file are in memory; empty if the file system cannot tell."""
    found = []
    with open(path, "rb", buffering=0) as file:
        size = path.stat().st_size
        for i in range(_PROBES):
            try:
                # The call gives what is there at once, and does not read what is not.
                os.preadv(file.fileno(), [bytearray(1)], size * i // _PROBES, os.RWF_NOWAIT)
                found.append(True)
            except BlockingIOError:
                found.append(False)
            except (OSError, AttributeError):
                return []
    return found


def cold_seconds(
    model: IFPModel, selection: Selection, nbytes: int, files: ColdFiles
) -> dict[str, float]:
    """Loading a sub-network, and sequential reads to compare it with, all from cold files.

    The sub-networks in memory are dropped. Afterwards the files are warm again.

    Args:
        model (IFPModel): in use.
        selection (Selection): what to load.
        nbytes (int): bytes of channels it takes.
        files (ColdFiles): the checkpoint's channels.

    Returns:
        dict: seconds of loading; of a sequential read of as many bytes as the sub-network takes;
        of one of as many as loading touched, which include what lies between wanted rows; these
        bytes; and ``still_in_memory``, the share of the files that was not cold.
    """
    model.networks.clear()
    still, before = files.drop(), model.reader.bytes_touched
    start = time.perf_counter()
    model.subnetwork(selection)
    loading, touched = time.perf_counter() - start, model.reader.bytes_touched - before
    reading = []
    for count in (nbytes, touched):
        still = max(still, files.drop())
        start = time.perf_counter()
        files.read(count)
        reading.append(time.perf_counter() - start)
    files.read()
    return {
        "cold_load_seconds": loading,
        "sequential_read_seconds": reading[0],
        "touched_bytes": touched,
        "touched_read_seconds": reading[1],
        "still_in_memory": still,
    }
