"""Sub-networks in memory -> the rows of another selection. Only the missing rows are read.

Rows are copied to new arrays, in ascending order of channels. The result equals a fresh load bit
for bit, and no array that is in use elsewhere is changed.
"""

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.rows import parts_of, stored_as
from ..device import shares_memory
from ..llm.ffn import FFN
from ..selection.selection import Selection, digest_of
from .channels import ChannelReader, Part, row_bytes
from .parent import Parent
from .rows import (
    FFNReading,
    FFNRows,
    apply_soft_values,
    begin_ffn,
    begin_layer,
    cast_all,
    folded_parts,
    read_in_turn,
)

# At most this many sub-networks are compared, those used last. One of 30 layers takes 1.5 ms, and
# old tasks are seldom the nearest.
_COMPARED = 8


@dataclass(frozen=True)
class LayerRows:
    """One layer of a sub-network in memory.

    Attributes:
        channels: int [k], ascending.
        soft_values: float32 [k], or None if the mask is hard.
        rows: its arrays, with the soft values folded in.
    """

    channels: np.ndarray
    soft_values: np.ndarray | None
    rows: FFNRows


@dataclass(frozen=True)
class _Match:
    """What a wanted selection of one layer and a resident one share.

    Attributes:
        positions: int [k], where each wanted channel is among the resident rows; any place for a
            channel that is not there.
        shared: bool [k], whether it is there.
        stale: bool [k], whether it is there, but carries a soft value that cannot be undone.
        factor: float32 [k], what each row must still be multiplied by; None if no row is.
    """

    positions: np.ndarray
    shared: np.ndarray
    stale: np.ndarray
    factor: np.ndarray | None


def _match(channels: np.ndarray, soft_values: np.ndarray | None, resident: LayerRows) -> _Match:
    positions = np.searchsorted(resident.channels, channels)
    positions = np.minimum(positions, len(resident.channels) - 1)
    shared = resident.channels[positions] == channels
    ones = np.ones(len(channels), np.float32)
    mine = ones if soft_values is None else soft_values
    theirs = ones if resident.soft_values is None else resident.soft_values[positions]
    # A product with a rounded lambda cannot be divided back to the stored bits. But a resident row
    # whose lambda is one still has the stored bits, so the wanted lambda can be applied to it.
    done = shared & (mine == theirs)
    stale = shared & ~done & (theirs != 1)
    factor = None if soft_values is None else np.where(done, np.float32(1), mine)
    return _Match(positions, shared, stale, factor)


def begin_ffn_again(
    reader: ChannelReader,
    ffn: FFN,
    channels: np.ndarray,
    soft_values: np.ndarray | None,
    dtype: mx.Dtype | None,
    resident: LayerRows,
) -> FFNReading:
    """As :func:`~mlx_ifp.subnetwork.rows.begin_ffn`, bit for bit, but resident rows are reused.

    Soft values are folded into a few parts of the rows (the up projection, or its scales and
    biases). If a resident row has another soft value than the wanted one in it, these parts of the
    row are read again; its other parts are reused.

    Args:
        reader, ffn, channels, soft_values, dtype: as there; ``dtype`` must be that of the resident
            rows.
        resident (LayerRows): rows of the same FFN.
    """
    match = _match(channels, soft_values, resident)
    if not match.shared.any():
        return begin_ffn(reader, ffn, channels, soft_values, dtype)
    folded = folded_parts(ffn, resident.rows.arrays)
    plans, groups = {}, {}
    for key, names in parts_of(ffn, reader).items():
        slots = []
        for name in names:
            # Only the lower half of a fused projection, up_proj, has soft values in it.
            again = match.stale if key in folded and name == names[-1] else False
            slots.append(np.flatnonzero(~match.shared | again))
        height, width = len(resident.channels), len(channels)
        plans[key] = (
            np.concatenate([match.positions + i * height for i in range(len(names))]),
            np.concatenate([part + i * width for i, part in enumerate(slots)]),
        )
        wanted: list[Part] = [(name, channels[s]) for name, s in zip(names, slots, strict=True)]
        if len(plans[key][1]):
            groups[key] = wanted

    def finish(read: list[mx.array]) -> FFNRows:
        fresh = cast_all(groups, read, dtype)
        arrays = _merged(resident.rows.arrays, plans, fresh, reader.pool)
        bytes_read = sum(array.nbytes for array in read)
        rows = FFNRows(ffn, arrays, bytes_read, channels_reused=int(match.shared.sum()))
        if soft_values is not None:
            factor = None if match.factor is None else mx.array(match.factor)
            apply_soft_values(rows, mx.array(soft_values), factor)
        return rows

    return FFNReading(reader.begin(list(groups.values())), finish)


