"""JSONL rows -> examples -> batches on the device.

Rows are those of ``mlx_ifp.train``: ``{"messages": [...], "task": "name"}``, or ``{"text": ...}``
for the stage ``pretrain``. A row with ``"truncated": true`` has an answer that was cut by a limit:
its tokens are trained, but not the tokens that would end its turn.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

PAD_MULTIPLE = 64


class DataError(Exception):
    """What is wrong with the data, in one line."""


@dataclass(frozen=True)
class Example:
    """One text to predict, and the text that selects for it.

    Attributes:
        tokens: the LLM's tokens: context and what is predicted.
        offset: the first token whose prediction counts (start of the answer or chunk), 1 or more.
        selecting: the selector's tokens of the text that selects.
        task: the row's ``task``, or None.
    """

    tokens: list[int]
    offset: int
    selecting: list[int]
    task: str | None


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSONL file, each with where it is."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); name a JSONL file") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a JSON object")
        if not isinstance(row.get("task"), str | None):
            raise DataError(f"{where}: task must be a string")
        yield where, row


def load_examples(
    path: Path,
    tokenizer: Any,
    selector_tokenizer: Any,
    *,
    stage: str = "sft",
    max_length: int = 1024,
    chunk_size: int = 256,
    descriptions: dict[str, str] | None = None,
    chat_format: bool = False,
) -> list[Example]:
    """Read and tokenize a JSONL file (paper, section 3.2).

    Stage ``sft``: the first user message selects, or the description of the row's task; the last
    assistant message is predicted. Stage ``pretrain``: a text is cut into chunks, and chunk c
    selects for the prediction of chunk c + 1, which sees everything before it (equation 5).

    Args:
        path (Path): the file.
        tokenizer, selector_tokenizer: of the LLM and of the predictor, of transformers.
        stage (str): ``sft`` or ``pretrain``.
        max_length (int): in tokens; longer rows are left out, long texts lose their beginning.
        chunk_size (int): in tokens, for ``pretrain``.
        descriptions (dict): task -> the text that selects for it, instead of the prompt.
        chat_format (bool): whether the text that selects is wrapped as a user's message; else it
            is raw.
    """
    rows = list(read_rows(path))
    if stage == "sft":
        examples = _answers(rows, tokenizer, selector_tokenizer, descriptions, chat_format)
    else:
        examples = _chunks(rows, tokenizer, selector_tokenizer, chunk_size, max_length)
    kept = [example for example in examples if len(example.tokens) <= max_length]
    if not kept:
        raise DataError(f"{path} has no row that can be used; give rows of at most --max-length")
    if len(kept) < len(examples):
        left = len(examples) - len(kept)
        print(f"{path}: {left} rows are longer than --max-length {max_length} and left out")
    return kept


def selecting_text(where: str, row: dict[str, Any], descriptions: dict[str, str] | None) -> str:
    """The text that selects: the first user message, or the description of the row's task."""
    if descriptions is not None:
        if row.get("task") not in descriptions:
            raise DataError(f"{where}: the task {row.get('task')!r} has no description")
        return descriptions[row["task"]]
    for message in row["messages"]:
        if message["role"] == "user" and message["content"].strip():
            return message["content"]
    raise DataError(f"{where}: there is no user message to select by")


def _check_messages(where: str, row: dict[str, Any]) -> None:
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: a row has messages, a prompt and its answer at least")
    for message in messages:
        texts = isinstance(message, dict) and [message.get("role"), message.get("content")]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: a message has role and content, both strings")
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise DataError(f"{where}: the last message must be an answer of the assistant, not empty")


def _answers(
    rows: list[tuple[str, dict[str, Any]]],
    tokenizer: Any,
    selector_tokenizer: Any,
    descriptions: dict[str, str] | None,
    chat_format: bool,
) -> list[Example]:
    for where, row in rows:
        _check_messages(where, row)
    if not rows:
        return []
    if not tokenizer.chat_template:
        raise DataError("the model has no chat template; give texts and --stage pretrain")
    # All texts in one call: the tokenizer uses all cores then.
    conversations = [row["messages"] for _, row in rows]
    whole = _encode_chats(tokenizer, conversations, False)
    prompts = _encode_chats(tokenizer, [messages[:-1] for messages in conversations], True)
    texts = [selecting_text(where, row, descriptions) for where, row in rows]
    if chat_format:
        turns = [[{"role": "user", "content": text}] for text in texts]
        selecting = _encode_chats(selector_tokenizer, turns, True)
    else:
        # With special tokens, as mlx_ifp tokenizes a raw text.
        selecting = selector_tokenizer(texts)["input_ids"]
    ending = _ending(tokenizer) if any(row.get("truncated") for _, row in rows) else 0
    examples = []
    for (where, row), tokens, prompt, selects in zip(rows, whole, prompts, selecting, strict=True):
        offset = len(prompt)
        if tokens[:offset] != prompt or offset == len(tokens):
            raise DataError(
                f"{where}: the prompt's tokens are not the beginning of the conversation's, so the "
                "answer's place is unknown; the chat template must keep prompts as they are"
            )
        if row.get("truncated") and ending:
            tokens = tokens[:-ending]
        if len(tokens) > offset:
            examples.append(Example(tokens, offset, selects, row.get("task")))
    return examples


