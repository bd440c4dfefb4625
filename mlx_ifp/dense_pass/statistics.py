"""What the dense LLM's channels do on texts: the statistics that score channels without training.

All selectors that need no training take their statistic from here. Each is an entry of
:data:`STATISTICS`: it says what a token adds to a channel's total, and what becomes of the total.

z is what goes into a layer's down projection, [n, d_ffn] for n tokens; w is the column of the down
projection that belongs to a channel.

- ``griffin``: ``|| z / |z| ||`` over the tokens, where each token's activations are divided by
  their norm (Dong, Chen, Chi, "Prompt-prompted Adaptive Structured Pruning for Efficient LLM
  Generation", 2024, arXiv 2404.01365).
- ``norm``: the same times ``|w|``, which is how much the channel can move the layer's output.
- ``probe``: ``|| { |w_i|^2 ||z||^2 } ||`` over the outputs i, with the norm of z over the tokens
  (Le et al., "Probe Pruning: Accelerating LLMs through Dynamic Pruning via Model-Probing", ICLR
  2025, arXiv 2502.15618).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.rows import parts_of
from ..llm.build import quantization_of
from ..llm.ffn import FFN
from ..subnetwork.channels import ChannelReader
from ..subnetwork.parent import Parent
from .layers import Measure, Piece, run_layers

# Texts of similar length run together, with at most so many tokens, padding included.
BATCH_TOKENS = 2048
# So many tokens pass the layers before the next texts do. Their hidden states are in memory.
PASS_TOKENS = 32768


@dataclass(frozen=True)
class Statistic:
    """A statistic of channels over the tokens of a text.

    Attributes:
        of_tokens: z float32 [B, n, d_ffn] -> what each token adds to its channels' totals.
        of_columns: the down projection's weight float32 [d_ffn, d], channels as rows -> float32
            [d_ffn], what the totals are multiplied by; None for 1.
        of_totals: totals -> the statistic.
    """

    of_tokens: Callable[[mx.array], mx.array]
    of_columns: Callable[[mx.array], mx.array] | None
    of_totals: Callable[[mx.array], mx.array]


def _shares(z: mx.array) -> mx.array:
    """Squares of activations over their token's squared norm; a token without any has none."""
    squares = z.square()
    return squares / mx.maximum(squares.sum(axis=-1, keepdims=True), 1e-30)


STATISTICS = {
    "griffin": Statistic(_shares, None, mx.sqrt),
    "norm": Statistic(_shares, lambda w: w.square().sum(axis=-1), mx.sqrt),
    "probe": Statistic(
        mx.square, lambda w: mx.sqrt(w.square().square().sum(axis=-1)), lambda totals: totals
    ),
}


def total(statistic: str, z: mx.array, weights: mx.array | None = None) -> mx.array:
    """What tokens add to the totals of their channels, without what the columns add.

    Args:
        statistic (str): a name of :data:`STATISTICS`.
        z (mx.array): [B, n, d_ffn].
        weights (mx.array): [B, n], what each token counts for; None counts each token once.

    Returns:
        mx.array: float32 [B, d_ffn].
    """
    values = STATISTICS[statistic].of_tokens(z.astype(mx.float32))
    if weights is not None:
        values = values * weights[..., None]
    return values.sum(axis=1)


def measure_totals(statistic: str, weights: Sequence[mx.array] | None = None) -> Measure:
    """A function for :func:`~mlx_ifp.dense_pass.layers.run_layers` that measures totals.

    The totals of several pieces of one text add up. ``STATISTICS[statistic].of_totals`` makes the
    statistic of them.

    Args:
        statistic (str): a name of :data:`STATISTICS`.
        weights (sequence): for each piece [B, n], what its tokens count for; None counts all once.

    Returns:
        Measure: gives float32 [B, d_ffn].
    """
    of_columns = STATISTICS[statistic].of_columns

    def measure(piece: int, z: mx.array, ffn: nn.Module) -> mx.array:
        totals = total(statistic, z, None if weights is None else weights[piece])
        return totals if of_columns is None else totals * of_columns(columns(ffn))

    return measure


def columns(ffn: nn.Module) -> mx.array:
    """The columns of an FFN's down projection, channels as rows: float32 [d_ffn, d]."""
    down = ffn.down_proj
    if "scales" not in down:
        return down.weight.T.astype(mx.float32)
    # A quantized down projection of a checkpoint already has channels as rows.
    weight = mx.dequantize(
        down.weight,
        down.scales,
        down.get("biases"),
        group_size=down.group_size,
        bits=down.bits,
        mode=down.mode,
    )
    return weight.astype(mx.float32)


@dataclass(frozen=True)
class TextStatistics:
    """Statistics of some texts.

    Attributes:
        values: float32 [N, L, d_ffn], in the order of the texts.
        ffns_read: how often an FFN was read.
        states: final hidden states, float32 [N, hidden size]; None if they were not asked for.
    """

    values: np.ndarray
    ffns_read: int
    states: np.ndarray | None = None


