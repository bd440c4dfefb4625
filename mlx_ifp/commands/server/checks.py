"""Requests are read with care: what a body may be, and what each field may hold."""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...llm.messages import Message, read_messages
from .failures import Failure, bad_request

MAX_BODY = 8 << 20
MAX_MESSAGES = 10_000
MAX_TOOLS = 512
MAX_STOPS = 64
MAX_STOP_LENGTH = 1_000
# 64 bits without a sign are what MLX takes.
MAX_SEED = (1 << 64) - 1
# mlx-lm's server gives at most so many.
MAX_TOP_LOGPROBS = 11

# Takes a field's name and value, and gives the value to use.
Check = Callable[[str, Any], Any]


def read_object(raw: bytes) -> dict[str, Any]:
    """A body as a JSON object.

    Raises:
        Failure: if it is none.
    """
    try:
        body = json.loads(raw.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise bad_request("The body is not UTF-8 text.") from error
    except RecursionError as error:
        raise bad_request("The body is nested too deeply.") from error
    except ValueError as error:
        raise bad_request(f"The body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise bad_request("The body must be a JSON object.")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_fields(body: Mapping[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    """The fields of a body, checked; those that are null count as left out.

    Raises:
        Failure: naming a field that is unknown or wrong.
    """
    fields = {}
    for name, value in body.items():
        if name not in checks:
            raise bad_request(f"{name!r} is not supported here.", name)
        if value is not None:
            fields[name] = checks[name](name, value)
    return fields


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number within bounds."""

    def check(name: str, value: Any) -> float:
        right = isinstance(value, int | float) and not isinstance(value, bool)
        try:
            right = right and math.isfinite(value)
        except OverflowError:
            right = False
        if not right or not low <= value <= high:
            raise bad_request(f"{name} must be a number{_bounds(low, high)}.", name)
        return float(value)

    return check


def integer(low: float = -math.inf, high: float = math.inf) -> Check:
    """A whole number within bounds."""

    def check(name: str, value: Any) -> int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise bad_request(f"{name} must be a whole number{_bounds(low, high)}.", name)
        return value

    return check


def _bounds(low: float, high: float) -> str:
    if high == math.inf:
        return "" if low == -math.inf else f" from {low:g}"
    end = f"{high:,}" if isinstance(high, int) else f"{high:g}"
    return f" up to {end}" if low == -math.inf else f" from {low:g} to {end}"


def boolean(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise bad_request(f"{name} must be true or false.", name)
    return value


def string(name: str, value: Any) -> str:
    """A text that is Unicode, and not empty."""
    if not isinstance(value, str) or not value:
        raise bad_request(f"{name} must be a string, not empty.", name)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad_request(f"{name} has half a surrogate pair.", name) from error
    return value


def json_object(name: str, value: Any) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise bad_request(f"{name} must be an object.", name)
    return value


def only(*values: Any) -> Check:
    """One of some values, compared with their types."""

    def check(name: str, value: Any) -> Any:
        if not any(value == each and type(value) is type(each) for each in values):
            said = " or ".join(json.dumps(each) for each in values)
            raise bad_request(f"{name} must be {said} here.", name)
        return value

    return check


def ignored(name: str, value: Any) -> Any:
    """A field that says nothing about the answer."""
    return value


def stops(name: str, value: Any) -> list[str]:
    """Texts that end an answer: one, or a list."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or len(words) > MAX_STOPS:
        raise bad_request(f"{name} must be a string, or a list of at most {MAX_STOPS}.", name)
    for word in words:
        if len(string(name, word)) > MAX_STOP_LENGTH:
            raise bad_request(f"{name} must have at most {MAX_STOP_LENGTH:,} letters.", name)
    return words


def logit_bias(name: str, value: Any) -> dict[int, float]:
    """What is added to the logits of tokens."""
    check = number(-100, 100)
    biases = {}
    for token, bias in json_object(name, value).items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise bad_request(f"{name} must have token ids as its names.", name)
        biases[int(token)] = check(name, bias)
    return biases


def keep(name: str, value: Any) -> int | float:
    """Channels to keep: a count, or a fraction."""
    if isinstance(value, float) and 0 < value <= 1:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
        return value
    raise bad_request(f"{name} must be a count, or a fraction above 0 and at most 1.0.", name)


def template_kwargs(name: str, value: Any) -> dict[str, Any]:
    """Variables for the chat template.

    transformers takes its own options by the same door, and one of them is another template.

    Raises:
        Failure: if one of them is an option of transformers, or set by the server itself.
    """
    for key in json_object(name, value):
        if key in _RESERVED:
            raise bad_request(f"{name}: {key!r} cannot be set.", name)
    return value


_RESERVED = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *("messages", "kwargs", "tokenizer_kwargs", "eos_token", "bos_token", "chat_template"),
}


def messages(name: str, value: Any) -> list[Message]:
    """A conversation.

    Raises:
        Failure: if it has too many messages, or an unknown role.
        IFPError: if a message cannot be read.
    """
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise Failure(413, f"{name} may have at most {MAX_MESSAGES:,} messages.", name)
    read = read_messages(value)
    for number_, message in enumerate(read, 1):
        # OpenAI's newer word for the system message is not one that templates know.
        role = "system" if message["role"] == "developer" else message["role"]
        if role not in ("system", "user", "assistant", "tool"):
            raise bad_request(f"message {number_} has an unknown role: {role[:40]!r}.", name)
        message["role"] = role
    return read


def tools(name: str, value: Any) -> list[dict[str, Any]]:
    """Functions that the model may call, in OpenAI's form."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise bad_request(f"{name} must be a list of at most {MAX_TOOLS} tools.", name)
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise bad_request(f"Each of {name} must be a function, with a name.", name)
        string(f"{name}: name", function.get("name"))
        if not isinstance(function.get("parameters", {}), dict):
            raise bad_request(f"{name}: parameters must be a JSON schema.", name)
    return value
