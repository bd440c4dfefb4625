"""Training data: rows in mlx-lm's formats -> examples -> batches of token arrays."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import load_dataset

from ..config import TextConfig
from ..errors import IFPError
from ..text import selecting_text, selector_tokens

SPLITS = ("train", "valid", "test")
STAGES = ("sft", "pretrain")
PAD_MULTIPLE = 32
SORT_WINDOW = 8  # batches


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


@dataclass(frozen=True)
class Batch:
    """B examples as arrays. Position t predicts token t + 1.

    Attributes:
        tokens: int32 [B, S], padded on the right with 0; S is a multiple of 32.
        loss_mask: bool [B, S - 1], true where offset <= t + 1 < length.
        token_mask: bool [B, S - 1], true where t + 1 < length.
        selecting: int32 [B, n], padded on the right with 0; n is a multiple of 32.
        selecting_lengths: int32 [B].
        task: the task of all examples, or None if they differ or have none.
        indices: where they are in the list of examples.
    """

    tokens: mx.array
    loss_mask: mx.array
    token_mask: mx.array
    selecting: mx.array
    selecting_lengths: mx.array
    task: str | None
    indices: list[int]


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
) -> dict[str, list[Example]]:
    """Load and tokenize training data (paper, section 3.2).

    Stage ``sft``: the first user message selects (or what ``text.source`` says), and the last
    assistant message is predicted. Stage ``pretrain``: a text is cut into chunks, and chunk k
    selects for the prediction of chunk k + 1, which sees everything before it (equation 5).

    Args:
        data (str): a directory of ``{train,valid,test}.jsonl`` or a dataset's name on the hub, in
            one of mlx-lm's formats: ``text``, ``completions`` or ``chat``. Each row may have a
            string ``task``.
        tokenizer: the LLM's.
        selector_tokenizer: the selector's; may be the same object.
        text (TextConfig): the checkpoint's ``text``.
        stage (str): ``sft`` or ``pretrain``.
        max_seq_length (int): in tokens. ``sft`` refuses longer examples, ``pretrain`` leaves out
            the first chunks.
        chunk_size (int): in tokens, for ``pretrain``.
        task_texts (dict): descriptions of tasks by name. They select, not the prompts (``sft``).

    Returns:
        dict: the examples of ``train``, ``valid`` and ``test``; a list is empty if the split is
        absent.

    Raises:
        IFPError: naming the file and line of the first row that is not usable.
    """
    if stage not in STAGES:
        raise IFPError(f"stage must be one of {', '.join(STAGES)}, not {stage!r}.")
    if stage == "pretrain":
        _check_chunks(chunk_size, max_seq_length, text, task_texts)
    examples: dict[str, list[Example]] = {}
    for split, dataset in _load_datasets(data, tokenizer, stage).items():
        examples[split] = []
        described: dict[str, list[int]] = {}
        for where, row in _checked_rows(data, split, dataset, stage):
            try:
                if stage == "pretrain":
                    tokens = _process(dataset, row)[0]
                    examples[split] += _chunk_examples(
                        tokens, row.get("task"), tokenizer, selector_tokenizer, text,
                        chunk_size, max_seq_length,
                    )  # fmt: skip
                    continue
                selecting = _selecting(row, selector_tokenizer, text, task_texts, described)
                tokens, offset = _process(dataset, row)
                _check_answer(tokens, offset, max_seq_length)
            except IFPError as error:
                raise IFPError(f"{where}: {error}") from error
            examples[split].append(Example(tokens, offset, selecting, row.get("task")))
    if not examples["train"]:
        # Only chunks give nothing: a row of sft is an example or an error.
        raise IFPError(
            f"{data}: no text of train is longer than one chunk of {chunk_size:,} tokens; lower "
            "--chunk-size or give longer texts."
        )
    return examples


def task_counts(examples: list[Example]) -> dict[str | None, int]:
    """How many examples each task has, in order of first appearance."""
    return dict(Counter(example.task for example in examples))


def _check_chunks(
    chunk_size: int, max_seq_length: int, text: TextConfig, task_texts: dict[str, str] | None
) -> None:
    if task_texts is not None:
        raise IFPError("In stage pretrain chunks select; task descriptions are for stage sft.")
    if chunk_size < 1:
        raise IFPError(f"--chunk-size must be 1 or more, not {chunk_size}.")
    if max_seq_length < 2 * chunk_size:
        raise IFPError(
            f"--max-seq-length {max_seq_length:,} does not hold two chunks of {chunk_size:,} "
            "tokens, one that selects and one that is predicted; lower --chunk-size."
        )
    if chunk_size > text.max_tokens:
        raise IFPError(
            f"A chunk of {chunk_size:,} tokens is longer than the {text.max_tokens:,} that this "
            "checkpoint's selectors take; lower --chunk-size."
        )


def _load_datasets(data: str, tokenizer: TokenizerWrapper, stage: str) -> dict[str, Any]:
    """mlx-lm's dataset of each split, after a check of the files it would read."""
    path = Path(data)
    if path.is_file() or (path.suffix == ".jsonl" and not path.exists()):
        raise IFPError(
            f"{data}: give the directory that holds train.jsonl (and valid.jsonl, test.jsonl), "
            "not a file."
        )
    local = path.is_dir()
    if local:
        if not (path / "train.jsonl").exists():
            raise IFPError(f"{path / 'train.jsonl'} is missing; put the training rows there.")
        for split in SPLITS:
            if (path / f"{split}.jsonl").exists():
                _check_file(path / f"{split}.jsonl", stage)
    # mlx-lm refuses to mask prompts of text rows before it says which split they are in, so masks
    # are switched on below.
    args = SimpleNamespace(data=data, train=False, test=False, mask_prompt=False)
    try:
        datasets = dict(zip(SPLITS, load_dataset(args, tokenizer), strict=True))
    except ImportError as error:
        raise IFPError(
            f"{data}: there is no such directory; to load a dataset from the Hugging Face hub: "
            "pip install datasets"
        ) from error
    except Exception as error:
        # The hub's loader raises what its many back ends raise.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise IFPError(
            f"{data}: neither a directory nor a dataset that can be loaded from the hub ({reason})."
        ) from error
    if not len(datasets["train"]):
        raise IFPError(f"{data}: there is no split named train, or it is empty.")
    for dataset in datasets.values():
        if stage == "sft" and hasattr(dataset, "mask_prompt"):
            dataset.mask_prompt = True
    return datasets


