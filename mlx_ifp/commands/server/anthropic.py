"""Anthropic's requests are read, and answers are given in its form."""

import json
import uuid
from typing import Any

from ...generation.ticket import Ticket
from . import checks
from .checks import Check, boolean, ignored, json_object, only, read_fields, string
from .failures import Failure, bad_request
from .forms import Said, event, selected
from .jobs import FIELDS, Job, Jobs
from .pieces import Piece

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


def _messages(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise bad_request(f"{name} must be a list, not empty.", name)
    if len(value) > checks.MAX_MESSAGES:
        raise Failure(413, f"{name} may have at most {checks.MAX_MESSAGES:,} messages.", name)
    return value


def _tool_choice(name: str, value: Any) -> dict[str, Any]:
    if json_object(name, value).get("type") not in ("auto", "none"):
        raise bad_request(f'{name}: type must be "auto" or "none" here.', name)
    boolean(f"{name}.disable_parallel_tool_use", value.get("disable_parallel_tool_use", False))
    return value


_SHARED = ("model", "stream", "temperature", "top_p", "top_k", "max_tokens", "metadata")
_OWN = ("task", "keep", "selector", "selection_from", "prefill")
_FIELDS: dict[str, Check] = {name: FIELDS[name] for name in (*_SHARED, *_OWN)} | {
    "messages": _messages,
    "system": ignored,
    "stop_sequences": checks.stops,
    "tools": ignored,
    "tool_choice": _tool_choice,
    "thinking": json_object,
    "service_tier": only("auto", "standard_only"),
}


def read_messages(body: dict[str, Any], jobs: Jobs) -> Job:
    """A request to ``/v1/messages``.

    Raises:
        Failure: if a field is wrong or not supported.
        IFPError: if a message cannot be read.
    """
    given = read_fields(body, _FIELDS)
    for name in ("messages", "max_tokens"):
        if name not in given:
            raise bad_request(f"{name} is missing.", name)
    messages: list[dict[str, Any]] = []
    if "system" in given:
        messages.append({"role": "system", "content": _text(given.pop("system"), "system")})
    for number, message in enumerate(given.pop("messages"), 1):
        messages += _read(message, f"message {number}")
    fields = {name: value for name, value in given.items() if name in FIELDS}
    fields["messages"] = checks.messages("messages", messages)
    fields["stop"] = given.get("stop_sequences", [])
    choice = given.get("tool_choice", {})
    if given.get("tools") and choice.get("type") != "none":
        fields["tools"] = checks.tools("tools", _tools(given["tools"]))
    fields["parallel_tool_calls"] = not choice.get("disable_parallel_tool_use", False)
    if "thinking" in given:
        on = given["thinking"].get("type") in ("enabled", "adaptive")
        fields["chat_template_kwargs"] = {"enable_thinking": on}
    return jobs.job(fields, fields["messages"])


def _tools(value: Any) -> list[Any]:
    """Anthropic's tools in OpenAI's form."""
    if not isinstance(value, list):
        raise bad_request("tools must be a list.", "tools")
    return [_tool(tool) for tool in value]


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type", "custom") not in ("custom", None):
        raise bad_request("Each of tools must be a tool of yours, with a name.", "tools")
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema", {})}
    if "description" in tool:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _text(content: Any, name: str) -> str:
    """A text, or blocks of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{name} must be a string, or a list of text blocks.")
    return "".join(_block_text(block, name) for block in content)


def _block_text(block: Any, name: str) -> str:
    if not isinstance(block, dict) or block.get("type") != "text":
        kind = block.get("type") if isinstance(block, dict) else None
        raise bad_request(f"{name} has a block of type {str(kind)[:40]!r}; only text can be read.")
    return string(f"the text of {name}", block.get("text")) if block.get("text") != "" else ""


def _read(message: Any, name: str) -> list[dict[str, Any]]:
    """One of Anthropic's messages as messages of OpenAI's form: tool results are their own."""
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
        raise bad_request(f"{name} must be an object with a role, user or assistant.")
    role, content = message["role"], message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    before: list[dict[str, Any]] = []
    text, thoughts, calls = "", "", []
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result" and role == "user":
            said = block.get("content")
            result = "" if said is None else _text(said, f"a tool result of {name}")
            before.append(
                {"role": "tool", "content": result, "tool_call_id": block.get("tool_use_id")}
            )
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"type": "function", "id": block.get("id"), "function": function})
        elif kind == "thinking" and role == "assistant":
            thoughts += string(f"the thinking of {name}", block.get("thinking") or " ")
        elif kind != "redacted_thinking":
            text += _block_text(block, name)
    if role == "user" and before and not text:
        return before
    read: dict[str, Any] = {"role": role, "content": text}
    if calls:
        read["tool_calls"] = calls
    if thoughts:
        read["reasoning_content"] = thoughts
    return [*before, read]


class AnthropicForm:
    """An answer as Anthropic's service gives it.

    Args:
        job: what is answered.
        ticket: its ticket.
    """

    def __init__(self, job: Job, ticket: Ticket) -> None:
        self._job, self._ticket = job, ticket
        self._id = f"msg_{uuid.uuid4().hex}"
        # The block that is open in a stream, and how many there were.
        self._open: str | None = None
        self._blocks = 0

    def begin(self) -> list[bytes]:
        """The message, still empty."""
        message = self._message([], None, None, 0)
        return [event({"type": "message_start", "message": message}, "message_start")]

    def piece(self, piece: Piece) -> list[bytes]:
        """Blocks begin, grow and end."""
        events: list[bytes] = []
        if piece.reasoning:
            start = {"type": "thinking", "thinking": "", "signature": ""}
            events += self._start("thinking", start)
            events.append(self._delta({"type": "thinking_delta", "thinking": piece.reasoning}))
        if piece.text:
            events += self._start("text", {"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": piece.text}))
        for call in piece.tool_calls:
            events += self._stop()
            events += self._start("tool_use", _tool_use(call) | {"input": {}})
            arguments = call["function"]["arguments"]
            events.append(self._delta({"type": "input_json_delta", "partial_json": arguments}))
        return events

    def end(self, said: Said) -> list[bytes]:
        """The reason for the end, with the usage and what was selected."""
        delta = {"stop_reason": self._reason(said), "stop_sequence": said.stopped_by}
        last = {
            "type": "message_delta",
            "delta": delta,
            "usage": self._usage(len(said.tokens)),
            "mlx_ifp": selected(self._job, self._ticket),
        }
        stop = event({"type": "message_stop"}, "message_stop")
        return [*self._stop(), event(last, "message_delta"), stop]

    def whole(self, said: Said) -> dict[str, Any]:
        """The answer as one object."""
        content: list[dict[str, Any]] = []
        if said.reasoning:
            content.append({"type": "thinking", "thinking": said.reasoning, "signature": ""})
        if said.text:
            content.append({"type": "text", "text": said.text})
        content += [_tool_use(call) for call in said.tool_calls]
        message = self._message(content, self._reason(said), said.stopped_by, len(said.tokens))
        return message | {"mlx_ifp": selected(self._job, self._ticket)}

    def failed(self, failure: Failure) -> list[bytes]:
        """The error as an event."""
        return [event(failure.body, "error")]

    def _message(
        self, content: list[Any], reason: str | None, stopped_by: str | None, count: int
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._job.choice.id,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stopped_by,
            "usage": self._usage(count),
        }

    def _usage(self, count: int) -> dict[str, int]:
        cached = self._ticket.cached_tokens
        return {
            # Anthropic counts the tokens that were read from a cache apart.
            "input_tokens": len(self._ticket.tokens) - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": count,
        }

    @staticmethod
    def _reason(said: Said) -> str:
        if said.stopped_by is not None and said.finish_reason == "stop":
            return "stop_sequence"
        return _STOP_REASONS.get(said.finish_reason or "", "end_turn")

    def _start(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        if self._open == kind and kind != "tool_use":
            return []
        events, self._open = self._stop(), kind
        start = {"type": "content_block_start", "index": self._blocks, "content_block": block}
        return [*events, event(start, "content_block_start")]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        data = {"type": "content_block_delta", "index": self._blocks, "delta": delta}
        return event(data, "content_block_delta")

    def _stop(self) -> list[bytes]:
        if self._open is None:
            return []
        stop = event({"type": "content_block_stop", "index": self._blocks}, "content_block_stop")
        self._open = None
        self._blocks += 1
        return [stop]


def _tool_use(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {
        "type": "tool_use",
        "id": call["id"],
        "name": function["name"],
        "input": json.loads(function["arguments"]),
    }
