"""Tokens -> pieces of an answer: what it says, what it thinks, and the tools that it calls."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.server import ToolCallFormatter

from ...generation.ticket import Progress, Token


@dataclass
class Piece:
    """What one token adds to an answer.

    Attributes:
        text, reasoning: what is said, and what is thought.
        tool_calls: calls that are complete, in OpenAI's form.
        token: the token; None for a sign of life.
        progress: how much of the prompt was processed, for a sign of life.
        finish_reason: ``stop``, ``length`` or ``tool_calls`` for the last piece, else None.
        stopped_by: the text of ``stop`` that ended the answer, if one did.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    token: Token | None = None
    progress: Progress | None = None
    finish_reason: str | None = None
    stopped_by: str | None = None


class StopText:
    """Holds text back while it may be the beginning of a stop text.

    mlx-lm compares tokens, so a stop text that is made of other tokens than it would be alone does
    not stop it. The text decides here.

    Args:
        stops (list): the texts.

    Attributes:
        found: the stop text that was met, or None.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops, self._held = stops, ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Take more text, and give what is surely said before any stop text."""
        if not self._stops:
            return text
        self._held += text
        at, stop = min(((self._held.find(s), s) for s in self._stops if s in self._held),
                       default=(-1, ""))  # fmt: skip
        if stop:
            self.found, said, self._held = stop, self._held[:at], ""
            return said
        longest = max(len(stop) for stop in self._stops) - 1
        for begin in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[begin:]) for stop in self._stops):
                break
        else:
            begin = len(self._held)
        said, self._held = self._held[:begin], self._held[begin:]
        return said

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._held = self._held, ""
        return rest


class Reader:
    """Reads the events of one answer.

    Args:
        machine: mlx-lm's, which tells text, reasoning and tool calls apart.
        initial: its state where the answer begins.
        formatter: mlx-lm's, which reads tool calls; None if there are no tools.
        stops (list): texts that end the answer.
        ends (set): tokens that end it.
        decode (Callable): gives the text of a token.
        one_call: it also ends after the first tool call.
    """

    def __init__(
        self,
        machine: TextStateMachine,
        initial: str,
        formatter: ToolCallFormatter | None,
        stops: list[str],
        ends: set[int],
        decode: Callable[[int], str],
        one_call: bool = False,
    ) -> None:
        self._state, self._where = machine.make_state(initial), initial
        self._formatter, self._ends, self._one_call = formatter, ends, one_call
        self._stop, self._decode = StopText(stops), decode
        self._tool_text = ""
        self._called = False

    def pieces(self, events: Iterable[Token | Progress]) -> Iterator[Piece]:
        """A piece for each event; the last one has a finish reason."""
        for event in events:
            if isinstance(event, Progress):
                yield Piece(progress=event)
                continue
            piece = self._piece(event)
            yield piece
            if event.finish_reason is not None:
                # Keys and values are kept for the next turn before the events end.
                continue
            if piece.finish_reason is not None:
                return

    def _piece(self, token: Token) -> Piece:
        piece = Piece(token=token)
        self._state, segments = TextStateMachine.split(self._state, token.text)
        if token.finish_reason is not None:
            self._state, rest, state = TextStateMachine.flush(self._state)
            segments.append((state, rest))
        for state, text in segments:
            self._add(piece, state, text)
            if piece.finish_reason is not None:
                return piece
        if token.finish_reason is not None:
            self._finish(piece, token)
        return piece

    def _add(self, piece: Piece, state: str, text: str) -> None:
        if state == "tool":
            self._tool_text += text
        else:
            if self._where == "tool":
                self._call(piece)
            if state == "reasoning":
                piece.reasoning += text
            else:
                piece.text += self._stop.feed(text)
        self._where = state
        if self._stop.found is not None:
            piece.stopped_by = self._stop.found
            piece.finish_reason = self._reason("stop")
        elif self._called and self._one_call:
            piece.finish_reason = "tool_calls"

    def _call(self, piece: Piece) -> None:
        """Read the text of a tool call that is complete; what cannot be read stays text."""
        text, self._tool_text = self._tool_text, ""
        try:
            calls = [] if self._formatter is None else self._formatter([text])
        except Exception:
            # Parsers of mlx-lm raise whatever the model's mistake makes them raise.
            calls = []
        if calls:
            piece.tool_calls += calls[:1] if self._one_call else calls
            self._called = True
        else:
            piece.text += text

    def _finish(self, piece: Piece, token: Token) -> None:
        if self._where == "tool" and self._tool_text:
            self._call(piece)
        if token.finish_reason == "stop" and token.id not in self._ends:
            # The stop text's last token ended the answer, and its text was not given.
            piece.text += self._stop.feed(self._decode(token.id))
            piece.stopped_by = self._stop.found
        else:
            piece.text += self._stop.rest()
        piece.finish_reason = self._reason(token.finish_reason or "stop")

    def _reason(self, reason: str) -> str:
        return "tool_calls" if reason == "stop" and self._called else reason