def _merged(
    resident: dict[tuple[str, str], mx.array],
    plans: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]],
    fresh: dict[tuple[str, str], mx.array],
    pool: ThreadPoolExecutor,
) -> dict[tuple[str, str], mx.array]:
    """New arrays: rows ``positions`` of the resident ones, with fresh rows put to ``slots``."""
    merged, new = {}, []
    shared = shares_memory()
    for key, (positions, slots) in plans.items():
        source = resident[key]
        if not len(slots) and len(positions) == len(source):
            # These are the very same rows. Arrays are never changed, so one can be in two networks.
            merged[key] = source
        elif shared:
            merged[key] = mx.zeros((len(positions), *source.shape[1:]), source.dtype)
            new.append(key)
        else:
            merged[key] = mx.take(source, mx.array(positions.astype(np.int32)), axis=0)
            if len(slots):
                merged[key][mx.array(slots.astype(np.int32))] = fresh[key]
    if not shared:
        mx.eval(list(merged.values()))
        return merged

    def fill(key: tuple[str, str], source: np.ndarray, target: np.ndarray) -> None:
        positions, slots = plans[key]
        # mode="clip" lets numpy write to `out` directly; positions are in range.
        np.take(source, positions, axis=0, out=target, mode="clip")
        if len(slots):
            target[slots] = rows[key]

    rows = dict(zip(fresh, row_bytes(list(fresh.values())), strict=True))
    sources, targets = (row_bytes([which[key] for key in new]) for which in (resident, merged))
    list(pool.map(fill, new, sources, targets))
    return merged


def _folded_bytes(rows: FFNRows) -> int:
    """Bytes that soft values are folded into; the gate_proj half of a fused projection is not."""
    return sum(
        rows.arrays[key].nbytes // len(stored_as(key[0]))
        for key in folded_parts(rows.ffn, rows.arrays)
    )


class Residents:
    """The rows of the sub-networks in memory, each for as long as the network lives.

    The cache and those who use a network hold it; this class holds it only weakly. Rows are noted
    apart from the network, because its user may change it.

    Args:
        parent (Parent): the LLM that all of them are cut from.
    """

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        # There is no lock, because a dying network may call `forget` from any thread, even from one
        # that holds the lock. Each operation on the dictionary is one step of the interpreter.
        self._layers: dict[str, tuple[weakref.ref, list[LayerRows]]] = {}

    def add(self, network: nn.Module, selection: Selection | None, rows: list[FFNRows]) -> None:
        """Offer a sub-network's rows to those that come after it.

        Args:
            network (nn.Module): the one that decides, by its life, how long they are offered.
            selection (Selection): its channels; None for the dense model.
            rows (list): L of them, from :meth:`read_all`.
        """
        name = digest_of(selection)

        def forget(reference: weakref.ref) -> None:
            # A newer network of the same selection may have taken its place.
            entry = self._layers.get(name)
            if entry is not None and entry[0] is reference:
                self._layers.pop(name, None)

        layers = [
            LayerRows(*self._wanted(selection, i), layer_rows) for i, layer_rows in enumerate(rows)
        ]
        self._layers[name] = (weakref.ref(network, forget), layers)

    def _wanted(
        self, selection: Selection | None, layer: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        if selection is None:
            return np.arange(self._parent.ffns[layer].d_ffn, dtype=np.int32), None
        soft_values = selection.soft_values
        return selection.layers[layer], None if soft_values is None else soft_values[layer]

    def nearest(self, selection: Selection | None, names: list[str]) -> list[LayerRows] | None:
        """The one of the sub-networks used last that leaves the fewest bytes to read.

        Args:
            selection (Selection): what is wanted; None for the dense model.
            names (list): the sub-networks that may be used, the one used last at the end. A name is
                the digest of a selection, or ``dense``.

        Returns:
            list: its L layers; None if nothing could be reused.
        """
        best, most = None, 0
        for name in names[-_COMPARED:]:
            # A name's network may be gone by now, or not be there yet.
            _, layers = self._layers.get(name, (None, []))
            saved = 0
            for i, layer in enumerate(layers):
                match = _match(*self._wanted(selection, i), layer)
                shared, stale = int(match.shared.sum()), int(match.stale.sum())
                saved += (layer.rows.nbytes * shared - _folded_bytes(layer.rows) * stale) // len(
                    layer.channels
                )
            if saved > most:
                best, most = layers, saved
        return best

    def read_all(self, selection: Selection | None, names: list[str]) -> Iterator[FFNRows]:
        """The rows of all L layers of a selection; None takes all channels. ``names`` as above."""
        source = self.nearest(selection, names)
        layers = range(len(self._parent.ffns))
        return read_in_turn(self.begin(selection, i, source) for i in layers)

    def begin(
        self, selection: Selection | None, layer: int, source: list[LayerRows] | None
    ) -> FFNReading:
        """Begin to read one layer's rows of a selection.

        Args:
            selection (Selection): None for all channels.
            layer (int): the number of the layer.
            source (list): from :meth:`nearest`.

        Returns:
            FFNReading: as :func:`~mlx_ifp.subnetwork.rows.begin_ffn` gives them.
        """
        parent = self._parent
        if source is None:
            return begin_layer(parent.reader, parent.ffns, selection, layer, parent.dtype)
        return begin_ffn_again(
            parent.reader,
            parent.ffns[layer],
            *self._wanted(selection, layer),
            parent.dtype,
            source[layer],
        )
