"""Turn rows of training data in mlx-lm's formats into examples."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import load_dataset

from ..checkpoint.config import TextConfig
from ..choices import STAGES
from ..errors import IFPError
from ..files.jsonl import read_jsonl
from ..llm.messages import Message, read_messages
from ..llm.row_tokens import row_tokens
from ..selectors.text import selecting_text, selector_tokens

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Example:
    """One text to predict, and the text that selects for it.

    Attributes:
        tokens: the LLM's tokens: context and what is predicted.
        offset: the first token whose prediction counts (start of the answer or chunk), 1 or more.
        selecting: the selector's tokens of the text that selects.
        task: name of the domain, from the field ``task`` of the data, or None.
    """

    tokens: list[int]
    offset: int
    selecting: list[int]
    task: str | None


def load_examples(
    data: str,
    tokenizer: TokenizerWrapper,
    selector_tokenizer: TokenizerWrapper,
    text: TextConfig,
    *,
    stage: str = "sft",
    max_seq_length: int = 2048,
    chunk_size: int = 256,
    task_texts: dict[str, str] | None = None,
    splits: Sequence[str] = ("train", "valid"),
) -> dict[str, list[Example]]:
    """Load and tokenize training data (paper, section 3.2).

    In stage ``sft`` the first user message selects (or what ``text.source`` says), and the last
    assistant message is predicted. In stage ``pretrain`` a text is cut into chunks, and chunk k
    selects for the prediction of chunk k + 1, which sees everything before it (equation 5).

    Args:
        data (str): a directory of ``{train,valid,test}.jsonl`` or a dataset's name on the hub, in
            one of mlx-lm's formats: ``text``, ``completions`` or ``chat``. Each row may have a
            string ``task``. A row with ``"truncated": true`` has an answer that was cut: the end of
            its turn is not predicted.
        tokenizer: the LLM's.
        selector_tokenizer: the selector's; may be the same object.
        text (TextConfig): the checkpoint's ``text``.
        stage (str): ``sft`` or ``pretrain``.
        max_seq_length (int): in tokens. ``sft`` refuses longer examples, ``pretrain`` leaves out
            the first chunks.
        chunk_size (int): in tokens, for ``pretrain``.
        task_texts (dict): descriptions of tasks by name, which select instead of prompts (``sft``).
        splits (sequence): of ``train``, ``valid`` and ``test``, those to read.

    Returns:
        dict: the examples of ``train``, ``valid`` and ``test``; a list is empty if the split is
        absent or not read.

    Raises:
        IFPError: naming the file and line of the first row that is not usable.
    """
    _require(stage in STAGES, f"stage must be one of {', '.join(STAGES)}, not {stage!r}.")
    if stage == "sft":
        make = partial(
            _answer, tokenizer=selector_tokenizer, how=text, limit=max_seq_length, texts=task_texts
        )
    else:
        _check_chunks(chunk_size, max_seq_length, task_texts)
        tokenizers = (tokenizer, selector_tokenizer)
        make = partial(
            _chunks, tokenizers=tokenizers, how=text, size=chunk_size, limit=max_seq_length
        )
    examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for split, rows in _load_datasets(data, tokenizer, stage, splits).items():
        for row, where in rows:
            with _located(where):
                examples[split] += make(row, *row_tokens(tokenizer, row, answer=stage == "sft"))
    # Only stage pretrain can end up without examples: each row of sft is one, or an error.
    _require(
        bool(examples["train"]),
        f"{data}: no text of train is longer than one chunk of {chunk_size:,} tokens; lower "
        "--chunk-size or give longer texts.",
    )
    return examples


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IFPError(message)


def _check_chunks(size: int, limit: int, task_texts: dict[str, str] | None) -> None:
    _require(
        task_texts is None, "In stage pretrain chunks select; task descriptions are for stage sft."
    )
    _require(size >= 1, f"--chunk-size must be 1 or more, not {size}.")
    _require(
        limit >= 2 * size,
        f"--max-seq-length {limit:,} does not hold two chunks of {size:,} tokens, one that selects "
        "and one that is predicted; lower --chunk-size.",
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of a split. All are checked before the first is tokenized, which takes far longer.

    Attributes:
        dataset: a list, or mlx-lm's dataset.
        format: the format of all rows: ``completions``, ``chat`` or ``text``.
        places: where each row comes from.
    """

    dataset: Any
    format: str
    places: Sequence[str]

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield each row, with its messages if it has any, and its place."""
        for i, place in enumerate(self.places):
            row = self.dataset[i]
            if self.format == "chat":
                row = row | {"messages": read_messages(row["messages"])}
            elif self.format == "completions":
                said = (("user", row["prompt"]), ("assistant", row["completion"]))
                row = row | {"messages": [{"role": r, "content": text} for r, text in said]}
            yield row, place


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except IFPError as error:
        raise IFPError(f"{where}: {error}") from error


def _load_datasets(
    data: str, tokenizer: TokenizerWrapper, stage: str, splits: Sequence[str]
) -> dict[str, _Rows]:
    """Read the splits that exist."""
    path = Path(data)
    _require(
        not path.is_file() and (path.suffix != ".jsonl" or path.exists()),
        f"{data}: give the directory that holds train.jsonl (and valid.jsonl, test.jsonl), "
        "not a file.",
    )
    if path.is_dir():
        return _local(data, stage, splits)
    return _from_hub(data, tokenizer, stage, splits)


def _local(data: str, stage: str, splits: Sequence[str]) -> dict[str, _Rows]:
    files = {split: Path(data) / f"{split}.jsonl" for split in splits}
    _require(files["train"].exists(), f"{files['train']} is missing; put the rows there.")
    return {split: _read(file, stage) for split, file in files.items() if file.exists()}


def _read(file: Path, stage: str) -> _Rows:
    rows: list[dict[str, Any]] = []
    first: str | None = None

    def checked(row: dict[str, Any], number: int) -> str:
        nonlocal first
        first = _check_row(row, first, stage)
        rows.append(row)
        return f"{file}: line {number}"

    places = read_jsonl(file, checked)
    _require(bool(rows), f"{file}: the file is empty; give one JSON object a line.")
    return _Rows(rows, str(first), places)


def _from_hub(
    data: str, tokenizer: TokenizerWrapper, stage: str, splits: Sequence[str]
) -> dict[str, _Rows]:
    args = SimpleNamespace(data=data, train=False, test=False)
    try:
        # mlx-lm's hint asks for transformers' tokenizer, but its own callers pass its wrapper, too.
        loaded = load_dataset(args, cast(Any, tokenizer))
        datasets = dict(zip(SPLITS, loaded, strict=True))
    except ImportError as error:
        raise IFPError(
            f"{data}: there is no such directory; to load a dataset from the Hugging Face hub: "
            "pip install datasets"
        ) from error
    except Exception as error:
        # The hub's loader may raise any error of its many back ends.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise IFPError(
            f"{data}: neither a directory nor a dataset that can be loaded from the hub ({reason})."
        ) from error
    _require(len(datasets["train"]) > 0, f"{data}: there is no split named train.")
    found = {}
    for split, dataset in datasets.items():
        if split not in splits or not len(dataset):
            continue
        places = [f"{data}: {split} row {i}" for i in range(len(dataset))]
        first: str | None = None
        for i, place in enumerate(places):
            with _located(place):
                first = _check_row(dataset[i], first, stage)
        found[split] = _Rows(dataset, str(first), places)
    return found


_FORMATS = {"completions": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}


def _row_format(row: dict[str, Any]) -> str:
    """Find the format: ``completions``, ``chat`` or ``text``, in mlx-lm's order of precedence."""
    for kind, names in _FORMATS.items():
        if all(name in row for name in names):
            return kind
    raise IFPError(
        f"unknown format, with the fields {', '.join(sorted(row)) or 'none'}; a row has text, or "
        "prompt and completion, or messages."
    )