def _encode_chats(tokenizer: Any, conversations: list[Any], prompt: bool) -> list[list[int]]:
    try:
        texts = tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # templates raise what they like
        raise DataError(f"the chat template does not take the rows ({error})") from error
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _ending(tokenizer: Any) -> int:
    """How many tokens the chat template puts after an answer."""
    made = _encode_chats(
        tokenizer,
        [
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
            for content in ("a", "B", "1", "?")
        ],
        False,
    )
    count = 0
    while len({tokens[-1 - count] for tokens in made}) == 1:
        count += 1
    return count


def _chunks(
    rows: list[tuple[str, dict[str, Any]]],
    tokenizer: Any,
    selector_tokenizer: Any,
    size: int,
    limit: int,
) -> list[Example]:
    if limit < 2 * size:
        raise DataError(f"--max-length {limit} does not hold two chunks of {size} tokens")
    texts = []
    for where, row in rows:
        if isinstance(row.get("text"), str):
            texts.append(row["text"])
        else:
            _check_messages(where, row)
            texts.append(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    examples = []
    for tokens, (_, row) in zip(tokenizer(texts)["input_ids"] if texts else [], rows, strict=True):
        for start in range(size, len(tokens), size):
            selecting = tokens[start - size : start]
            if selector_tokenizer is not tokenizer:
                text = tokenizer.decode(selecting, skip_special_tokens=True)
                selecting = selector_tokenizer(text, add_special_tokens=False)["input_ids"]
            end = min(start + size, len(tokens))
            # The first chunks go, whole, until the rest fits.
            left = math.ceil(max(0, end - limit) / size) * size
            if selecting:
                examples.append(Example(tokens[left:end], start - left, selecting, row.get("task")))
    return examples


@dataclass(frozen=True)
class Batch:
    """B examples on the device. The hidden state at position t predicts token t + 1.

    Attributes:
        tokens: int64 [B, S], padded on the right with 0; S is a multiple of 64.
        selecting: int64 [B, n], padded likewise.
        selecting_mask: int64 [B, n], 1 for tokens.
        places: int64 [N], positions that count in the flattened [B * S], padded with 0.
        labels: int64 [N], the tokens they predict.
        answer: float32 [N], 1 where the answer is predicted, else 0.
        every: float32 [N], 1 where any token is predicted, 0 for padding.
        prompt: bool [B, S, 1], True for the tokens before the answer or chunk.
        indices: which examples these are.
    """

    tokens: Tensor
    selecting: Tensor
    selecting_mask: Tensor
    places: Tensor
    labels: Tensor
    answer: Tensor
    every: Tensor
    prompt: Tensor
    indices: list[int]


class DeviceData:
    """Tokenized examples, of which batches are made on a device.

    Args:
        examples (list): what :func:`load_examples` gives.
        device (torch.device): where batches are made.
        block (int): the number of positions is padded to a multiple of this.
    """

    def __init__(self, examples: list[Example], device: torch.device, block: int) -> None:
        self.examples, self.device, self.block = examples, device, block
        self.lengths = np.array([len(example.tokens) for example in examples])
        self.offsets = np.array([example.offset for example in examples])
        # Batches are made of tensors: lists would have to be converted again and again.
        self._tokens = [torch.tensor(example.tokens) for example in examples]
        self._selecting = [torch.tensor(example.selecting) for example in examples]

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _padded(self, rows: list[Tensor], value: int = 0) -> Tensor:
        """int64 [B, n] of rows that are padded on the right; n is a multiple of 64."""
        made = pad_sequence(rows, batch_first=True, padding_value=value)
        return functional.pad(made, (0, -made.shape[1] % PAD_MULTIPLE), value=value)

    def selecting(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """The texts that select for some examples, int64 [B, n], and 1 where they have tokens."""
        ids = self._padded([self._selecting[i] for i in indices], -1)
        return self._to_device(ids.clamp(min=0)), self._to_device((ids >= 0).long())

    def batch(self, indices: np.ndarray, distill_on: str = "all") -> Batch:
        """Some examples as a batch; ``answer`` leaves out positions of prompts, ``all`` none."""
        tokens = self._padded([self._tokens[i] for i in indices])
        selecting, selecting_mask = self.selecting(indices)
        lengths, offsets = (torch.from_numpy(x[indices]) for x in (self.lengths, self.offsets))
        following = torch.arange(1, tokens.shape[1] + 1)
        every = following < lengths[:, None]
        answer = every & (following >= offsets[:, None])
        places = (every if distill_on == "all" else answer).flatten().nonzero()[:, 0]
        labels = tokens.roll(-1, dims=1)
        parts = [part.flatten()[places] for part in (labels, answer.float(), every.float())]
        padding = (0, -len(places) % self.block)
        parts = [self._to_device(functional.pad(part, padding)) for part in (places, *parts)]
        prompt = torch.arange(tokens.shape[1]) < offsets[:, None]
        return Batch(
            self._to_device(tokens), selecting, selecting_mask, *parts,
            prompt=self._to_device(prompt[..., None]), indices=indices.tolist(),
        )  # fmt: skip

    def counts(self, indices: np.ndarray) -> tuple[int, int]:
        """How many tokens of some examples are predicted: of answers, and of all."""
        lengths, offsets = self.lengths[indices], self.offsets[indices]
        return int((lengths - offsets).sum()), int((lengths - 1).sum())


class BatchOrder:
    """Which examples the batches hold: endless, and batch i depends only on the seed and i.

    A batch holds examples of about one length, about ``batch_tokens`` tokens with padding. An epoch
    sees each example once.

    Args:
        lengths (array): of the examples, in tokens.
        batch_tokens (int): of a batch, padding included.
        seed (int): of the order.
    """

    def __init__(self, lengths: np.ndarray, batch_tokens: int, seed: int) -> None:
        self._widths = -(-lengths // PAD_MULTIPLE) * PAD_MULTIPLE
        self._batch_tokens, self._seed = batch_tokens, seed
        self._epoch, self._batches = 0, self._shuffled(0)
        self.batches_per_epoch = len(self._batches)

    def __call__(self, number: int) -> np.ndarray:
        """The examples of a batch, counted from 0: int64 [B]."""
        epoch, i = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[i]

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._widths))
        batches: list[np.ndarray] = []
        rest = order[:0]
        for width in np.unique(self._widths):
            # What fills no batch is padded to the next width.
            members = np.concatenate([rest, order[self._widths[order] == width]])
            size = max(1, self._batch_tokens // int(width))
            full = len(members) // size * size
            batches += list(members[:full].reshape(-1, size))
            rest = members[full:]
        if len(rest) == 1 and batches:
            # A batch of one row would be compiled for itself.
            batches[-1] = np.concatenate([batches[-1], rest])
        elif len(rest):
            batches.append(rest)
        return [batches[i] for i in random.permutation(len(batches))]


def by_length(data: DeviceData, batch_tokens: int, wanted: int | None = None) -> list[np.ndarray]:
    """Examples, or so many of them, as batches in order of length: for evaluation."""
    count = len(data.lengths)
    used = np.unique(np.linspace(0, count - 1, min(count, wanted or count)).astype(int))
    used = used[np.argsort(data.lengths[used], kind="stable")]
    batches, start = [], 0
    while start < len(used):
        stop = start + 1
        while stop < len(used) and (stop + 1 - start) * _width(data, used[stop]) <= batch_tokens:
            stop += 1
        batches.append(used[start:stop])
        start = stop
    return batches


def _width(data: DeviceData, index: int) -> int:
    return math.ceil(data.lengths[index] / PAD_MULTIPLE) * PAD_MULTIPLE


def draw_k(low: int, high: int, step: int, seed: int) -> int:
    """The channels kept in a step: a number from ``low`` to ``high``, the same on all processes.

    If the range has multiples of 64, it is one of these or an end of the range.
    """
    if low == high:
        return low
    choices = sorted({low, high, *range(math.ceil(low / 64) * 64, high + 1, 64)})
    if len(choices) == 2:
        choices = list(range(low, high + 1))
    return int(np.random.default_rng([seed, 7, step]).choice(choices))
