"""The prompts that a model is evaluated on, and answers that are given with them."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError
from ..files.jsonl import read_jsonl
from ..llm.messages import Message, row_messages
from ..llm.prompt import template_tokens
from ..llm.row_tokens import row_tokens

NO_TASK = "(no task)"


@dataclass(frozen=True)
class Row:
    """A prompt to answer.

    Attributes:
        line: its place in the file.
        task: the name of its task.
        messages: the prompt.
        tokens: [n] ids of the prompt, n >= 1.
        answer: ids of the answer, with the token that ends it; empty if the dense model is to
            write it.
    """

    line: int
    task: str
    messages: list[Message]
    tokens: list[int]
    answer: list[int]


def read_rows(
    path: str | Path,
    tokenizer: TokenizerWrapper,
    *,
    given: bool = False,
    per_task: int | None = None,
    longest: int | None = None,
) -> list[Row]:
    """Read prompts, in the order of the file.

    Args:
        path: JSON lines with ``messages``, or with ``prompt`` and maybe ``completion``, and maybe
            ``task``. A last message of the assistant is the answer.
        tokenizer: the LLM's.
        given (bool): take the file's answers.
        per_task (int): the first so many rows of each task count; None for all.
        longest (int): the most tokens that the LLM reads; None for any number.

    Raises:
        IFPError: naming the file and the first line that is not usable.
    """
    counts: Counter[str] = Counter()

    def make(row: dict[str, Any], line: int) -> Row | None:
        task = row.get("task")
        if not isinstance(task, str | None):
            raise IFPError("task must be a string.")
        task = task or NO_TASK
        counts[task] += 1
        if per_task is not None and counts[task] > per_task:
            return None
        tokens, messages, answer = _tokens(row_messages(row), tokenizer, given)
        if longest is not None and len(tokens) + len(answer) > longest:
            raise IFPError(
                f"has {len(tokens) + len(answer):,} tokens, but this model reads at most "
                f"{longest:,}."
            )
        return Row(line, task, messages, tokens, answer)

    rows = [row for row in read_jsonl(path, make) if row is not None]
    if not rows:
        raise IFPError(f"{path}: there are no prompts; give one JSON object a line.")
    return rows


def _tokens(
    messages: list[Message], tokenizer: TokenizerWrapper, given: bool
) -> tuple[list[int], list[Message], list[int]]:
    """The tokens of a prompt, its messages, and the tokens of its answer if it is given."""
    answered = messages[-1]["role"] == "assistant"
    if given:
        if not answered:
            raise IFPError("has no answer; leave out --given-answers, and the dense model answers.")
        tokens, offset = row_tokens(tokenizer, {"messages": messages}, answer=True)
        return tokens[:offset], messages[:-1], tokens[offset:]
    prompt = messages[:-1] if answered else messages
    if not prompt:
        raise IFPError("has no prompt.")
    if tokenizer.has_chat_template:
        return template_tokens(tokenizer, prompt), prompt, []
    tokens = list(tokenizer.encode(prompt[0]["content"]))
    if len(prompt) > 1 or not tokens:
        raise IFPError("must be one text, as this model has no chat template.")
    return tokens, prompt, []


def with_answer(row: Row, answer: list[int]) -> Row:
    """The row with an answer that was written."""
    return replace(row, answer=answer)