def _check_row(row: dict[str, Any], first: str | None, stage: str) -> str:
    """Check a row's fields.

    Args:
        row: what a line of JSON holds.
        first (str): the format of the first row, which mlx-lm takes for all, or None.
        stage (str): ``sft`` or ``pretrain``.

    Returns:
        str: the row's format.

    Raises:
        IFPError: saying what is wrong, but not in which row.
    """
    kind = _row_format(row)
    _require(first in (None, kind), f"the format is {kind}, but {first} in the first row.")
    _require(isinstance(row.get("task"), str | None), "task must be a string.")
    _require(isinstance(row.get("truncated"), bool | None), "truncated must be true or false.")
    if kind == "chat":
        messages = read_messages(row["messages"])
        if stage == "sft":
            _check_messages(messages)
    else:
        for name in _FORMATS[kind]:
            _require(isinstance(row[name], str), f"{name} must be a string.")
    if stage == "sft":
        _require(kind != "text", "a text has no prompt that selects; use --stage pretrain.")
        _require(kind != "completions" or bool(row["completion"].strip()), "the answer is empty.")
    return kind


def _check_messages(messages: list[Message]) -> None:
    """Check that the last message is an answer."""
    _require(len(messages) > 1, "there is nothing before the last message, the answer.")
    last = messages[-1]
    _require(
        last["role"] == "assistant",
        f"the last message must be the assistant's, not of {last['role']!r}.",
    )
    _require(bool(last["content"].strip() or last.get("tool_calls")), "the answer is empty.")


