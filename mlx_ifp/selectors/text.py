"""Prompts and tasks: which text selects, and what each tokenizer is given."""

from collections.abc import Callable

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.config import TEXT_SOURCES, TextConfig
from ..errors import IFPError
from ..llm.prompt import Prompt, Text, encode_prompt, is_messages, token_ids


def selecting_text(
    prompt: Prompt,
    role: str = "user",
    decode: Callable[[list[int]], str] | None = None,
) -> Text:
    """The text of a prompt that selects (paper, sections 3.2 and 4.3).

    Args:
        prompt: a string or token ids, which select whole, or a list of messages as
            :func:`~mlx_ifp.llm.messages.read_messages` gives them.
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
            if message["role"] == role:
                return message["content"]
        raise IFPError(f"There is no {role} message to select by; add one, or give a task.")
    if role == "system":
        raise IFPError("To select by the system message, give the prompt as a list of messages.")
    return prompt if isinstance(prompt, str) or decode is None else decode(token_ids(prompt))


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
