"""OpenAI's requests are read, and answers are given in its form."""

import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from ...generation.ticket import Ticket, Token
from . import checks
from .checks import MAX_TOP_LOGPROBS, boolean, integer, only, read_fields, string
from .failures import Failure, bad_request
from .forms import Said, event, selected
from .jobs import FIELDS, Job, Jobs
from .pieces import Piece

_TOP = integer(0, MAX_TOP_LOGPROBS)


def _tool_choice(name: str, value: Any) -> str:
    if value not in ("auto", "none"):
        raise bad_request(f'{name} must be "auto" or "none" here.', name)
    return value


_CHAT_FIELDS = FIELDS | {
    "messages": checks.messages,
    "max_completion_tokens": integer(1),
    "logprobs": boolean,
    "top_logprobs": _TOP,
    "tools": checks.tools,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": boolean,
    "chat_template_kwargs": checks.template_kwargs,
    "response_format": checks.json_object,
    "modalities": only(["text"]),
}


def _logprobs(name: str, value: Any) -> int | None:
    """OpenAI has a count here, and mlx-lm true or false."""
    return (0 if value else None) if isinstance(value, bool) else _TOP(name, value)


_COMPLETION_FIELDS = FIELDS | {
    "prompt": string,
    "logprobs": _logprobs,
    "echo": only(False),
    "best_of": only(1),
}


def read_chat(body: dict[str, Any], jobs: Jobs) -> Job:
    """A request to ``/v1/chat/completions``.

    Raises:
        Failure: if a field is wrong or not supported.
        IFPError: if a message cannot be read.
    """
    fields = read_fields(body, _CHAT_FIELDS)
    if "messages" not in fields:
        raise bad_request("messages are missing.", "messages")
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    if fields.get("tool_choice") == "none":
        fields.pop("tools", None)
    if fields.get("top_logprobs") and not fields.get("logprobs"):
        raise bad_request("top_logprobs needs logprobs = true.", "top_logprobs")
    return jobs.job(fields, fields["messages"])


def read_completion(body: dict[str, Any], jobs: Jobs) -> Job:
    """A request to ``/v1/completions``.

    Raises:
        Failure: if a field is wrong or not supported.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        body = body | {"prompt": prompt[0]}
    fields = read_fields(body, _COMPLETION_FIELDS)
    if "prompt" not in fields:
        raise bad_request("prompt is missing.", "prompt")
    count = fields.pop("logprobs", None)
    if count is not None:
        fields |= {"logprobs": True, "top_logprobs": count}
    return jobs.job(fields, fields["prompt"], chat=False)


class Responder(Protocol):
    """The part of mlx-lm's ``APIHandler`` that makes answers."""

    created: int
    object_type: str
    request_id: str
    requested_model: str
    stream: bool

    def generate_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """An answer, or a part of it."""

    def completion_usage_response(self, *args: Any) -> dict[str, Any]:
        """The usage, for a stream."""


class OpenAIForm:
    """An answer as OpenAI's service gives it.

    Args:
        responder: mlx-lm's handler.
        job: what is answered.
        ticket: its ticket.
        decode (Callable): gives the text of a token.
    """

    def __init__(
        self, responder: Responder, job: Job, ticket: Ticket, decode: Callable[[int], str]
    ) -> None:
        self._responder, self._job, self._ticket, self._decode = responder, job, ticket, decode
        # Tokens whose log-probabilities were not told yet, and letters that were given.
        self._untold: list[Token] = []
        self._offset = 0
        responder.created = int(time.time())
        responder.stream = job.stream
        responder.requested_model = job.choice.id
        prefix = "chatcmpl" if job.chat else "cmpl"
        responder.request_id = f"{prefix}-{uuid.uuid4()}"
        kind = "chat.completion.chunk" if job.stream else "chat.completion"
        responder.object_type = kind if job.chat else "text_completion"

    def begin(self) -> list[bytes]:
        """The role comes first, as clients expect."""
        return [self._chunk("", None)] if self._job.chat else []

    def piece(self, piece: Piece) -> list[bytes]:
        """A chunk, if there is anything to say."""
        if piece.token is not None:
            self._untold.append(piece.token)
        if not (piece.text or piece.reasoning or piece.tool_calls):
            return []
        return [self._chunk(piece.text, None, piece.reasoning, piece.tool_calls)]

    def end(self, said: Said) -> list[bytes]:
        """The reason for the end, with what was selected, and the usage if it is asked for."""
        last = self._answer("", said.finish_reason)
        last["mlx_ifp"] = selected(self._job, self._ticket)
        events = [event(last)]
        if self._job.include_usage:
            usage = self._responder.completion_usage_response(*self._counts(said))
            events.append(event(usage | {"object": self._responder.object_type}))
        return [*events, b"data: [DONE]\n\n"]

    def whole(self, said: Said) -> dict[str, Any]:
        """The answer as one object."""
        self._untold = said.tokens
        answer = self._answer(
            said.text, said.finish_reason, said.reasoning, said.tool_calls, self._counts(said)
        )
        return answer | {"mlx_ifp": selected(self._job, self._ticket)}

    def failed(self, failure: Failure) -> list[bytes]:
        """The error as an event, without the end that a client waits for."""
        return [event(failure.body)]

    def _counts(self, said: Said) -> tuple[int, int, int]:
        return len(self._ticket.tokens), len(said.tokens), self._ticket.cached_tokens

    def _chunk(self, *args: Any) -> bytes:
        return event(self._answer(*args))

    def _answer(
        self,
        text: str,
        finish_reason: str | None,
        reasoning: str = "",
        tool_calls: list[dict[str, Any]] | None = None,
        counts: tuple[int, int, int] | tuple[()] = (),
    ) -> dict[str, Any]:
        answer = self._responder.generate_response(
            text, finish_reason, *counts, tool_calls=tool_calls, reasoning_text=reasoning
        )
        choice = answer["choices"][0]
        said = choice.get("delta") or choice.get("message")
        if said is not None and reasoning:
            # Clients know one of two names.
            said["reasoning_content"] = reasoning
        if said is not None and self._job.stream and not (text or reasoning or finish_reason):
            # The first chunk of a stream, with which clients begin an empty text.
            said.setdefault("content", "")
        choice["logprobs"] = self._take_logprobs()
        return answer

    def _take_logprobs(self) -> dict[str, Any] | None:
        tokens, self._untold = self._untold, []
        if not (tokens and self._job.sampling.logprobs):
            return None
        return self._chat_logprobs(tokens) if self._job.chat else self._text_logprobs(tokens)

    def _chat_logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        content = []
        for token in tokens:
            top = [self._entry(each["id"], each["logprob"]) for each in _sorted(token)]
            content.append(self._entry(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._decode(token)
        # A token may be a part of a letter, which is no text.
        whole = "\ufffd" not in text
        return {
            "token": text,
            "id": token,
            "logprob": logprob,
            "bytes": list(text.encode()) if whole else None,
        }

    def _text_logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        texts = [self._decode(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._decode(each["id"]): each["logprob"] for each in _sorted(token)}
                for token in tokens
            ],
            "text_offset": offsets,
        }


def _sorted(token: Token) -> list[dict[str, Any]]:
    """The likeliest tokens, the likeliest first; mlx-lm gives them in any order."""
    return sorted(token.top, key=lambda each: -each["logprob"])
