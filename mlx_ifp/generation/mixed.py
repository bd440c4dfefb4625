"""Sub-networks that decode in one batch: they share the trunk, and each row has its own channels.

The trunk's weights are read once for all rows of a step. Where an FFN stands, rows are split by
their selection, each part goes through the FFN of its sub-network, and the parts are joined again.
Or all rows go through the channels of all sub-networks, where each row keeps the activations of its
own channels, and the others become zero: so a channel that several of them have is read once.
Which selection a row has travels with its keys and values, as one more entry of mlx-lm's prompt
cache: so mlx-lm's batches keep the two together while rows join and leave.
"""

import itertools
from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..llm.modules import get_module, set_module, share
from ..prompt_cache.files import PromptCache
from ..subnetwork.parent import Parent
from ..subnetwork.united import RowCost, United


class Rows:
    """Which selection answers each row of a batch, in the place of a layer's keys and values.

    It has what mlx-lm's batches ask of a cache.

    Args:
        digests (list): that of each row's selection.
    """

    state: tuple[()] = ()
    nbytes = 0

    def __init__(self, digests: list[str]) -> None:
        self.digests = digests

    @classmethod
    def merge(cls, rows: "list[Rows]") -> "Rows":
        """One batch of several."""
        return cls([digest for one in rows for digest in one.digests])

    def extend(self, other: "Rows") -> None:
        """Let rows join."""
        self.digests = [*self.digests, *other.digests]

    def filter(self, keep: list[int]) -> None:
        """Let all rows leave but some."""
        self.digests = [self.digests[i] for i in keep]

    def extract(self, i: int) -> "Rows":
        """A row by itself."""
        return Rows([self.digests[i]])

    def prepare(self, **kwargs: Any) -> None:
        """Rows have no positions."""

    def finalize(self) -> None:
        """Rows have no positions."""


class _SplitFFN(nn.Module):
    """Stands in for a layer's FFN: each row goes through that of its sub-network."""

    def __init__(self, mixed: "MixedNetwork", path: str) -> None:
        super().__init__()
        self._mixed, self._path = mixed, path

    def __call__(self, x: mx.array) -> mx.array:
        return self._mixed.run_ffn(self._path, x)


class _KeptDown(nn.Module):
    """A down projection that takes only the activations of each row's own channels."""

    def __init__(self, mixed: "MixedNetwork", path: str, down: nn.Module) -> None:
        super().__init__()
        self._mixed, self._path, self._down = mixed, path, down

    def __call__(self, x: mx.array) -> mx.array:
        # Some FFNs hand on their rows without the batch's dimensions.
        kept = self._mixed.kept[self._path].reshape(x.shape)
        # A product with zero would not be zero where an activation has overflowed.
        return self._down(mx.where(kept, x, mx.zeros((), x.dtype)))


class MixedNetwork:
    """Several sub-networks of one trunk as a model that mlx-lm's batches can call.

    Args:
        parent (Parent): the LLM that they are cut from.

    Attributes:
        layers: the trunk's, for mlx-lm.
        kept: by path, bool [B, 1, width] of the united channels; empty while they are not used.
    """

    def __init__(self, parent: Parent) -> None:
        self.kept: dict[str, mx.array] = {}
        self._united: tuple[United, RowCost, dict[str, nn.Module]] | None = None
        self._model = share(parent.trunk)
        self._paths = [ffn.path for ffn in parent.ffns]
        for path in self._paths:
            set_module(self._model, path, _SplitFFN(self, path))
        # The FFNs of each sub-network, by path.
        self._ffns: dict[str, dict[str, nn.Module]] = {}
        self._rows: list[str] = []
        self._parts: list[tuple[str, mx.array]] = []
        self._back = mx.array([], mx.int32)

    @property
    def layers(self) -> list[Any]:
        """The trunk's layers."""
        return self._model.layers

    def make_cache(self, max_kv_size: int | None, digest: str) -> PromptCache:
        """An empty prompt cache of a row."""
        return [*make_prompt_cache(self._model, max_kv_size), Rows([digest])]

    def add(self, digest: str, network: nn.Module) -> None:
        """Let rows of a sub-network join."""
        if digest not in self._ffns:
            self._ffns[digest] = {path: get_module(network, path) for path in self._paths}

    def keep_only(self, digests: set[str]) -> None:
        """Let go of the sub-networks that no row has any more."""
        self._ffns = {d: ffns for d, ffns in self._ffns.items() if d in digests}
        if len(digests) < 2:
            self.drop_united()

    def unite(self, united: United, cost: RowCost) -> None:
        """Let rows go through united channels where that is faster.

        Args:
            united (United): has the channels of all sub-networks whose rows are here now.
            cost (RowCost): of a row.
        """
        ffns = {}
        for path, module in united.ffns.items():
            ffns[path] = share(module)
            ffns[path].down_proj = _KeptDown(self, path, module.down_proj)
        self._united, self._rows = (united, cost, ffns), []

    def drop_united(self) -> bool:
        """Let go of united channels; whether there were some."""
        had = self._united is not None
        self._united, self._rows, self.kept = None, [], {}
        return had

    def __call__(self, inputs: mx.array, cache: PromptCache) -> mx.array:
        """Tokens [B, n] -> logits [B, n, V]; the cache's last entry is :class:`Rows`."""
        *layers, rows = cache
        if rows.digests != self._rows:
            self._split(rows.digests)
        return self._model(inputs, cache=layers)

    def _split(self, digests: list[str]) -> None:
        order = sorted(range(len(digests)), key=lambda i: digests[i])
        groups = itertools.groupby(order, key=lambda i: digests[i])
        self._parts = [(digest, mx.array(list(rows))) for digest, rows in groups]
        self._back = mx.argsort(mx.array(order))
        self._rows = list(digests)
        self.kept = {}
        if self._united is not None:
            united, cost, _ = self._united
            if united.pays(Counter(digests), cost):
                places = mx.array([united.places[digest] for digest in digests])
                self.kept = {path: keep[places][:, None] for path, keep in united.keeps.items()}

    def run_ffn(self, path: str, x: mx.array) -> mx.array:
        """A layer's FFN for all rows: [B, n, d] -> [B, n, d]."""
        if len(self._parts) == 1:
            return self._ffns[self._parts[0][0]][path](x)
        # A prompt has so many rows that computing counts, not reading.
        if self.kept and self._united is not None and x.shape[1] == 1:
            return self._united[2][path](x)
        parts = [self._ffns[digest][path](x[rows]) for digest, rows in self._parts]
        return mx.concatenate(parts)[self._back]


class _Shape(nn.Module):
    """Stands in for an FFN, and notes the shape of what goes into it."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self._shapes = shapes

    def __call__(self, x: mx.array) -> mx.array:
        self._shapes.append(x.shape)
        return x


def can_mix(parent: Parent) -> bool:
    """Whether the FFNs of an LLM see each row of a batch by itself, found out lazily."""
    shapes: list[tuple[int, ...]] = []
    model = share(parent.trunk)
    for ffn in parent.ffns:
        set_module(model, ffn.path, _Shape(shapes))
    try:
        model(mx.zeros((2, 3), mx.int32), cache=make_prompt_cache(model))
    except Exception:
        # Whatever this body needs, it is not known here.
        return False
    return len(shapes) == len(parent.ffns) and all(shape[:2] == (2, 3) for shape in shapes)
