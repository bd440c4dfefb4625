"""Text that users wrote: files, and what arrives on stdin."""

import sys
from pathlib import Path

from ..errors import IFPError


def decode(data: bytes, name: str) -> str:
    """Text as its writer sees it, whichever system it was written on.

    A byte order mark is no part of the text, and every line ends in ``\\n``.

    Args:
        data (bytes): UTF-8.
        name (str): what the text is, for the error.

    Raises:
        IFPError: if it is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IFPError(f"{name} is not a text file: it is not UTF-8.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | Path) -> str:
    """The text of a file, see :func:`decode`, without the newline that ends its last line.

    Raises:
        IFPError: if the file is not UTF-8.
        OSError: if it cannot be read.
    """
    return decode(Path(path).read_bytes(), str(path)).removesuffix("\n")


def read_stdin() -> str:
    """The text on stdin, read as :func:`read_text` reads a file; empty if there is no stdin.

    The encoding of the terminal does not matter: what is piped in is a file.

    Raises:
        IFPError: if it is not UTF-8.
    """
    # Without a standard input Python has None there.
    if sys.stdin is None:
        return ""
    stream = getattr(sys.stdin, "buffer", None)
    data = sys.stdin.read().encode() if stream is None else stream.read()
    return decode(data, "stdin").removesuffix("\n")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8, whatever the locale says."""
    Path(path).write_text(text, encoding="utf-8")
