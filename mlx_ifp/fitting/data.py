"""Get examples to fit on: rows that are given, and what the model writes itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..synthesis.files import earlier_rows
from ..synthesis.writer import Prompt, Synthesis, SynthesisArgs
from .examples import Row, read_rows

# The model's own rows, beside the statistics.
ROWS_FILE = "rows.jsonl"


@dataclass(frozen=True)
class WritingArgs:
    """How the model writes.

    Attributes:
        max_tokens: of an answer.
        max_seq_length: of a prompt with its answer.
        batch_size: texts at once.
        seed: seed of everything that is drawn.
    """

    max_tokens: int
    max_seq_length: int
    batch_size: int
    seed: int


def own_rows(
    load: Callable[[], nn.Module],
    tokenizer: TokenizerWrapper,
    directory: Path,
    count: int,
    args: WritingArgs,
    on_row: Callable[[], Any] = lambda: None,
) -> list[Row]:
    """Let the model write prompts and answer them greedily, and keep the rows in a file.

    Args:
        load (Callable): gives the dense LLM; called only if rows are missing.
        tokenizer: the LLM's.
        directory (Path): where the file is; rows that it has already count.
        count (int): how many rows there are to be.
        args (WritingArgs): how they are written.
        on_row (Callable): called for each row, also for those that were there.

    Raises:
        IFPError: if the model cannot write prompts.
    """
    path = directory / ROWS_FILE
    earlier = earlier_rows(path)
    for _ in earlier[:count]:
        on_row()
    if len(earlier) < count:
        with open(path, "a", encoding="utf-8") as file:
            _synthesis(load(), tokenizer, args, count, file, earlier, on_row).write()
    return read_rows(path)[:count]


def answered_rows(
    load: Callable[[], nn.Module],
    tokenizer: TokenizerWrapper,
    directory: Path,
    rows: Sequence[Row],
    args: WritingArgs,
    on_row: Callable[[], Any] = lambda: None,
) -> list[Row]:
    """Let the model answer the prompts that have no answer, greedily; see :func:`own_rows`.

    Rows whose prompt is too long, or to which the model says nothing, are left out.
    """
    asked = [row for row in rows if row.answer is None]
    if not asked:
        return list(rows)
    path = directory / ROWS_FILE
    earlier = earlier_rows(path)
    for _ in earlier:
        on_row()
    with open(path, "a", encoding="utf-8") as file:
        prompts = [Prompt(row.messages, "given") for row in asked]
        _synthesis(load(), tokenizer, args, 0, file, earlier, on_row).answer(prompts)
    return [row for row in rows if row.answer is not None] + read_rows(path)


def _synthesis(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    args: WritingArgs,
    count: int,
    file: Any,
    earlier: list[dict[str, Any]],
    on_row: Callable[[], Any],
) -> Synthesis:
    how = SynthesisArgs(
        count=count,
        batch_size=args.batch_size,
        max_answer_tokens=args.max_tokens,
        max_seq_length=args.max_seq_length,
        # The predictor is for the answers that the model is likeliest to give.
        answer_temps=(0.0,),
        seed=args.seed,
    )
    return Synthesis(model, tokenizer, how, file, earlier=earlier, on_row=on_row)