def _check_file(path: Path, stage: str) -> None:
    """Raises IFPError for the first line that is not a row of the format of line 1."""
    number, first = 0, None
    try:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                number += 1
                first = _check_row(_parse(line), first, stage)
    except UnicodeDecodeError as error:
        raise IFPError(f"{path}: line {number + 1} or after: not UTF-8 text.") from error
    except OSError as error:
        raise IFPError(f"{path}: cannot be read ({error.strerror}).") from error
    except IFPError as error:
        raise IFPError(f"{path}: line {number}: {error}") from error
    if number == 0:
        raise IFPError(f"{path}: the file is empty; give one JSON object a line.")


def _parse(line: str) -> Any:
    if not line.strip():
        raise IFPError("the line is blank; remove it.")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise IFPError(f"not JSON ({error.msg}, column {error.colno}).") from error
    except (ValueError, RecursionError) as error:
        raise IFPError(f"not JSON that can be read ({error}).") from error


def _checked_rows(
    data: str, split: str, dataset: Any, stage: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row, and the words that say where it is."""
    local = Path(data).is_dir()
    first = None
    for i in range(len(dataset)):
        # Blank lines are refused, so row i of a file is line i + 1.
        where = f"{Path(data) / split}.jsonl: line {i + 1}" if local else f"{data}: {split} row {i}"
        row = dataset[i]
        if not local:
            try:
                first = _check_row(row, first, stage)
            except IFPError as error:
                raise IFPError(f"{where}: {error}") from error
        yield where, row


def _check_row(row: Any, first: str | None, stage: str) -> str:
    """Check a row's fields.

    Args:
        row: what a line of JSON holds.
        first (str): the format of the first row, which mlx-lm takes for all, or None.
        stage (str): ``sft`` or ``pretrain``.

    Returns:
        str: the row's format: ``completions``, ``chat`` or ``text``.

    Raises:
        IFPError: what is wrong, without where.
    """
    if not isinstance(row, dict):
        raise IFPError(f"a row must be a JSON object, not {type(row).__name__}.")
    kind = _row_format(row)
    if first is not None and kind != first:
        raise IFPError(f"a row of format {kind}, but the first one is {first}; use one format.")
    if not isinstance(row.get("task"), str | None):
        raise IFPError("task must be a string.")
    if kind == "text":
        if stage == "sft":
            raise IFPError("a row of format text has no prompt to select; use --stage pretrain.")
        if not isinstance(row["text"], str):
            raise IFPError("text must be a string.")
    elif kind == "completions":
        for name in ("prompt", "completion"):
            if not isinstance(row[name], str):
                raise IFPError(f"{name} must be a string.")
        if stage == "sft" and not row["completion"].strip():
            raise IFPError("the completion is empty.")
    else:
        _check_messages(row["messages"], stage)
    return kind


def _row_format(row: dict[str, Any]) -> str:
    # The order is mlx-lm's.
    if "prompt" in row and "completion" in row:
        return "completions"
    if "messages" in row:
        return "chat"
    if "text" in row:
        return "text"
    raise IFPError(
        f"unknown format, with the fields {', '.join(sorted(row)) or 'none'}; a row has text, or "
        "prompt and completion, or messages."
    )


def _check_messages(messages: Any, stage: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise IFPError("messages must be a list of at least one message.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise IFPError(f"message {number} must be an object with role and content.")
        content = message.get("content")
        # Only a message that calls tools may do without content.
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise IFPError(f"the content of message {number} must be a string.")
    if stage == "sft":
        last = messages[-1]
        if last["role"] != "assistant":
            raise IFPError(f"the last message must be the assistant's, not of {last['role']!r}.")
        content = last.get("content")
        if not (content.strip() if isinstance(content, str) else content or last.get("tool_calls")):
            raise IFPError("the last message, the answer, is empty.")


def _process(dataset: Any, row: dict[str, Any]) -> tuple[list[int], int]:
    """mlx-lm's tokens and offset of a row."""
    if row.get("text") == "" and _row_format(row) == "text":
        return [], 0  # mlx-lm looks at the last token
    if _row_format(row) != "text" and not dataset.tokenizer.has_chat_template:
        raise IFPError("this model has no chat template; give rows of format text.")
    try:
        tokens, offset = dataset.process(row)
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise IFPError(f"the chat template does not take these messages: {error}.") from error
    return list(tokens), offset


def _check_answer(tokens: list[int], offset: int, max_seq_length: int) -> None:
    if len(tokens) > max_seq_length:
        raise IFPError(
            f"{len(tokens):,} tokens, {len(tokens) - offset:,} of them the answer, are more than "
            f"{max_seq_length:,}; raise --max-seq-length or split the row before training."
        )
    if offset >= len(tokens):
        raise IFPError("the chat template makes no tokens of the answer.")
    if offset < 1:
        raise IFPError("there is nothing before the answer.")


def _selecting(
    row: dict[str, Any],
    tokenizer: TokenizerWrapper,
    text: TextConfig,
    task_texts: dict[str, str] | None,
    described: dict[str, list[int]],
) -> list[int]:
    """The selector's tokens for a row; ``described`` keeps those of the tasks."""
    if task_texts is None:
        messages = row.get("messages")
        if _row_format(row) == "completions":
            messages = [{"role": "user", "content": row["prompt"]}]
        return selector_tokens(tokenizer, selecting_text(messages, text.source), text)
    task = row.get("task")
    if task is None:
        raise IFPError("the row has no task, but task descriptions are to select; add the field.")
    if task not in task_texts:
        raise IFPError(f"the task {task!r} has no description.")
    if task not in described:
        described[task] = selector_tokens(tokenizer, task_texts[task], text)
    return described[task]


def _chunk_examples(
    tokens: list[int],
    task: str | None,
    tokenizer: TokenizerWrapper,
    selector_tokenizer: TokenizerWrapper,
    text: TextConfig,
    chunk_size: int,
    max_seq_length: int,
) -> list[Example]:
    """Chunk k selects for chunk k + 1, for all k (paper, equation 5)."""
    examples = []
    for start in range(chunk_size, len(tokens), chunk_size):
        selecting = tokens[start - chunk_size : start]
        if selector_tokenizer is not tokenizer:
            selecting = selector_tokenizer.encode(
                tokenizer.decode(selecting, skip_special_tokens=True), add_special_tokens=False
            )
            if not selecting:
                continue  # a chunk of special tokens
            if len(selecting) > text.max_tokens:
                raise IFPError(
                    f"a chunk has {len(selecting):,} tokens of the selector's, which takes "
                    f"{text.max_tokens:,}; lower --chunk-size."
                )
        end = min(start + chunk_size, len(tokens))
        # The first chunks go, whole, until the rest fits.
        over = max(0, end - max_seq_length)
        left = math.ceil(over / chunk_size) * chunk_size
        examples.append(Example(tokens[left:end], start - left, selecting, task))
    return examples


def make_batch(examples: list[Example], indices: list[int]) -> Batch:
    """Put the examples at ``indices`` into arrays; the shapes are those of ``Batch``."""
    chosen = [examples[i] for i in indices]
    tokens, lengths = _pad([example.tokens for example in chosen])
    selecting, selecting_lengths = _pad([example.selecting for example in chosen])
    offsets = np.array([example.offset for example in chosen])
    predicted = np.arange(1, tokens.shape[1])[None]
    token_mask = predicted < lengths[:, None]
    tasks = {example.task for example in chosen}
    return Batch(
        tokens=mx.array(tokens),
        loss_mask=mx.array(token_mask & (predicted >= offsets[:, None])),
        token_mask=mx.array(token_mask),
        selecting=mx.array(selecting),
        selecting_lengths=mx.array(selecting_lengths),
        task=tasks.pop() if len(tasks) == 1 else None,
        indices=list(indices),
    )


def _pad(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, n] with n a multiple of 32, and the lengths, int32 [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    width = math.ceil(int(lengths.max()) / PAD_MULTIPLE) * PAD_MULTIPLE
    padded = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, lengths


class Batches:
    """Endless, resumable: the batch of step i depends only on (seed, i).

    An epoch sees every example at least once. A batch that a task cannot fill is filled up with
    other examples of the task, drawn again, so that all batches have one size on all ranks.

    Args:
        examples: what ``load_examples`` gives for a split.
        batch_size (int): of all ranks together.
        seed (int): of the order.
        group_by_task (bool): a batch holds examples of one task; None is a task as well.
        rank, world_size (int): this process has examples rank, rank + world_size, ... of each
            batch.

    Raises:
        IFPError: if there are no examples, or a number does not fit the others.
    """

    def __init__(
        self,
        examples: list[Example],
        batch_size: int,
        *,
        seed: int = 0,
        group_by_task: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not examples:
            raise IFPError("There are no examples to make batches of.")
        if batch_size < 1 or batch_size % world_size:
            raise IFPError(
                f"--batch-size {batch_size} must be a positive multiple of the {world_size} "
                "processes that share it."
            )
        if seed < 0:
            raise IFPError(f"--seed must be 0 or more, not {seed}.")
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        groups: dict[str | None, list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(example.task if group_by_task else None, []).append(i)
        self._groups = [np.array(group) for group in groups.values()]
        self._lengths = np.array([len(example.tokens) for example in examples])
        self.steps_per_epoch = sum(math.ceil(len(group) / batch_size) for group in self._groups)
        self._epoch, self._order = -1, []

    def indices(self, step: int) -> list[int]:
        """This rank's share of batch number ``step``, counted from 0."""
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[i][self.rank :: self.world_size]

    def __call__(self, step: int) -> Batch:
        """This rank's share of batch number ``step``, as arrays."""
        return make_batch(self.examples, self.indices(step))

    def _shuffled(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, in order."""
        rng = np.random.default_rng([self.seed, epoch])
        size, batches = self.batch_size, []
        for group in self._groups:
            order = rng.permutation(group)
            # Neighbours in length share a batch, so padding is small; windows keep it random.
            for window in np.split(
                order, range(SORT_WINDOW * size, len(order), SORT_WINDOW * size)
            ):
                window = window[np.argsort(self._lengths[window], kind="stable")]
                batches += np.split(window, range(size, len(window), size))
            missing = size - len(batches[-1])
            if missing:
                others = rng.permutation(np.setdiff1d(group, batches[-1]))
                # A task smaller than a batch has no others: its examples repeat.
                fill = others if len(others) >= missing else rng.permutation(group)
                batches[-1] = np.concatenate([batches[-1], np.resize(fill, missing)])
        return [batches[i].tolist() for i in rng.permutation(len(batches))]
