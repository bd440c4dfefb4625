"""A task is shown by examples: what the dense LLM's channels do while it answers them.

The scores are the mean of the examples' statistics, each scaled to unit norm in every layer. Only
tokens of answers count: what a sub-network has to do is to answer. A fitted predictor adds what it
predicts for the examples' prompts, because a few answers leave much to chance.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..dense_pass.statistics import text_statistics
from ..errors import IFPError
from ..files.jsonl import read_jsonl
from ..llm.messages import row_messages
from ..llm.prompt import template_tokens
from ..llm.row_tokens import row_tokens
from ..subnetwork.parent import Parent
from .answers import write_answers
from .predictor import PredictorHead

# The most tokens of an answer that the dense LLM writes.
MAX_TOKENS = 128
# With fewer examples than this, chance decides about many channels.
ENOUGH = 8
# The weight of a fitted predictor's scores: with eight examples it lowered KL by 5 to 25%.
_PREDICTED = 0.3
# The statistics of so many examples are in memory together.
_AT_ONCE = 128


@dataclass(frozen=True)
class Example:
    """A prompt with its answer.

    Attributes:
        tokens: of the prompt, and of the answer if it is known.
        answer: the first token of the answer, and the one after the last; they are equal if there
            is none yet.
    """

    tokens: list[int]
    answer: tuple[int, int]


@dataclass(frozen=True)
class ExampleScores:
    """Scores of a task that examples show.

    Attributes:
        scores: float32 [L, d_ffn].
        examples: how many there were.
        written: how many of the answers the dense LLM wrote.
        lengths: tokens of each answer.
        ffns_read: how often an FFN was read for the statistics.
    """

    scores: np.ndarray
    examples: int
    written: int
    lengths: list[int]
    ffns_read: int

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        notes = []
        if self.examples < ENOUGH:
            what = "1 example says" if self.examples == 1 else f"{self.examples} examples say"
            notes.append(f"{what} little about a task; {ENOUGH} to 64 are better.")
        if max(self.lengths) == 1:
            notes.append("Every answer is one token, so the scores come from single tokens.")
        return notes


def read_examples(
    path: str | Path, tokenizer: TokenizerWrapper, limit: int | None
) -> list[Example]:
    """Read examples from a file: JSONL in mlx-lm's formats ``chat`` or ``completions``.

    Args:
        path: a row has ``messages``, or ``prompt`` and ``completion``; the answer may be missing.
        tokenizer: the LLM's.
        limit (int): the most tokens that the LLM reads; None for any number.

    Raises:
        IFPError: naming the first line that is not usable, or if there is none.
    """
    examples = read_jsonl(path, lambda row, _: example_of(row, tokenizer, limit))
    if not examples:
        raise IFPError(f"{path}: there are no examples; give one JSON object a line.")
    return examples


def examples_of(
    rows: Iterable[dict[str, Any] | Example], tokenizer: TokenizerWrapper, limit: int | None
) -> list[Example]:
    """Examples of rows in memory; see :func:`read_examples`. Examples stay as they are."""
    examples = []
    for number, row in enumerate(rows, 1):
        try:
            made = row if isinstance(row, Example) else example_of(row, tokenizer, limit)
            examples.append(made)
        except IFPError as error:
            raise IFPError(f"Example {number}: {error}") from error
    if not examples:
        raise IFPError("There are no examples; give 8 to 64.")
    return examples


def example_of(
    row: dict[str, Any], tokenizer: TokenizerWrapper, limit: int | None = None
) -> Example:
    """Turn a row into an example.

    Args:
        row: see :func:`read_examples`.
        tokenizer: the LLM's.
        limit (int): the most tokens that the LLM reads; None for any number.

    Raises:
        IFPError: what is wrong with the row, without where it stands.
    """
    if not isinstance(row, dict):
        raise IFPError(f"must be an object, not {type(row).__name__}.")
    if "messages" not in row and "prompt" not in row:
        raise IFPError("a row has messages, or prompt and completion.")
    if tokenizer.has_chat_template:
        tokens, start = _chat(row, tokenizer)
    else:
        tokens, start = _plain(row, tokenizer)
    # A sub-network never reads the token that ends its answer, nor what the template puts there.
    ends = [i for i in range(start, len(tokens)) if tokens[i] in tokenizer.eos_token_ids]
    stop = ends[0] if ends else len(tokens)
    if start == stop < len(tokens):
        raise IFPError("the answer is empty.")
    # An answer that is still to be written has at least one token.
    needed = max(stop, start + 1)
    if limit is not None and needed > limit:
        raise IFPError(
            f"{needed:,} tokens, but this model reads at most {limit:,}; shorten the example, or "
            "leave it out."
        )
    return Example(tokens[:stop], (start, stop))


def _chat(row: dict[str, Any], tokenizer: TokenizerWrapper) -> tuple[list[int], int]:
    """Tokens by the chat template, and where the answer begins; at their end if there is none."""
    messages = row_messages(row)
    last = messages[-1]
    if last["role"] != "assistant":
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        tokens = template_tokens(tokenizer, messages, **tools)
        return tokens, len(tokens)
    if len(messages) == 1:
        raise IFPError("there is nothing before the answer.")
    if not last["content"].strip() and not last.get("tool_calls"):
        raise IFPError("the answer is empty.")
    return row_tokens(tokenizer, row | {"messages": messages}, answer=True)


def _plain(row: dict[str, Any], tokenizer: TokenizerWrapper) -> tuple[list[int], int]:
    """Tokens of a prompt and a completion as they are, and where the completion begins."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str):
        raise IFPError("this model has no chat template; give prompt and completion.")
    if not isinstance(completion, str) or not completion.strip():
        raise IFPError(
            "there is no answer, and this model has no chat template with which it could be asked "
            "for one; give a completion."
        )
    tokens = tokenizer.encode(prompt)
    return tokens + tokenizer.encode(completion, add_special_tokens=False), len(tokens)


