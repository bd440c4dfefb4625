"""Ask the system to read parts of files before they are needed."""

import contextlib
import fcntl
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

# A file, and where in it: (first byte, bytes). The whole file has the length 0.
Range = tuple[Path, int, int]

# macOS has a call of its own, which Python's fcntl does not name: see fcntl(2) there.
_F_RDADVISE = 44
# Linux begins to read no more than this for one request, and forgets the rest.
_MOST_BYTES = 128 << 10


def read_ahead(ranges: Callable[[], Iterable[Range]]) -> threading.Thread:
    """Let the system read parts of files into its cache, while this process does something else.

    The process itself reads nothing, so that no byte is copied twice. What cannot be read is left
    to whoever reads it in earnest, and so is the error. A system without such a call does nothing.

    Args:
        ranges (Callable): gives the parts; it runs in the thread.

    Returns:
        Thread: which asks. Nobody needs to wait for it.
    """
    thread = threading.Thread(target=_ask, args=(ranges,), name="read-ahead", daemon=True)
    thread.start()
    return thread


def _ask(ranges: Callable[[], Iterable[Range]]) -> None:
    files: dict[Path, int] = {}
    try:
        with contextlib.suppress(Exception):
            for path, offset, nbytes in ranges():
                # One that is missing does not keep the others.
                with contextlib.suppress(OSError):
                    if path not in files:
                        files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                    advise(files[path], offset, nbytes or os.fstat(files[path]).st_size)
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def advise(descriptor: int, offset: int, nbytes: int) -> None:
    """Tell the system that a part of an open file will be needed."""
    for start in range(offset, offset + nbytes, _MOST_BYTES):
        length = min(_MOST_BYTES, offset + nbytes - start)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
        elif sys.platform == "darwin":
            # struct radvisory: off_t, int, and what fills it up.
            fcntl.fcntl(descriptor, _F_RDADVISE, struct.pack("=qi4x", start, length))
