"""The prompts and answers that a predictor is fitted on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError
from ..files.jsonl import read_jsonl
from ..llm.messages import Message, row_messages
from ..llm.row_tokens import row_tokens

# The sub-network reads all tokens of an answer but the last, so one alone shows nothing.
_LEAST_TOKENS = 2


@dataclass(frozen=True)
class Example:
    """A prompt with its answer.

    Attributes:
        tokens: the LLM's tokens of both.
        offset: the number of tokens of the prompt.
    """

    tokens: list[int]
    offset: int


@dataclass(frozen=True)
class Row:
    """A row of data: its first user message with what stands before it, and the answer.

    Attributes:
        messages: the last one is the user's.
        answer: None if the model has to give it.
        truncated: whether the answer was cut.
        place: where the row stands, for messages.
    """

    messages: list[Message]
    answer: Message | None
    truncated: bool
    place: str


def read_rows(path: str | Path) -> list[Row]:
    """Read rows of data in mlx-lm's formats, with answers or without.

    Args:
        path: a file, or a directory with ``train.jsonl``.

    Raises:
        IFPError: naming the line that is not usable, or if there is no prompt.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "train.jsonl"

    def row_of(row: dict[str, Any], number: int) -> Row | None:
        messages = row_messages(row)
        roles = [message["role"] for message in messages]
        if "user" not in roles:
            return None
        end = roles.index("user") + 1
        answer = messages[end] if roles[end : end + 1] == ["assistant"] else None
        if isinstance(row.get("completion"), str) and "messages" not in row:
            answer = {"role": "assistant", "content": row["completion"]}
        if answer is not None and not answer["content"].strip():
            answer = None
        # Only the last answer of a conversation can have been cut.
        truncated = bool(row.get("truncated")) and end + 1 == len(messages)
        return Row(messages[:end], answer, truncated, f"{file}: line {number}")

    rows = [row for row in read_jsonl(file, row_of) if row is not None]
    if not rows:
        raise IFPError(f"{file} has no message of a user.")
    return rows


def make_examples(
    tokenizer: TokenizerWrapper,
    rows: Sequence[Row],
    *,
    max_answer_tokens: int,
    max_seq_length: int,
) -> tuple[list[Example], int]:
    """Tokenize rows; those with a prompt that is too long or an answer of one token are left out.

    Args:
        tokenizer: the LLM's.
        rows (sequence): with answers.
        max_answer_tokens (int): what an answer has beyond that is left out.
        max_seq_length (int): the most tokens of a prompt with its answer.

    Returns:
        tuple: the examples, and how many rows were left out.

    Raises:
        IFPError: naming the row that the chat template does not take.
    """
    examples, ends = [], set(tokenizer.eos_token_ids)
    for row in rows:
        assert row.answer is not None, "answers are there"
        said = {"messages": [*row.messages, row.answer], "truncated": row.truncated}
        try:
            tokens, offset = row_tokens(tokenizer, said, answer=True)
        except IFPError as error:
            raise IFPError(f"{row.place}: {error}") from error
        # The answer ends with the token that ends it, whatever the template puts there.
        stop = next((i for i in range(offset, len(tokens)) if tokens[i] in ends), len(tokens))
        tokens = tokens[: min(stop + 1, offset + max_answer_tokens)]
        if len(tokens) <= max_seq_length and len(tokens) - offset >= _LEAST_TOKENS:
            examples.append(Example(tokens, offset))
    return examples, len(rows) - len(examples)
