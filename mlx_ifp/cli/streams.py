"""The standard streams of a command, which may be closed, broken, or of a narrow encoding."""

import contextlib
import io
import os
import sys

_NAMES = ("stdin", "stdout", "stderr")


def open_streams() -> None:
    """Give a command three streams that take all it says.

    A descriptor that is closed gets the null device. Otherwise the next file that is opened would
    get its number, and what is printed to the stream would end up in that file. Characters that an
    output's encoding lacks are replaced.
    """
    for descriptor, name in enumerate(_NAMES):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system gives the lowest number that is free, and those below it are taken.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        # Python's own stderr replaces characters already, by their escapes.
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")


def close_output() -> None:
    """Flush stdout; from then on nothing that is left in it can fail.

    Raises:
        OSError: if it cannot be written: its reader has gone, or the disk is full.
    """
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()
        raise


def discard_output() -> None:
    """Let what is still buffered in stdout go nowhere, so that it does not fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(line: str) -> None:
    """Print a line to stderr, or nothing if nobody can read it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
