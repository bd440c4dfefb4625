"""The one exception that users meet, and how other libraries' exceptions become one."""

import contextlib
import sys
from collections.abc import Iterator


class IFPError(Exception):
    """Something the user can mend; the message is one line that says how.

    It derives from ``Exception`` alone, so that no catch of a narrower kind swallows it.
    """


# A line with such an ending goes on in the next one. So many characters of them are kept.
_GOES_ON = (":", ",", ";")
_LONGEST = 400


def reason_of(error: Exception) -> str:
    """What another library's error says, in one line.

    The first line counts. Where it announces more, with a colon, or goes on, with a comma, the next
    lines count too, up to a sentence's length. The hub's errors say only in their last lines that a
    repository is gated, private or missing, so they are given whole.
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
    reason = lines[0]
    for line in lines[1:]:
        if not reason.endswith(_GOES_ON):
            break
        if len(reason) + len(line) > _LONGEST:
            return f"{reason} ..."
        reason += f" {line}"
    if reason.endswith(":") and isinstance(error.__cause__, Exception):
        return f"{reason} {reason_of(error.__cause__)}"
    return reason


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
