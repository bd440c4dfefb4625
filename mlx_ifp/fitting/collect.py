"""What the dense LLM computes on examples, streamed to disk.

For each example it is the final hidden state of the prompt's last token, and GRIFFIN's statistic of
the answer and, if it is asked for, of the prompt. Files are plain ``.npy`` arrays, written in
place; an example counts once its mark is set, so a run that was stopped goes on where it was.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..dense_pass.layers import Piece, run_layers
from ..dense_pass.statistics import BATCH_TOKENS, PASS_TOKENS, passes, total
from ..errors import IFPError
from ..files.arrays import is_array, write_zeros
from ..files.atomic import new_file
from ..subnetwork.parent import Parent
from .examples import Example

_META = "statistics.json"
# This number is raised when the content of the arrays changes.
_VERSION = 1


class Statistics:
    """Arrays on disk, one row an example.

    Args:
        directory (Path): where they are; it is made if it is missing.
        model (str): the digest of the checkpoint.
        examples (sequence): what is measured.
        layers, d_ffn, hidden_size (int): the LLM's.
        prompts (bool): whether prompts are measured, too.

    Attributes:
        hidden: float32 [N, hidden size], of the prompt's last token.
        answers: float16 [N, L * d_ffn], the statistic of the answer's tokens that the sub-network
            reads: the root of the mean over them of each channel's share.
        prompts: the same of the prompt, or None.

    Raises:
        IFPError: if the directory has the statistics of another model or of other examples.
    """

    def __init__(
        self,
        directory: Path,
        model: str,
        examples: Sequence[Example],
        layers: int,
        d_ffn: int,
        hidden_size: int,
        *,
        prompts: bool = False,
    ) -> None:
        self.examples, self._shape = examples, (layers, d_ffn)
        self._directory = directory
        content = hashlib.sha256()
        for example in examples:
            content.update(np.asarray([example.offset, *example.tokens], np.int32).tobytes())
        meta = {"version": _VERSION, "model": model, "examples": content.hexdigest()}
        directory.mkdir(parents=True, exist_ok=True)
        self._check(directory / _META, meta)
        n, channels = len(examples), layers * d_ffn
        self.hidden = self._array("hidden", np.float32, (n, hidden_size))
        self.answers = self._array("answers", np.float16, (n, channels))
        self.prompts = self._array("prompts", np.float16, (n, channels)) if prompts else None
        self._done = self._array("done", np.bool_, (n,))

    def _check(self, file: Path, meta: dict[str, Any]) -> None:
        if not file.exists():
            with new_file(file) as temporary:
                temporary.write_text(json.dumps(meta) + "\n")
            return
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):
            found = {}
        for name, what in (("model", "another model"), ("examples", "other examples")):
            if not isinstance(found, dict) or found.get(name) != meta[name]:
                raise IFPError(
                    f"{self._directory} has statistics of {what}; delete it, or name another "
                    "--statistics-path."
                )
        if found != meta:
            raise IFPError(f"{self._directory} is of another version of mlx_ifp; delete it.")

    def _array(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        """Open an array, or make one of zeros."""
        path = self._directory / f"{name}.npy"
        if not path.exists():
            with new_file(path) as temporary:
                write_zeros(temporary, dtype, shape)
        if not is_array(path, dtype, shape):
            raise IFPError(f"{path} is damaged; delete {self._directory}.")
        return np.lib.format.open_memmap(path, mode="r+")

    @property
    def missing(self) -> list[int]:
        """The examples that were not measured yet."""
        return [int(i) for i in np.flatnonzero(~self._done)]

    def put(
        self,
        rows: list[int],
        hidden: np.ndarray,
        answers: np.ndarray,
        prompts: np.ndarray | None = None,
    ) -> None:
        """Store rows, and mark them.

        Args:
            rows (list): B numbers of examples.
            hidden (np.ndarray): float32 [B, hidden size].
            answers, prompts (np.ndarray): float [B, L, d_ffn].
        """
        self.hidden[rows] = hidden
        self.hidden.flush()
        for array, values in ((self.answers, answers), (self.prompts, prompts)):
            if array is not None and values is not None:
                array[rows] = values.reshape(len(rows), -1)
                array.flush()
        self._done[rows] = True
        self._done.flush()


def collect(
    parent: Parent, statistics: Statistics, progress: Callable[[int], Any] = lambda _: None
) -> int:
    """Measure the examples that were not measured yet.

    Texts of similar length are padded to one batch, and many batches pass a layer before the next
    one is read, with one FFN in memory at a time.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        statistics (Statistics): where the results go.
        progress (Callable): called with the number of examples that are done.

    Returns:
        int: how many tokens the LLM read.

    Raises:
        IFPError: if channels cannot be read.
    """
    examples, missing = statistics.examples, statistics.missing
    lengths = [len(examples[i].tokens) for i in missing]
    read = 0
    for batches in passes(lengths, BATCH_TOKENS, PASS_TOKENS):
        groups = [[missing[j] for j in batch] for batch in batches]
        made = [_piece(examples, group, statistics.prompts is not None) for group in groups]
        pieces, weights = zip(*made, strict=True)

        def measure(piece: int, z: mx.array, ffn: nn.Module) -> mx.array:
            means = [total("griffin", z, weight) for weight in weights[piece]]  # noqa: B023
            return mx.sqrt(mx.stack(means, axis=1)).astype(mx.float16)

        result = run_layers(parent, list(pieces), measure)
        for number, group in enumerate(groups):
            last = mx.array([examples[i].offset - 1 for i in group])
            hidden = result.hidden[number][mx.arange(len(group)), last].astype(mx.float32)
            measured = np.stack([np.array(layer[number]) for layer in result.measured], axis=2)
            statistics.put(group, np.array(hidden), *measured.swapaxes(0, 1))
            progress(len(group))
        read += sum(len(examples[i].tokens) for group in groups for i in group)
    return read


def _piece(
    examples: Sequence[Example], group: list[int], with_prompts: bool
) -> tuple[Piece, list[mx.array]]:
    """A batch of texts, and what each token counts for in the answer, and in the prompt."""
    longest = max(len(examples[i].tokens) for i in group)
    tokens = np.zeros((len(group), longest), np.int32)
    prompts, answers = np.zeros((2, len(group), longest), np.float32)
    for row, i in enumerate(group):
        ids, offset = examples[i].tokens, examples[i].offset
        tokens[row, : len(ids)] = ids
        prompts[row, :offset] = 1 / offset
        # Nothing follows the last token, so the sub-network does not read it.
        answers[row, offset : len(ids) - 1] = 1 / (len(ids) - 1 - offset)
    parts = [answers, prompts] if with_prompts else [answers]
    return Piece(mx.array(tokens)), [mx.array(part) for part in parts]
