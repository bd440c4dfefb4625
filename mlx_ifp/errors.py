"""The one exception users meet, and what other libraries' exceptions say in its line."""

import contextlib
import sys
from collections.abc import Iterator

# A longer list is cut off.
_LINES = 5


class IFPError(Exception):
    """Something the user can mend; the message is one line that says how.

    It derives from ``Exception`` alone, so that no catch of a narrower kind swallows it.
    """


def reason_of(error: Exception) -> str:
    """One line of another library's error.

    The first line counts, and the next ones too where it goes on: after a colon, and through a
    list. The hub's errors say only in their last lines that a repository is gated, private or
    missing: they are given whole.
    """
    hub = sys.modules.get("huggingface_hub.errors")
    if hub is not None and isinstance(error, hub.HFValidationError):
        return "there is no such file or directory, and it is no name of a repository"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        # A KeyError's text is the key alone.
        return repr(error)
    if hub is not None and isinstance(error, hub.HfHubHTTPError):
        return " ".join(lines)
    ends = (i for i, line in enumerate(lines, 1) if not line.endswith((":", ",")))
    count = next(ends, len(lines))
    cut = " ..." if count > _LINES else ""
    return " ".join(lines[: min(count, _LINES)]).rstrip(",") + cut


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Whatever another library raises inside becomes an IFPError: ``what``, and its reason.

    Args:
        what (str): what did not succeed, such as ``"MODEL cannot be loaded"``.

    Raises:
        IFPError: ``{what}: {reason}``; one that is raised inside passes as it is.
    """
    try:
        yield
    except IFPError:
        raise
    except Exception as error:
        raise IFPError(f"{what}: {reason_of(error)}") from error