def _answer(
    row: dict[str, Any],
    tokens: list[int],
    offset: int,
    *,
    tokenizer: TokenizerWrapper,
    how: TextConfig,
    limit: int,
    texts: dict[str, str] | None,
) -> list[Example]:
    """Make the example in which the prompt, or its task's description, selects for the answer."""
    _require(
        len(tokens) <= limit,
        f"{len(tokens):,} tokens, {len(tokens) - offset:,} of them the answer, are more than "
        f"{limit:,}; raise --max-seq-length or split the row before training.",
    )
    task = row.get("task")
    if texts is None:
        selects = selecting_text(row["messages"], how.source)
    else:
        _require(task is not None, "the row has no task, but task descriptions are to select.")
        _require(task in texts, f"the task {task!r} has no description.")
        selects = texts[str(task)]
    advice = "Shorten the row, or leave it out."
    selecting = selector_tokens(tokenizer, selects, how, advice)
    return [Example(tokens, offset, selecting, task)]


def _chunks(
    row: dict[str, Any],
    tokens: list[int],
    _: int,
    *,
    tokenizers: tuple[TokenizerWrapper, TokenizerWrapper],
    how: TextConfig,
    size: int,
    limit: int,
) -> list[Example]:
    """Make the examples in which chunk k selects for chunk k + 1 (paper, equation 5)."""
    own, selectors = tokenizers
    examples = []
    for start in range(size, len(tokens), size):
        selecting = tokens[start - size : start]
        if selectors is not own:
            selecting = selectors.encode(
                own.decode(selecting, skip_special_tokens=True), add_special_tokens=False
            )
        _require(
            len(selecting) <= how.max_tokens,
            f"a chunk has {len(selecting):,} tokens, this checkpoint's selectors take "
            f"{how.max_tokens:,}; lower --chunk-size.",
        )
        end = min(start + size, len(tokens))
        # Whole chunks are left out from the beginning until the rest fits.
        left = math.ceil(max(0, end - limit) / size) * size
        if selecting:  # a chunk of special tokens alone decodes to nothing
            examples.append(Example(tokens[left:end], start - left, selecting, row.get("task")))
    return examples