def text_statistics(
    parent: Parent,
    texts: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]] | None = None,
    statistic: str = "griffin",
    *,
    states_at: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    pass_tokens: int = PASS_TOKENS,
    progress: Callable[[int], object] = lambda _: None,
) -> TextStatistics:
    """The statistic of each text's channels, many texts at once.

    The dense LLM runs with one FFN in memory at a time. Texts of similar length are padded on the
    right to one batch, and all batches pass a layer before the next layer is read. So the FFNs are
    read once for every ``pass_tokens`` tokens.

    Args:
        parent (Parent): the dense LLM, whose channels are read.
        texts (sequence): N texts, each of one token or more.
        spans (sequence): for each text its first token that counts, and the one after the last;
            None counts all. What stands before is read all the same.
        statistic (str): a name of :data:`STATISTICS`.
        states_at (sequence): for each text the token whose final hidden state is kept.
        batch_tokens (int): the most tokens of a batch with padding, unless one text has more.
        pass_tokens (int): the most tokens, with padding, between two readings of the FFNs.
        progress (Callable): called with the number of texts of each pass that is finished.

    Raises:
        IFPError: if channels cannot be read.
    """
    lengths = [len(text) for text in texts]
    spans = [(0, n) for n in lengths] if spans is None else spans
    made = np.zeros((len(texts), len(parent.ffns), parent.ffns[0].d_ffn), np.float32)
    states = (
        None
        if states_at is None
        else np.zeros((len(texts), parent.ffns[0].hidden_size), np.float32)
    )
    reads = 0
    for batches in passes(lengths, batch_tokens, pass_tokens):
        pieces, weights = [], []
        for batch in batches:
            tokens = np.zeros((len(batch), max(lengths[i] for i in batch)), np.int32)
            counts = np.zeros(tokens.shape, np.float32)
            for row, i in enumerate(batch):
                tokens[row, : lengths[i]] = texts[i]
                counts[row, slice(*spans[i])] = 1
            pieces.append(Piece(mx.array(tokens)))
            weights.append(mx.array(counts))
        result = run_layers(parent, pieces, measure_totals(statistic, weights))
        reads += result.ffns_read
        order = [i for batch in batches for i in batch]
        for layer, totals in enumerate(result.measured):
            # A body that loops over its layers calls each of them several times for a piece.
            times = len(totals) // len(pieces)
            sums = [mx.stack(totals[i : i + times]).sum(axis=0)
                    for i in range(0, len(totals), times)]  # fmt: skip
            values = STATISTICS[statistic].of_totals(mx.concatenate(sums))
            made[order, layer] = np.array(values)
        if states is not None and states_at is not None:
            for batch, hidden in zip(batches, result.hidden, strict=True):
                at = mx.array([states_at[i] for i in batch])
                states[batch] = np.array(hidden[mx.arange(len(batch)), at].astype(mx.float32))
        progress(len(order))
    return TextStatistics(made, reads, states)


def passes(
    lengths: list[int], batch_tokens: int = BATCH_TOKENS, pass_tokens: int = PASS_TOKENS
) -> Iterator[list[list[int]]]:
    """Group texts by their numbers: passes through the layers, each of batches of similar length.

    Args:
        lengths (list): tokens of each text.
        batch_tokens, pass_tokens (int): as for :func:`text_statistics`.
    """
    return _passes(list(_batches(lengths, batch_tokens)), lengths, pass_tokens)


def _batches(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Texts of similar length; a batch has at most so many tokens, or one text."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        # The text is the longest so far, so all others are padded to its length.
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _passes(batches: list[list[int]], lengths: list[int], tokens: int) -> Iterator[list[list[int]]]:
    """Batches that pass the layers together; they have at most so many tokens, or are one batch."""
    sizes = [len(batch) * lengths[batch[-1]] for batch in batches]
    numbers, number, size = [], 0, 0
    for own in sizes:
        if size and size + own > tokens:
            number, size = number + 1, 0
        size += own
        numbers.append(number)
    pairs = zip(numbers, batches, strict=True)
    for _, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield [batch for _, batch in group]


def down_norms(reader: ChannelReader, ffns: list[FFN], config: dict[str, Any]) -> mx.array:
    """The norm of each channel's column of the down projection: float32 [L, d_ffn].

    One layer's down projection is in memory at a time.

    Args:
        reader (ChannelReader): of the checkpoint.
        ffns (list): its L FFNs.
        config (dict): that of the LLM, which says how weights are quantized.

    Raises:
        IFPError: if channels cannot be read.
    """
    norms = []
    for ffn in ffns:
        stored = {
            part: reader.read([[(name, None) for name in names]])[0]
            for (projection, part), names in parts_of(ffn, reader).items()
            if projection == "down_proj"
        }
        weight = stored["weight"]
        if "scales" in stored:
            how = quantization_of(config, ffn.module_path("down_proj"))
            weight = mx.dequantize(weight, stored["scales"], stored.get("biases"), **how)
        norms.append(mx.linalg.norm(weight.astype(mx.float32), axis=-1))
        mx.eval(norms[-1])
    return mx.stack(norms)
