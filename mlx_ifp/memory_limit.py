"""Keeping to a memory limit: what does not fit, what would, and what has to go."""

from dataclasses import replace

from .budget import Budget, Estimator, Use, k_text, size_text
from .cache import SubnetworkCache
from .errors import IFPError
from .keep import WIDTH_MULTIPLE
from .kv_size import Generation
from .masks import Selection

Measure = tuple[str, Use]


def check(estimator: Estimator, use: Use, limit: int) -> Budget:
    """The parts of a use, if they fit.

    Args:
        estimator (Estimator): of the checkpoint.
        use (Use): what for.
        limit (int): bytes.

    Raises:
        IFPError: if they do not: one line with the numbers, and what would fit.
    """
    if limit < estimator.trunk:
        raise IFPError(
            f"The memory limit, {size_text(limit)}, is below the {size_text(estimator.trunk)} of "
            "the trunk (embeddings, attention, norms), which is always in memory. "
            "Convert the model to fewer bits (mlx_ifp.convert -q), or raise the limit."
        )
    budget = estimator.budget(use)
    if budget.least <= limit:
        return budget
    measures = advice(estimator, use, limit)
    fits = f"It would fit with {', or '.join(measures)}." if measures else "Raise the limit."
    raise IFPError(
        f"The memory limit is {size_text(limit)}, but {_sum_text(budget, use, limit)}. {fits}"
    )


def advice(estimator: Estimator, use: Use, limit: int) -> list[str]:
    """What would make a use fit, each by itself, the least harm first.

    Fewer sub-networks cost time; 8-bit keys and values hardly change the answers; a smaller k
    and another selector do. If no measure does it alone, the first three together.
    """
    measures = (_fewer_networks, _quantized_kv, _smaller_k, _unselected)
    alone = [found[0] for measure in measures if (found := measure(estimator, use, limit))]
    if alone:
        return alone
    texts = []
    for measure in measures[:3]:
        found = measure(estimator, use, limit, alone=False)
        if found:
            texts.append(found[0])
            use = found[1]
    return [" ".join(texts)] if _fits(estimator, use, limit) else []


def _fits(estimator: Estimator, use: Use, limit: int) -> bool:
    return estimator.budget(use).least <= limit


# Each measure gives its text and the use that it leads to, or None if it can't be taken or,
# taken alone, does not suffice.


def _fewer_networks(
    estimator: Estimator, use: Use, limit: int, alone: bool = True
) -> Measure | None:
    for networks in range(use.networks - 1, 0, -1):
        other = replace(use, networks=networks)
        if _fits(estimator, other, limit) or (networks == 1 and not alone):
            return f"--cached-tasks {networks}", other
    return None


def _quantized_kv(estimator: Estimator, use: Use, limit: int, alone: bool = True) -> Measure | None:
    if use.generation.kv_bits is not None:
        return None
    other = replace(use, generation=replace(use.generation, kv_bits=8, quantized_kv_start=0))
    try:
        saves = estimator.kv(other.generation) < estimator.kv(use.generation)
    except IFPError:
        return None
    if not saves or (alone and not _fits(estimator, other, limit)):
        return None
    return "--kv-bits 8 --quantized-kv-start 0", other


def _smaller_k(estimator: Estimator, use: Use, limit: int, alone: bool = True) -> Measure | None:
    """The largest multiple of 64 below k that fits."""
    text = "--keep {}"
    if use.selector is None:
        text = "--keep {} instead of --dense" if use.dense else "a selection of --keep {}"
        selector, tokens = estimator.checkpoint.ifp.selector, use.generation.prompt_tokens
        use = replace(use, selector=selector, selector_tokens=tokens, dense=False)
    k = max(use.k) if isinstance(use.k, list) else use.k
    first = (k - 1) // WIDTH_MULTIPLE * WIDTH_MULTIPLE
    for smaller in range(first, 0, -WIDTH_MULTIPLE):
        other = replace(use, k=smaller)
        if _fits(estimator, other, limit):
            return text.format(smaller), other
    return None


