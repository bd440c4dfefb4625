"""Failures as clients read them: an HTTP status, and an error in OpenAI's and Anthropic's form."""

from typing import Any

from ...errors import IFPError, reason_of
from ...generation.ticket import BusyError, ClosedError, FailedError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Failure(Exception):
    """A request that is answered with an error.

    Args:
        status: the HTTP status.
        message: one line that says what to do.
        param: the field that is wrong.
        code: a word for programs.

    Attributes:
        status, message: as above.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self._param, self._code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The answer.

        OpenAI's form has an object ``error``; Anthropic's has that too, with a ``type`` beside it.
        """
        default = "invalid_request_error" if self.status < 500 else "api_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, default),
            "param": self._param,
            "code": self._code,
        }
        return {"type": "error", "error": error}


def bad_request(message: str, param: str | None = None) -> Failure:
    """A request that its client must change."""
    return Failure(400, message, param)


def failure_of(error: Exception) -> Failure:
    """What a client is told about an exception."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, BusyError):
        return Failure(429, str(error), code="busy")
    if isinstance(error, ClosedError):
        return Failure(503, str(error), code="closing")
    if isinstance(error, FailedError):
        return Failure(500, str(error))
    if isinstance(error, IFPError):
        return Failure(400, str(error))
    return Failure(500, f"Something went wrong here: {reason_of(error)}")
