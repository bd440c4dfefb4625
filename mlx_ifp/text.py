"""Prompts and tasks: which text selects, and what each tokenizer is given."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .config import TEXT_SOURCES, TextConfig
from .errors import IFPError

Text = str | list[int] | mx.array
Prompt = Text | list[dict[str, Any]]


def is_messages(prompt: Prompt) -> bool:
    """Whether a prompt is a list of messages, which the chat template formats."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def token_ids(tokens: list[int] | mx.array) -> list[int]:
    """Token ids as a list, whatever array they come in."""
    return tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)


def selecting_text(
    prompt: Prompt,
    role: str = "user",
    decode: Callable[[list[int]], str] | None = None,
) -> Text:
    """The text of a prompt that selects (paper, sections 3.2 and 4.3).

    Args:
        prompt: a string or token ids, which select whole, or a list of messages.
        role (str): ``user``: the first user message selects, for the whole conversation;
            ``system``: the system message does.
        decode (Callable): makes text of token ids, if the selector has another tokenizer.

    Raises:
        IFPError: if there is no message of that role.
    """
    if role not in TEXT_SOURCES:
        raise IFPError(f"task_from must be 'user' or 'system', not {role!r}.")
    if is_messages(prompt):
        for message in prompt:
            if message.get("role") == role:
                return _content(message)
        raise IFPError(f"There is no {role} message to select by; add one, or give a task.")
    if role == "system":
        raise IFPError("To select by the system message, give the prompt as a list of messages.")
    return prompt if isinstance(prompt, str) or decode is None else decode(token_ids(prompt))


def _content(message: dict[str, Any]) -> str:
    """A message's text; the parts of a multi-part content are joined."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content if part.get("type") == "text")


def selector_tokens(
    tokenizer: TokenizerWrapper,
    text: Text,
    how: TextConfig,
    advice: str = "Describe the task in fewer words with --task (task=).",
) -> list[int]:
    """The tokens that a selector reads.

    Args:
        tokenizer: the selector's.
        text: a prompt or a task; token ids are taken as they are.
        how (TextConfig): the checkpoint's ``text``.
        advice (str): what to do about a text that is too long.

    Raises:
        IFPError: if the text is empty or too long, or there is no chat template to put it in.
    """
    if not isinstance(text, str):
        tokens = token_ids(text)
    else:
        if not text.strip():
            raise IFPError("The text that selects is empty; give a prompt or a task.")
        if how.format == "raw":
            tokens = tokenizer.encode(text)
        elif tokenizer.has_chat_template:
            tokens = encode_prompt(tokenizer, [{"role": "user", "content": text}])
        else:
            raise IFPError("text.format is chat_template, but the selector's tokenizer has none.")
    if not tokens:
        raise IFPError(
            "The text that selects has no tokens; give a prompt or a task. If you did, the files "
            "of the selector's tokenizer are missing."
        )
    if len(tokens) > how.max_tokens:
        raise IFPError(
            f"The text that selects has {len(tokens):,} tokens, this checkpoint's selectors take "
            f"{how.max_tokens:,}. {advice}"
        )
    return tokens


def encode_prompt(
    tokenizer: TokenizerWrapper, prompt: Prompt, **template_kwargs: Any
) -> str | list[int] | mx.array:
    """What mlx-lm is given as the prompt: messages go through the chat template.

    A last message of the assistant is continued, not answered.
    """
    if not is_messages(prompt):
        if len(prompt) == 0:
            raise IFPError("The prompt is empty; give some text.")
        return prompt
    if not tokenizer.has_chat_template:
        raise IFPError("This model has no chat template; give the prompt as a string.")
    prefill = prompt[-1].get("role") == "assistant"
    try:
        tokens = tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=not prefill,
            continue_final_message=prefill,
            **template_kwargs,
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise IFPError(f"The chat template does not take these messages: {error}.") from error
    if not tokens:
        raise IFPError("The chat template makes nothing of these messages.")
    return tokens


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two prompts share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def shared_prefix(
    tokenizer: TokenizerWrapper,
    messages: list[dict[str, Any]],
    tokens: list[int],
    **template_kwargs: Any,
) -> int:
    """How many first tokens a prompt shares with all that differ in what the user says.

    That is the system prompt, if there is one, and what the chat template puts around it. It is
    found by comparison, so it holds for any template.

    Args:
        tokenizer: the LLM's.
        messages (list): what comes before the first user message counts.
        tokens (list): the prompt's ids, as :func:`encode_prompt` makes them of ``messages``.
        template_kwargs: as for that.
    """
    roles = [message.get("role") for message in messages]
    before = messages[: roles.index("user")] if "user" in roles else messages
    n = len(tokens)
    # Beginnings of several kinds: a tokenizer may join one of them with what stands before it.
    for content in ("a", "B", "1", "?"):
        other = [*before, {"role": "user", "content": content}]
        other = token_ids(encode_prompt(tokenizer, other, **template_kwargs))
        n = min(n, common_prefix(tokens, other))
    return n