def _unselected(estimator: Estimator, use: Use, limit: int) -> Measure | None:
    """Another selector, or a selection that was saved elsewhere."""
    if use.selector is None:
        return None
    others = [name for name in estimator.checkpoint.selectors if name != use.selector]
    for selector in (*others, None):
        other = replace(use, selector=selector)
        if _fits(estimator, other, limit):
            text = f"--selector {selector}" if selector else "a saved --selection FILE"
            return text, other
    return None


def _sum_text(budget: Budget, use: Use, limit: int) -> str:
    """The parts that are too much together."""
    parts = [f"trunk {size_text(budget.trunk)}"]
    if budget.generating > limit:
        what = "network" if use.dense else "sub-network"
        what = what if budget.networks == 1 else f"{budget.networks} {what}s"
        size = size_text(budget.networks * budget.network)
        parts.append(f"{what} {size} ({k_text(use.k)})")
        parts.append(f"keys and values {size_text(budget.kv)} ({use.generation.tokens} positions)")
        return f"{size_text(budget.generating)} are needed: {', '.join(parts)}"
    if budget.networks > 1:
        size = size_text((budget.networks - 1) * budget.network)
        parts.append(f"{budget.networks - 1} sub-networks {size}")
    what = "predictor" if budget.selector == "predictor" else f"selector {budget.selector!r}"
    parts.append(f"{what} {size_text(budget.selector_weights)}")
    parts.append(f"its keys and values {size_text(budget.selector_kv)}")
    return f"{size_text(budget.selecting)} are needed to select: {', '.join(parts)}"


class MemoryLimit:
    """Keeps a model in use within its limit: makes room, and says whether the predictor may stay.

    One generation at a time is counted, and one network that it uses.

    Args:
        limit (int): bytes.
        estimator (Estimator): of the checkpoint.
        networks (SubnetworkCache): what gives way; its bound is lowered to what is left.
        use (Use): what is expected.

    Raises:
        IFPError: if that does not fit; nothing has been read then.
    """

    def __init__(
        self, limit: int, estimator: Estimator, networks: SubnetworkCache, use: Use
    ) -> None:
        self.limit = limit
        self.estimator = estimator
        self._networks = networks
        self._most = networks.max_bytes
        check(estimator, use, limit)
        self.expect(use.generation, use.k, dense=use.dense)

    def expect(self, generation: Generation, k: int | list[int], *, dense: bool = False) -> None:
        """Leave room for a generation with a network of k channels.

        Raises:
            IFPError: if there is none.
        """
        budget = check(self.estimator, Use(k, generation, dense=dense), self.limit)
        self._generation, self._kv, self._network = generation, budget.kv, budget.network
        self._networks.max_bytes = min(self._most, self._left())
        self._networks.shrink(self._networks.max_bytes)

    @property
    def keeps_predictor(self) -> bool:
        """Whether the predictor may stay beside the network and its keys and values."""
        needed = self.estimator.trunk + self._network + self._kv + self._predictor
        return needed <= self.limit

    @property
    def _predictor(self) -> int:
        return self.estimator.predictor if self.estimator.checkpoint.head else 0

    def _left(self) -> int:
        """Bytes that all networks may take while tokens are generated."""
        stays = self._predictor if self.keeps_predictor else 0
        return self.limit - self.estimator.trunk - self._kv - stays

    def before_selecting(self, selector: str, tokens: int) -> None:
        """Let networks go until a selector has room to run.

        Raises:
            IFPError: if it has none even then.
        """
        check(self.estimator, Use(1, Generation(1), selector, tokens), self.limit)
        needed = self.estimator.trunk + sum(self.estimator.selector(selector, tokens))
        if selector != "predictor" and self.keeps_predictor:
            needed += self._predictor
        self._networks.shrink(max(0, self.limit - needed))

    def before_loading(self, selection: Selection | None) -> None:
        """Let networks go until that of a selection, or the dense one for None, has room.

        Raises:
            IFPError: if it has none even then.
        """
        dense = selection is None
        k = selection.ks if selection is not None else None
        self.expect(self._generation, k or self.estimator.checkpoint.d_ffn, dense=dense)
        self._networks.shrink(max(0, self._left() - self._network))
