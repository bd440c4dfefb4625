"""Compute once what the dense model does on the training examples, and keep it on disk.

Each example has the likeliest next tokens with their log-probabilities (for distillation), its
cross-entropy, and what every FFN channel did on the prompt and on the answer (for the warm start).
All come out of the same forward pass. Files are plain ``.npy`` arrays, written in place; a row
counts once its mark is set, so a run that was killed goes on where it was. Activations have a file
for each example, as they are wanted for some examples only. Several runs may share a directory.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..dense_pass.statistics import total
from ..errors import IFPError
from ..files.arrays import is_array, write_zeros
from ..files.atomic import new_file
from ..llm.ffn import FFN
from ..llm.modules import get_module, share
from ..llm.output import hidden_states, output_layer
from .batches import Batch, make_batch
from .data import Example

TOP_K = 64
_BLOCK = 512
# A row of logits is cut into blocks of so many values, and each block has its maximum.
_SELECTED_AT_ONCE = 64
# This number is raised when the content of the arrays changes.
_VERSION = 3


class _Recorder(nn.Module):
    """Stands in for a down projection, and keeps what GRIFFIN's statistic adds up of it.

    Args:
        down_proj (nn.Module): the projection.
        weights (mx.array): float32 [B, S], what each token counts for.

    Attributes:
        total: float32 [B, d_ffn].
    """

    def __init__(self, down_proj: nn.Module, weights: mx.array) -> None:
        super().__init__()
        self._down_proj = down_proj
        self._weights = weights
        self.total = mx.zeros(())

    def __call__(self, z: mx.array) -> mx.array:
        self.total = total("griffin", z, self._weights)
        return self._down_proj(z)


class DenseTargets:
    """Lazily computed targets of a list of examples.

    Args:
        directory (Path): where the arrays are kept; a folder in it is named after the content.
        model (nn.Module): the dense source model. It must not be trained afterwards. It is
            forgotten when it has run over all examples.
        ffns (list): its FFNs.
        examples (list): of one split.
        source (str): digest of the source model's weights.
        top_k (int): tokens to keep for each position.

    Attributes:
        forward_tokens: how many tokens the dense model has processed here.
    """

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        ffns: list[FFN],
        examples: list[Example],
        source: str,
        top_k: int = TOP_K,
    ) -> None:
        self.model: nn.Module | None = model
        self.ffns, self.examples = ffns, examples
        self.forward_tokens = 0
        lengths = [len(example.tokens) - 1 for example in examples]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        content = hashlib.sha256(json.dumps([_VERSION, source, top_k, lengths]).encode())
        for example in examples:
            content.update(np.asarray([example.offset, *example.tokens], np.int32).tobytes())
        folder = Path(directory) / content.hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        positions, n = int(self._starts[-1]), len(examples)
        self._folder = folder
        arrays = {
            "ids": (np.uint32, (positions, top_k)),
            "logprobs": (np.float16, (positions, top_k)),
            "cross_entropy": (np.float32, (positions,)),
            "correct": (np.bool_, (positions,)),
        }
        done = folder / "done.npy"
        for name, (dtype, shape) in arrays.items():
            if not is_array(folder / f"{name}.npy", dtype, shape):
                # A marked row must be in all arrays, so the marks go if one array is missing.
                done.unlink(missing_ok=True)
                _write_zeros(folder / f"{name}.npy", dtype, shape)
        if not is_array(done, np.bool_, (n,)):
            _write_zeros(done, np.bool_, (n,))
        self._ids, self._logprobs, self._ce, self._right = (
            np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+") for name in arrays
        )
        self._done = np.lib.format.open_memmap(done, mode="r+")
        self._top_k = top_k

    def compute(self, indices: list[int], activations: bool = False) -> None:
        """Run the dense model over those examples that were not run before, as one batch.

        Args:
            indices (list): of examples.
            activations (bool): whether activations are wanted, too.
        """
        missing = sorted({
            i for i in indices
            if not self._done[i] or (activations and not self._has_activations(i))
        })  # fmt: skip
        if not missing:
            return
        assert self.model is not None, "it is forgotten when nothing is missing any more"
        batch = make_batch(self.examples, missing)
        model = share(self.model)
        recorders = []
        if activations:
            weights = _halves(batch)
            for ffn in self.ffns:
                module = get_module(model, ffn.path)
                recorders.append(_Recorder(module.down_proj, weights))
                module.down_proj = recorders[-1]
        hidden = hidden_states(model, batch.tokens[:, :-1])
        totals = [recorder.total for recorder in recorders]
        mx.eval(hidden, totals)
        self.forward_tokens += int(batch.token_mask.sum())
        if activations:
            statistics = np.array(mx.sqrt(mx.stack(totals, axis=1)).astype(mx.float16))
            for row, i in enumerate(missing):
                with new_file(self._activations_file(i)) as temporary:
                    np.save(temporary, statistics[row])
        parameters, logits = output_layer(self.model)
        for row, i in enumerate(missing):
            start, stop = self._starts[i], self._starts[i + 1]
            labels = np.asarray(self.examples[i].tokens[1:])
            for first in range(0, stop - start, _BLOCK):
                last = min(first + _BLOCK, stop - start)
                values = logits(parameters, hidden[row, first:last]).astype(mx.float32)
                self._store(values, labels[first:last], start + first)
            self._done[i] = True

    def compute_all(self, batch_size: int) -> None:
        """Run the dense model over all examples, and forget it."""
        order = sorted(range(len(self.examples)), key=lambda i: len(self.examples[i].tokens))
        for first in range(0, len(order), batch_size):
            self.compute(order[first : first + batch_size])
        self.forget_model()

    def forget_model(self) -> None:
        """Give up the dense model; nothing can be computed afterwards.

        Training gives the student new arrays, and the dense model's would stay in memory with them.
        """
        self.model = None

    def forget_if_done(self) -> None:
        """Forget the model if it has run over all examples."""
        # Activations need no check: they have all been asked for before this is called.
        if self._done.all():
            self.forget_model()

    def _has_activations(self, i: int) -> bool:
        shape = (len(self.ffns), self.ffns[0].d_ffn)
        return is_array(self._activations_file(i), np.float16, shape)

    def _activations_file(self, i: int) -> Path:
        return self._folder / f"activations-{i}.npy"

    def _store(self, logits: mx.array, labels: np.ndarray, start: int) -> None:
        lse = mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(logits, lse)
        # numpy selects faster than MLX's CPU backend sorts; it shares MLX's memory, also on Metal.
        values, sums = np.array(logits, copy=False), np.array(lse)
        rows = slice(start, start + len(values))
        top = _largest(values, self._top_k)
        self._ids[rows] = top
        self._logprobs[rows] = np.take_along_axis(values, top, axis=-1) - sums
        self._ce[rows] = (sums - np.take_along_axis(values, labels[:, None], axis=-1))[:, 0]
        self._right[rows] = values.argmax(axis=-1) == labels

    def teacher(self, indices: list[int], length: int) -> tuple[mx.array, mx.array]:
        """Give a batch's likeliest next tokens: uint32 and float32 [B, length, K], zero-padded."""
        self.compute(indices)
        self.forget_if_done()
        ids = np.zeros((len(indices), length, self._top_k), np.uint32)
        logprobs = np.zeros((len(indices), length, self._top_k), np.float32)
        for row, i in enumerate(indices):
            rows = slice(self._starts[i], self._starts[i + 1])
            ids[row, : rows.stop - rows.start] = self._ids[rows]
            logprobs[row, : rows.stop - rows.start] = self._logprobs[rows]
        return mx.array(ids), mx.array(logprobs)

    def answer_loss(self, i: int) -> tuple[float, bool]:
        """The dense model's summed cross-entropy on an answer, and whether it would give it.

        It would if every token of the answer is the likeliest: greedy decoding matches exactly.
        """
        self.compute([i])
        self.forget_if_done()
        answer = slice(self._starts[i] + self.examples[i].offset - 1, self._starts[i + 1])
        return float(self._ce[answer].sum()), bool(self._right[answer].all())

    def activations(self, indices: list[int]) -> np.ndarray:
        """GRIFFIN's statistic of each channel, prompt and answer alike: float32 [n, L, d_ffn]."""
        self.compute(indices, activations=True)
        rows = [np.load(self._activations_file(i)) for i in indices]
        return np.stack(rows).astype(np.float32)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Find the k largest values of each row, in any order: int [n, k] of float32 [n, V].

    They lie in the k blocks with the largest maxima, and there are few maxima to compare.
    """
    n, size = values.shape
    whole = size // _SELECTED_AT_ONCE * _SELECTED_AT_ONCE
    blocks = values[:, :whole].reshape(n, -1, _SELECTED_AT_ONCE)
    if blocks.shape[1] <= k:
        return np.argpartition(values, -k, axis=-1)[:, -k:]
    best = np.argpartition(blocks.max(axis=-1), -k, axis=-1)[:, -k:]
    places = best[..., None] * _SELECTED_AT_ONCE + np.arange(_SELECTED_AT_ONCE)
    rest = np.broadcast_to(np.arange(whole, size), (n, size - whole))
    places = np.concatenate([places.reshape(n, -1), rest], axis=1)
    found = np.argpartition(np.take_along_axis(values, places, axis=-1), -k, axis=-1)[:, -k:]
    return np.take_along_axis(places, found, axis=-1)


def _halves(batch: Batch) -> mx.array:
    """Weights of tokens, float32 [B, S - 1]: the answer's add up to 1, and so do the prompt's.

    The mask holds while the prompt is read, too. Channels that a short answer alone chose read the
    prompt badly: with half of SmolLM2-135M's channels, KL(dense || masked) on answers is more than
    twice as high.
    """
    answer = batch.loss_mask.astype(mx.float32)
    before = batch.token_mask.astype(mx.float32) - answer
    halves = [part / mx.maximum(part.sum(axis=1, keepdims=True), 1) for part in (before, answer)]
    return halves[0] + halves[1]


def _write_zeros(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """Make a zeroed array on disk."""
    path.unlink(missing_ok=True)
    # If several runs begin at once, one of them makes the file, and the others use it.
    with contextlib.suppress(FileExistsError), new_file(path, overwrite=False) as temporary:
        try:
            write_zeros(temporary, dtype, shape)
        except OSError as error:
            raise IFPError(
                f"{path} could not be written ({error.strerror}); make room, or name another "
                "--targets-path."
            ) from error


@dataclass
class Split:
    """A list of examples and what the dense model does on them."""

    examples: list[Example]
    targets: DenseTargets
