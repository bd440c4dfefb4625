"""The one exception users meet, and what other libraries' exceptions say in its line."""

import contextlib
import sys
from collections.abc import Iterator


class IFPError(ValueError):
    """Something the user can mend; the message is one line that says how."""


def reason_of(error: Exception) -> str:
    """One line of another library's error.

    The hub's errors say only in their last lines that a repository is gated, private or missing.
    Other libraries' first line is the one that counts.
    """
    if _is_of_hub(error, "HFValidationError"):
        return "there is no such file or directory, and it is no name of a repository"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return repr(error)
    return " ".join(lines) if _is_of_hub(error, "HfHubHTTPError") else lines[0]


def _is_of_hub(error: Exception, name: str) -> bool:
    # An error of the hub's library exists only after that library has been imported.
    hub = sys.modules.get("huggingface_hub.errors")
    return hub is not None and isinstance(error, getattr(hub, name))


@contextlib.contextmanager
def one_line(model: str) -> Iterator[None]:
    """Errors of mlx-lm, transformers and the hub, said in one line that names the model."""
    try:
        yield
    except IFPError:
        raise
    except Exception as error:
        raise IFPError(f"{model} cannot be loaded: {reason_of(error)}") from error