def with_answers(
    parent: Parent,
    examples: Sequence[Example],
    stops: set[int],
    *,
    max_tokens: int = MAX_TOKENS,
    network: nn.Module | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> list[Example]:
    """Let the dense LLM write the answers that are missing.

    Args:
        parent, stops, network, progress: as for
            :func:`~mlx_ifp.selectors.answers.write_answers`.
        examples (sequence): those that have an answer stay as they are.
        max_tokens (int): the most tokens of an answer.

    Raises:
        IFPError: if the LLM answers an example with nothing.
    """
    missing = [i for i, each in enumerate(examples) if each.answer[0] == each.answer[1]]
    prompts = [examples[i].tokens for i in missing]
    answers = write_answers(parent, prompts, stops, max_tokens, network=network, progress=progress)
    complete = list(examples)
    for i, prompt, answer in zip(missing, prompts, answers, strict=True):
        if not answer:
            raise IFPError(
                f"The dense model has no answer to example {i + 1}: its first token ends the "
                "answer. Give an answer, or leave the example out."
            )
        complete[i] = Example(prompt + answer, (len(prompt), len(prompt) + len(answer)))
    return complete


def score_examples(
    parent: Parent,
    examples: Sequence[Example],
    statistic: str = "griffin",
    *,
    head: PredictorHead | None = None,
    written: int = 0,
    progress: Callable[[int], object] = lambda _: None,
) -> ExampleScores:
    """Scores of a task that examples with answers show.

    The dense LLM runs layer by layer over many examples at a time.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        examples (sequence): at least one, each with an answer.
        statistic (str): a name of :data:`~mlx_ifp.dense_pass.statistics.STATISTICS`.
        head (PredictorHead): a fitted predictor, which is asked for the prompts if the statistic is
            the one that it predicts, GRIFFIN's.
        written (int): how many of the answers the dense LLM wrote.
        progress (Callable): called with the number of examples that are finished.

    Raises:
        IFPError: if channels cannot be read.
    """
    total = np.zeros((len(parent.ffns), parent.ffns[0].d_ffn), np.float64)
    if statistic != "griffin":
        head = None
    reads = 0
    for start in range(0, len(examples), _AT_ONCE):
        some = examples[start : start + _AT_ONCE]
        found = text_statistics(
            parent,
            [each.tokens for each in some],
            [each.answer for each in some],
            statistic,
            # The last token of a prompt.
            states_at=None if head is None else [each.answer[0] - 1 for each in some],
            progress=progress,
        )
        values = unit_norm(found.values)
        if head is not None and found.states is not None:
            predicted = np.array(head(mx.array(found.states))).reshape(values.shape)
            values = (1 - _PREDICTED) * values + _PREDICTED * unit_norm(predicted)
        total += values.sum(axis=0)
        reads += found.ffns_read
    lengths = [each.answer[1] - each.answer[0] for each in examples]
    mean = (total / len(examples)).astype(np.float32)
    return ExampleScores(mean, len(examples), written, lengths, reads)


def unit_norm(values: np.ndarray) -> np.ndarray:
    """Scale statistics [..., d_ffn] to unit norm, so that each example counts the same: float64."""
    values = values.astype(np.float64)
    norms = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.divide(values, norms, out=np.zeros_like(values), where=norms != 0)
