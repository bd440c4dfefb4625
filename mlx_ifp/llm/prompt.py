"""Encode prompts that are strings, tokens or messages, and compare how they begin."""

from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError, one_line
from .messages import Message, read_messages

Text = str | list[int] | mx.array

Prompt = Text | list[Message]

# A prompt in a form that mlx-lm takes.
Encoded = str | list[int] | mx.array


def is_messages(prompt: Prompt) -> TypeGuard[list[Message]]:
    """Whether a prompt is a list of messages, which the chat template formats."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def read_prompt(prompt: Prompt) -> Prompt:
    """Check a prompt; messages come back in the form that :func:`read_messages` gives them.

    Raises:
        IFPError: if a message cannot be read.
    """
    return read_messages(prompt) if is_messages(prompt) else prompt


def token_ids(tokens: list[int] | mx.array) -> list[int]:
    """Token ids as a list, whether they come as one or as an array."""
    return cast(list[int], tokens.tolist()) if isinstance(tokens, mx.array) else list(tokens)


def encode_prompt(
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    *,
    to_be_continued: bool = False,
    **template_kwargs: Any,
) -> Encoded:
    """Turn a prompt into what mlx-lm takes; messages go through the chat template.

    If the last message is the assistant's, it is continued, not answered. So is any other last
    message if ``to_be_continued`` is set.

    Raises:
        IFPError: if the prompt is empty, or the chat template does not take it.
    """
    if not is_messages(prompt):
        if len(prompt) == 0:
            raise IFPError("The prompt is empty; give some text.")
        return cast(Text, prompt)
    return _apply_template(tokenizer, prompt, to_be_continued, **template_kwargs)


def template_tokens(
    tokenizer: TokenizerWrapper, messages: list[Message], **template_kwargs: Any
) -> list[int]:
    """The token ids of messages, as :func:`encode_prompt` gives them."""
    return token_ids(_apply_template(tokenizer, messages, **template_kwargs))


def _apply_template(
    tokenizer: TokenizerWrapper,
    prompt: list[Message],
    to_be_continued: bool = False,
    **template_kwargs: Any,
) -> Any:
    """Apply the chat template; the result is token ids, or text with ``tokenize=False``."""
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


def prompt_ids(tokenizer: TokenizerWrapper, prompt: Encoded) -> list[int]:
    """The token ids of a prompt as mlx-lm's ``stream_generate`` encodes it."""
    if not isinstance(prompt, str):
        return token_ids(prompt)
    begins = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return tokenizer.encode(prompt, add_special_tokens=not begins)


def encode_continuation(
    tokenizer: TokenizerWrapper, messages: list[Message], **template_kwargs: Any
) -> list[int]:
    """Encode messages that go on where a stored prompt ends, which is inside the user's message.

    Whatever the template puts before the user's first words is left out.

    Args:
        tokenizer: the LLM's.
        messages (list): the first message of the user goes on with the stored prompt.
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
    text: str = _apply_template(tokenizer, marked, tokenize=False, **template_kwargs)
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
    """How many first tokens a prompt shares with all prompts that differ in the user's words.

    That is the system prompt, if there is one, and what the chat template puts around it. It is
    found by comparison, so it holds for any template.

    Args:
        tokenizer: the LLM's.
        messages (list): what comes before the first user message counts.
        tokens (list): the prompt's ids, as :func:`encode_prompt` makes them of ``messages``.
        template_kwargs: arguments for the chat template, as given to :func:`encode_prompt`.
    """
    roles = [message["role"] for message in messages]
    before = messages[: roles.index("user")] if "user" in roles else messages
    n = len(tokens)
    # Several first words are tried, as a tokenizer may join one with the text before it.
    for content in ("a", "B", "1", "?"):
        messages = [*before, {"role": "user", "content": content}]
        other = template_tokens(tokenizer, messages, **template_kwargs)
        n = min(n, common_prefix(tokens, other))
    return n
