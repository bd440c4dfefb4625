"""Lines that a user types or pipes in, and Ctrl-C while an answer comes."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from ...cli.streams import say
from ...errors import IFPError
from ...files.text import decode

PROMPT, GOES_ON = "> ", ". "


def is_terminal() -> bool:
    """Whether somebody types and reads, and no file or pipe."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def typed_lines() -> Iterator[str]:
    """Lines of a terminal, with a prompt, a history and editing; Ctrl-D ends them.

    A line that ends in a backslash goes on in the next one. Ctrl-C drops what was typed.
    """
    with contextlib.suppress(ImportError):
        # The import alone gives input() its history and editing. Some systems lack the library.
        import readline  # noqa: F401
    parts: list[str] = []
    while True:
        try:
            line = input(GOES_ON if parts else PROMPT)
        except EOFError:
            print(flush=True)
            return
        except KeyboardInterrupt:
            print(flush=True)
            say("Ctrl-D ends the chat.")
            parts = []
            continue
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(parts)
            parts = []


def piped_lines() -> Iterator[str | IFPError]:
    """Lines of a pipe or a file, UTF-8 whatever the locale says; as :func:`typed_lines`.

    A line that is no UTF-8 is an error, which does not end them.
    """
    parts: list[str] = []
    for number, data in enumerate(sys.stdin.buffer, 1):
        try:
            line = decode(data, f"Line {number} of stdin").removesuffix("\n")
        except IFPError as error:
            yield error
            continue
        parts.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(parts)
            parts = []
    if parts:
        yield "\n".join(parts)


class Stop:
    """What Ctrl-C does while an answer comes.

    Attributes:
        speaking: the first token is there. Ctrl-C then only sets ``asked``, so that the answer
            ends after a whole token and its keys and values can be kept. Before that, and the
            second time, Ctrl-C raises KeyboardInterrupt.
        asked: whether the answer is to end.
    """

    def __init__(self) -> None:
        self.speaking = self.asked = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked or not self.speaking:
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Let Ctrl-C stop what runs inside, and not the program."""
    stop = Stop()
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
