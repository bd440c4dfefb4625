"""Several sub-networks in one: a channel that more than one of them keeps is there once."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..llm.ffn import FFN
from ..llm.modules import PARTS, evaluate, get_module, share
from ..selection.selection import Selection
from .build import ChannelMajorLinear, set_ffn
from .parent import Parent
from .rows import FFNRows

# Rows of a batch with which the cost of a row is measured.
_MEASURED_ROWS = 16


@dataclass(frozen=True)
class Member:
    """A sub-network that is united with others.

    Attributes:
        selection: its channels, without soft values; None is the dense model.
        network: the sub-network.
    """

    selection: Selection | None
    network: nn.Module

    def channels(self, layer: int, ffn: FFN) -> np.ndarray:
        """Its channels in a layer, int32 [k], ascending."""
        if self.selection is None:
            return np.arange(ffn.d_ffn, dtype=np.int32)
        return self.selection.layers[layer]


@dataclass(frozen=True)
class RowCost:
    """How long an FFN takes for a batch: for each channel a fixed time, and a time for each row.

    Where weights are read from memory, the fixed time counts, and one pass of many rows through the
    channels of all sub-networks is fast. Where each row is computed by itself, it is not.

    Attributes:
        fixed: of one channel.
        each: of one channel and one row.
    """

    fixed: float
    each: float

    @classmethod
    def measured(cls, parent: Parent, member: Member) -> "RowCost":
        """Time the FFNs of a sub-network with one row and with several."""
        modules = [get_module(member.network, ffn.path) for ffn in parent.ffns]
        channels = sum(len(member.channels(i, ffn)) for i, ffn in enumerate(parent.ffns))
        arrays = dict(tree_flatten(modules[0].parameters())).values()
        floats = [array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating)]
        dtype = floats[0] if floats else mx.float32

        def seconds(rows: int) -> float:
            x = mx.ones((rows, 1, parent.ffns[0].hidden_size), dtype)
            best = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                mx.eval([module(x) for module in modules])
                best = min(best, time.perf_counter() - start)
            return best / channels

        one, several = seconds(1), seconds(_MEASURED_ROWS)
        each = max(0.0, several - one) / (_MEASURED_ROWS - 1)
        return cls(max(0.0, one - each), each)

    def of(self, channels: float, rows: int) -> float:
        """What so many channels cost with so many rows."""
        return channels * (self.fixed + self.each * rows)


@dataclass(frozen=True, eq=False)
class United:
    """The channels of several sub-networks.

    Attributes:
        ffns: the FFN of each layer by its path, with the channels of all members.
        keeps: by path, bool [members, width]: which of the channels each member has.
        places: the number of each member, by its digest.
        channels: how many each member has over all layers, by its digest.
        width: channels over all layers.
        nbytes: bytes of the channels.
    """

    ffns: dict[str, nn.Module]
    keeps: dict[str, mx.array]
    places: dict[str, int]
    channels: dict[str, int]
    width: int
    nbytes: int

    def pays(self, rows: Mapping[str, int], cost: RowCost) -> bool:
        """Whether it is faster than each sub-network by itself.

        Args:
            rows (dict): the number of rows of a batch by their sub-networks' digests.
            cost (RowCost): of a row.
        """
        if len(rows) < 2 or any(digest not in self.places for digest in rows):
            return False
        return pays(self.width, {d: (self.channels[d], n) for d, n in rows.items()}, cost)


def pays(width: int, parts: Mapping[str, tuple[int, int]], cost: RowCost) -> bool:
    """Whether one pass through ``width`` channels is faster than one for each part.

    Args:
        width (int): channels of all parts, each counted once.
        parts (dict): channels and rows of each part, by any key.
        cost (RowCost): of a row.
    """
    apart = sum(cost.of(channels, rows) for channels, rows in parts.values())
    # A tenth must be gained.
    return cost.of(width, sum(rows for _, rows in parts.values())) < 0.9 * apart


def union_widths(parent: Parent, members: list[Member]) -> list[int]:
    """For each of L layers, how many channels at least one member keeps."""
    widths = []
    for layer, ffn in enumerate(parent.ffns):
        kept = np.zeros(ffn.d_ffn, bool)
        for member in members:
            kept[member.channels(layer, ffn)] = True
        widths.append(int(kept.sum()))
    return widths


def unite(parent: Parent, members: Mapping[str, Member]) -> United:
    """Copy the channels of several sub-networks into one, each channel once. Nothing is read.

    Args:
        parent (Parent): the LLM that they are cut from.
        members (dict): the sub-networks by their digests.
    """
    ffns, keeps, width, nbytes = {}, {}, 0, 0
    for layer, ffn in enumerate(parent.ffns):
        order: list[np.ndarray] = []
        taken: list[np.ndarray] = []
        there = np.zeros(ffn.d_ffn, bool)
        for member in members.values():
            channels = member.channels(layer, ffn)
            new = np.flatnonzero(~there[channels])
            there[channels] = True
            order.append(channels[new])
            taken.append(new)
        modules = [get_module(member.network, ffn.path) for member in members.values()]
        rows = FFNRows(ffn, _joined(ffn, modules, taken), 0)
        module = share(modules[0])
        set_ffn(module, rows, parent.config)
        evaluate(module)
        ffns[ffn.path] = module
        channels = np.concatenate(order)
        keep = np.zeros((len(members), ffn.d_ffn), bool)
        for number, member in enumerate(members.values()):
            keep[number, member.channels(layer, ffn)] = True
        keeps[ffn.path] = mx.array(keep[:, channels])
        mx.eval(keeps[ffn.path])
        width += len(channels)
        nbytes += rows.nbytes
    counts = {
        digest: sum(len(member.channels(i, ffn)) for i, ffn in enumerate(parent.ffns))
        for digest, member in members.items()
    }
    places = {digest: number for number, digest in enumerate(members)}
    return United(ffns, keeps, places, counts, width, nbytes)


def _joined(
    ffn: FFN, modules: list[nn.Module], taken: list[np.ndarray]
) -> dict[tuple[str, str], mx.array]:
    """Rows ``taken`` of each module, one below the other, by projection and part."""
    sources = [_arrays(ffn, module) for module in modules]
    joined = {}
    for key in sources[0]:
        pieces = []
        # The upper half of a fused projection is gate_proj, the lower one up_proj.
        for half in range(2 if key[0] == "gate_up_proj" else 1):
            for source, rows in zip(sources, taken, strict=True):
                array = source[key]
                height = len(array) // 2 if key[0] == "gate_up_proj" else len(array)
                if len(rows):
                    pieces.append(array[mx.array(rows.astype(np.int32) + half * height)])
        joined[key] = mx.concatenate(pieces)
    mx.eval(list(joined.values()))
    return joined


def _arrays(ffn: FFN, module: nn.Module) -> dict[tuple[str, str], mx.array]:
    """The rows of an FFN's channels, by projection and part."""
    arrays = {}
    first = ("gate_up_proj",) if ffn.fused else ("gate_proj", "up_proj")
    for projection in (*first, "down_proj"):
        linear, down = module[projection], projection == "down_proj"
        for part in PARTS:
            # A bias of the down projection belongs to no channel.
            if part in linear and not (down and part == "bias"):
                turned = down and not isinstance(linear, ChannelMajorLinear)
                arrays[projection, part] = linear[part].T if turned else linear[part]
    return arrays
