"""Read a chat's messages in one way for selection, chat template, training and serving."""

import json
from typing import Any

from ..errors import IFPError

Message = dict[str, Any]

# The parts of a content that are text have one of these types; a part may also have none.
_TEXT_PARTS = (None, "text", "input_text", "output_text")
# Messages of these roles may be empty: they call tools, or are what a tool gave back.
_MAY_BE_SILENT = ("assistant", "tool")


def read_messages(messages: object) -> list[Message]:
    """Check messages, and give them the one form that everything else may rely on.

    In that form a role and a content are strings, the arguments of a tool call are an object, and
    no field is null. Text parts are joined without a separator, as mlx-lm joins them. Messages that
    have this form already come back as they are. The given messages are not changed.

    Args:
        messages: a list of objects with ``role`` and ``content``. A content is a string, or a list
            of text parts; null only where an assistant calls tools or a tool gives nothing back.
            A tool may also give back an object, a number or a boolean, which becomes JSON.

    Returns:
        list: new messages.

    Raises:
        IFPError: naming the first message that cannot be read, and why, without where it stands.
    """
    if not isinstance(messages, list) or not messages:
        raise IFPError("messages must be a list, not empty.")
    return [_read(message, f"message {number}") for number, message in enumerate(messages, 1)]


def row_messages(row: dict[str, Any]) -> list[Message]:
    """Read a row in one of mlx-lm's formats as messages.

    A prompt or a text is the user's, and a completion is the answer to a prompt.

    Raises:
        IFPError: what is wrong with the row, without where it stands.
    """
    if not row.get("messages"):
        for name in ("prompt", "text"):
            if isinstance(row.get(name), str):
                said = [{"role": "user", "content": row[name]}]
                if name == "prompt" and row.get("completion") is not None:
                    said.append({"role": "assistant", "content": row["completion"]})
                return read_messages(said)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise IFPError("a row has messages, a list that is not empty, or a string: prompt or text.")
    return read_messages(messages)


def _read(message: object, name: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise IFPError(f"{name} must be an object with role and content.")
    # In a table every row has all fields, and a template must not take a null for tool calls.
    read = {key: value for key, value in message.items() if value is not None}
    calls = read.pop("tool_calls", None)
    if calls:
        read["tool_calls"] = _read_calls(calls, name)
    read["content"] = _text(message.get("content"), message["role"], f"the content of {name}")
    return read


def _text(content: object, role: str, name: str) -> str:
    """Read a message's content as a string."""
    if isinstance(content, list):
        parts = enumerate(content, 1)
        content = "".join(_part_text(part, f"part {i} of {name}") for i, part in parts)
    elif content is None and role in _MAY_BE_SILENT:
        content = ""
    elif role == "tool" and isinstance(content, dict | int | float):
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise IFPError(f"{name} must be a string, or a list of text parts.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise IFPError(f"{name} is not Unicode text: it has half a surrogate pair.") from error
    return content


def _part_text(part: object, name: str) -> str:
    if not isinstance(part, dict):
        raise IFPError(f'{name} must be an object such as {{"type": "text", "text": "..."}}.')
    if part.get("type") not in _TEXT_PARTS:
        raise IFPError(f"{name} is of type {part['type']!r}; only text can be read.")
    if not isinstance(part.get("text"), str):
        raise IFPError(f"the text of {name} must be a string.")
    return part["text"]


def _read_calls(calls: object, name: str) -> list[dict[str, Any]]:
    """Read tool calls, whose name and arguments are in ``function`` or in the call itself."""
    if not isinstance(calls, list):
        raise IFPError(f"the tool_calls of {name} must be a list.")
    read = []
    for number, call in enumerate(calls, 1):
        which = f"tool call {number} of {name}"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise IFPError(f"{which} must be an object with a function, which has a name.")
        function = function | {"arguments": _arguments(function.get("arguments"), which)}
        read.append(call | {"function": function} if "function" in call else function)
    return read


def _arguments(arguments: object, name: str) -> dict[str, Any]:
    """Read the arguments of a call, which are a string of JSON in OpenAI's format."""
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise IFPError(f"the arguments of {name} are no JSON.") from error
    elif arguments is None or isinstance(arguments, str):
        arguments = {}
    if not isinstance(arguments, dict):
        raise IFPError(f"the arguments of {name} must be a JSON object.")
    return arguments
