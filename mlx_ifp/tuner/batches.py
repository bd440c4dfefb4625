"""Turn examples into batches of token arrays, in an order that depends only on the seed."""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import IFPError
from .data import Example

PAD_MULTIPLE = 32
SORT_WINDOW = 8  # batches


@dataclass(frozen=True)
class Batch:
    """B examples as arrays. Position t predicts token t + 1.

    Attributes:
        tokens: int32 [B, S], padded on the right with 0; S is a multiple of 32.
        loss_mask: bool [B, S - 1], true where offset <= t + 1 < length.
        token_mask: bool [B, S - 1], true where t + 1 < length.
        selecting: int32 [B, n], padded on the right with 0; n is a multiple of 32.
        selecting_lengths: int32 [B].
        indices: where they are in the list of examples.
    """

    tokens: mx.array
    loss_mask: mx.array
    token_mask: mx.array
    selecting: mx.array
    selecting_lengths: mx.array
    indices: list[int]


def make_batch(examples: list[Example], indices: list[int]) -> Batch:
    """Put the examples at ``indices`` into arrays; the shapes are those of ``Batch``."""
    chosen = [examples[i] for i in indices]
    tokens, lengths = _pad([example.tokens for example in chosen])
    selecting, selecting_lengths = _pad([example.selecting for example in chosen])
    offsets = np.array([example.offset for example in chosen])
    predicted = np.arange(1, tokens.shape[1])[None]
    token_mask = predicted < lengths[:, None]
    return Batch(
        tokens=mx.array(tokens),
        loss_mask=mx.array(token_mask & (predicted >= offsets[:, None])),
        token_mask=mx.array(token_mask),
        selecting=mx.array(selecting),
        selecting_lengths=mx.array(selecting_lengths),
        indices=list(indices),
    )


def _pad(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows to int32 [B, n], n a multiple of 32; also give their lengths, int32 [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    width = math.ceil(int(lengths.max()) / PAD_MULTIPLE) * PAD_MULTIPLE
    padded = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, lengths


def spread(n: int, wanted: int) -> list[int]:
    """Up to ``wanted`` of the numbers below n, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, wanted)).astype(int)).tolist()


def batches_by_length(order: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut an order into batches; neighbours in length share one, so that padding is small.

    Args:
        order (array): int [n], indices of examples in a random order, which windows keep random.
        lengths (array): int, of all examples.
        size (int): examples of a batch; the last one may be smaller.
    """
    batches = []
    for window in np.split(order, range(SORT_WINDOW * size, len(order), SORT_WINDOW * size)):
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += np.split(window, range(size, len(window), size))
    return batches


class Batches:
    """Batches without end; the batch of step i depends only on (seed, i), so runs can resume.

    A batch holds examples of one task; None is a task as well. An epoch sees every example at
    least once. If a task's last batch is not full, other examples of the task are drawn again to
    fill it, so that all batches have one size on all ranks.

    Args:
        examples: what ``load_examples`` gives for a split.
        batch_size (int): examples of a batch on all ranks together.
        seed (int): seed of the order.
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
            groups.setdefault(example.task, []).append(i)
        self._groups = [np.array(group) for group in groups.values()]
        self._lengths = np.array([len(example.tokens) for example in examples])
        self.steps_per_epoch = sum(math.ceil(len(group) / batch_size) for group in self._groups)
        self._epoch = -1
        self._order: list[list[int]] = []

    def indices(self, step: int) -> list[int]:
        """The examples of batch number ``step``, counted from 0, that belong to this rank."""
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
            batches += batches_by_length(rng.permutation(group), self._lengths, size)
            missing = size - len(batches[-1])
            if missing:
                others = rng.permutation(np.setdiff1d(group, batches[-1]))
                # A task smaller than a batch has no others: its examples repeat.
                fill = others if len(others) >= missing else rng.permutation(group)
                batches[-1] = np.concatenate([batches[-1], np.resize(fill, missing)])
        return [batches[i].tolist() for i in rng.permutation(len(batches))]
