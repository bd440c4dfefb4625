"""What every form of an answer has in common: it takes pieces, and gives events or one object."""

import json
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...generation.ticket import Ticket, Token
from .failures import Failure
from .jobs import Job
from .pieces import Piece


@dataclass
class Said:
    """An answer so far.

    Attributes:
        text, reasoning, tool_calls: as in :class:`Piece`, of all pieces.
        tokens: all tokens.
        finish_reason, stopped_by: of the last piece; None until it is there.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    stopped_by: str | None = None

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.tool_calls += piece.tool_calls
        if piece.token is not None:
            self.tokens.append(piece.token)
        if piece.finish_reason is not None:
            self.finish_reason, self.stopped_by = piece.finish_reason, piece.stopped_by


class Form(Protocol):
    """A way to give an answer."""

    def begin(self) -> list[bytes]:
        """What a stream begins with."""

    def piece(self, piece: Piece) -> list[bytes]:
        """What a stream says about a piece."""

    def end(self, said: Said) -> list[bytes]:
        """What a stream ends with."""

    def whole(self, said: Said) -> dict[str, Any]:
        """The answer as one object."""

    def failed(self, failure: Failure) -> list[bytes]:
        """What a stream ends with if something goes wrong."""


def event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data)}\n\n".encode()


def selected(job: Job, ticket: Ticket) -> dict[str, Any]:
    """What was selected for an answer, from where, and what it cost."""
    ready = ticket.ready
    assert ready is not None, "a ticket that gives tokens is ready"
    selection = ready.selection
    return {
        "task": job.choice.task,
        "source": ready.source,
        "k": None if selection is None else selection.k,
        "share": 1.0 if selection is None else selection.share,
        "reuse_overlap": ready.reuse_overlap,
        "select_seconds": ready.select_seconds,
        "load_seconds": ready.load_seconds,
        "bytes_read": ready.bytes_read,
        "channels_reused": ready.channels_reused,
        "prefill": job.prefill,
        "waited_seconds": ticket.waited_seconds,
    }
