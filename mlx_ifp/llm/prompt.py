"""Prompts as strings, tokens or messages, and what they have in common."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError, one_line
from .messages import Message, read_messages

Text = str | list[int] | mx.array

Prompt = Text | list[Message]


def is_messages(prompt: Prompt) -> bool:
    """Whether a prompt is a list of messages, which the chat template formats."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def read_prompt(prompt: Prompt) -> Prompt:
    """A prompt that is checked: messages in the form that :func:`read_messages` gives them.

    Raises:
        IFPError: if a message cannot be read.
    """
    return read_messages(prompt) if is_messages(prompt) else prompt


def token_ids(tokens: list[int] | mx.array) -> list[int]:
    """Token ids as a list, whatever array they come in."""
    return tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)


def encode_prompt(
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    *,
    to_be_continued: bool = False,
    **template_kwargs: Any,
) -> str | list[int] | mx.array:
    """What mlx-lm is given as the prompt: messages go through the chat template.

    A last message of the assistant is continued, not answered; so is any other one that is
    ``to_be_continued``.

    Raises:
        IFPError: if the prompt is empty, or the chat template does not take it.
    """
    if not is_messages(prompt):
        if len(prompt) == 0:
            raise IFPError("The prompt is empty; give some text.")
        return prompt
    if not tokenizer.has_chat_template:
        raise IFPError("This model has no chat template; give the prompt as a string.")
    prefill = to_be_continued or prompt[-1]["role"] == "assistant"
    with one_line("The chat template does not take these messages"):
        tokens = tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=not prefill,
            continue_final_message=prefill,
            **template_kwargs,
        )
    if not tokens:
        raise IFPError("The chat template makes nothing of these messages.")
    return tokens


def encode_continuation(
    tokenizer: TokenizerWrapper, messages: list[Message], **template_kwargs: Any
) -> list[int]:
    """The tokens of messages that go on where a stored prompt ends: inside the user's message.

    What the template puts before what the user says first is left out.

    Args:
        tokenizer: the LLM's.
        messages (list): they go on in the first message of the user.
        template_kwargs: arguments for the chat template.

    Raises:
        IFPError: if there is no message of the user, or the template changes it.
    """
    marker = "<query>"
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise IFPError("There is no user message; add one.")
    place = roles.index("user")
    content = messages[place]["content"]
    marked = [*messages]
    marked[place] = messages[place] | {"content": marker}
    text = encode_prompt(tokenizer, marked, tokenize=False, **template_kwargs)
    if marker not in text:
        raise IFPError(
            "The chat template changes its messages; --prompt-cache-file cannot be used."
        )
    suffix = text[text.index(marker) + len(marker) :]
    return tokenizer.encode(content + suffix, add_special_tokens=False)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two prompts share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def shared_prefix(
    tokenizer: TokenizerWrapper,
    messages: list[Message],
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
    roles = [message["role"] for message in messages]
    before = messages[: roles.index("user")] if "user" in roles else messages
    n = len(tokens)
    # Beginnings of several kinds: a tokenizer may join one of them with what stands before it.
    for content in ("a", "B", "1", "?"):
        other = [*before, {"role": "user", "content": content}]
        other = token_ids(encode_prompt(tokenizer, other, **template_kwargs))
        n = min(n, common_prefix(tokens, other))
    return n
