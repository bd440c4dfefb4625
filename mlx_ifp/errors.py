"""The one exception users meet, and what other libraries' exceptions say in its line."""

import contextlib
import sys
from collections.abc import Iterator


class IFPError(Exception):
    """Something the user can mend; the message is one line that says how.

    It derives from ``Exception`` alone, so that no catch of a narrower kind swallows it.
    """


def reason_of(error: Exception) -> str:
    """One line of another library's error.

    The first line counts, and the next one too where that ends in a colon. The hub's errors say
    only in their last lines that a repository is gated, private or missing: they are given whole.
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
    last = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: last + 1])


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
