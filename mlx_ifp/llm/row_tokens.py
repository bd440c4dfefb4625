"""Turn a row of training data into the LLM's tokens, and find where its answer begins."""

from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError, reason_of
from .messages import Message
from .prompt import common_prefix


def row_tokens(
    tokenizer: TokenizerWrapper, row: dict[str, Any], *, answer: bool
) -> tuple[list[int], int]:
    """Give the tokens that mlx-lm trains on, and the first one that counts.

    Args:
        tokenizer: the LLM's.
        row: a row with ``messages`` as :func:`~mlx_ifp.llm.messages.read_messages` gives them, or
            else with a ``text``. If it has ``"truncated": true``, its answer was cut, and the end
            of its turn is left out.
        answer (bool): whether only the last message counts; otherwise everything does.

    Returns:
        tuple: token ids, and an offset, which is 0 if everything counts.

    Raises:
        IFPError: if the tokenizer or the chat template does not take the row, or if the template
            does not show where the answer begins.
    """
    messages = row.get("messages")
    if messages is None:
        return _text_tokens(tokenizer, row["text"]), 0
    if not tokenizer.has_chat_template:
        raise IFPError("this model has no chat template; give rows of format text.")
    tools = row.get("tools")
    tokens = _templated(tokenizer, messages, tools)
    if row.get("truncated"):
        unfinished = _templated(tokenizer, messages, tools, unfinished=True)
        tokens = tokens[: common_prefix(tokens, unfinished)]
    return tokens, _answer_offset(tokenizer, messages, tools, tokens) if answer else 0


def _text_tokens(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Encode a text; the end-of-text token follows it, as in mlx-lm."""
    if not text.strip():
        return []
    try:
        tokens = list(tokenizer.encode(text))
    except Exception as error:
        reason = reason_of(error)
        raise IFPError(f"the tokenizer does not take this row ({reason}).") from error
    end = tokenizer.eos_token_id
    return tokens if tokens[-1:] == [end] else [*tokens, end]


def _templated(
    tokenizer: TokenizerWrapper,
    messages: list[Message],
    tools: Any,
    *,
    prompt: bool = False,
    unfinished: bool = False,
) -> list[int]:
    # A chat template may be a function of mlx-lm that does not know this argument.
    more = {"continue_final_message": True} if unfinished else {}
    try:
        tokens = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, return_dict=False, **more
        )
    except Exception as error:
        reason = reason_of(error)
        raise IFPError(f"the chat template does not take this row ({reason}).") from error
    return list(tokens)


def _answer_offset(
    tokenizer: TokenizerWrapper, messages: list[Message], tools: Any, tokens: list[int]
) -> int:
    """Find where the last message begins in the tokens of a conversation.

    A conversation need not begin with its prompt: Gemma 4's prompt ends with an empty thought, and
    models distilled from DeepSeek R1 have prompts that end with a thought's beginning, but the
    template leaves these out before a known answer. Then the answer begins where the two differ.
    """
    prompt = _templated(tokenizer, messages[:-1], tools, prompt=True)
    offset = common_prefix(prompt, tokens)
    if offset < len(prompt):
        # A tokenizer may join the prompt's end with the answer's first characters.
        joined = tokenizer.decode(tokens[offset:]).startswith(tokenizer.decode(prompt[offset:]))
        before = _templated(tokenizer, messages[:-1], tools)
        if not joined and offset < common_prefix(before, prompt):
            raise IFPError(
                "the chat template changes what stands before the answer when the answer is there "
                f"(from token {offset + 1:,} on), so that it is not known where the answer begins. "
                "Shorten the conversation, or give the model another template."
            )
    if offset == 0:
        raise IFPError("the chat template makes no tokens before the answer.")
    if offset == len(tokens):
        raise IFPError("the chat template makes no tokens of the answer.")
    return offset
