"""What users can do if a budget does not fit."""

from dataclasses import replace

from ..errors import IFPError
from ..selection.keep import WIDTH_MULTIPLE
from .budget import Budget, Estimator, Use, k_text, size_text

# A measure's text and the use that it leads to. The functions below give None if a measure
# cannot be taken or, with `alone`, does not suffice.
Measure = tuple[str, Use]


def check(estimator: Estimator, use: Use, limit: int) -> Budget:
    """The parts of a use, after a check that they fit.

    Args:
        estimator (Estimator): of the checkpoint.
        use (Use): what the checkpoint is to be used for.
        limit (int): bytes.

    Raises:
        IFPError: if they do not fit: one line with the numbers, and what would fit.
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
    """Measures that would make a use fit, each by itself. The least harmful one comes first.

    Fewer sub-networks cost time, and 8-bit keys and values hardly change the answers. A smaller k
    and another selector do change them. If no measure suffices alone, the first three are joined.
    """
    measures = (_fewer_networks, _quantized_kv, _smaller_k, _unselected, _pruned_prefill)
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


def _fewer_networks(
    estimator: Estimator, use: Use, limit: int, alone: bool = True
) -> Measure | None:
    for networks in range(use.networks - 1, 0, -1):
        other = replace(use, networks=networks)
        if _fits(estimator, other, limit) or (networks == 1 and not alone):
            return f"--cached-tasks {networks}", other
    return None


def _quantized_kv(estimator: Estimator, use: Use, limit: int, alone: bool = True) -> Measure | None:
    if use.generation.kv.kv_bits is not None:
        return None
    kv = replace(use.generation.kv, kv_bits=8, quantized_kv_start=0)
    other = replace(use, generation=replace(use.generation, kv=kv))
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
        by_dense = use.dense and estimator.checkpoint.ifp.prefill_with(selector) == "dense"
        use = replace(
            use,
            selector=selector,
            selector_tokens=tokens,
            dense=False,
            dense_prefill=use.dense_prefill or by_dense,
        )
    first = (max(use.ks) - 1) // WIDTH_MULTIPLE * WIDTH_MULTIPLE
    for smaller in range(first, 0, -WIDTH_MULTIPLE):
        other = replace(use, ks=[smaller] * len(use.ks))
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


def _pruned_prefill(estimator: Estimator, use: Use, limit: int) -> Measure | None:
    """The sub-network reads the prompt by itself."""
    other = replace(use, dense_prefill=False)
    fits = use.dense_prefill and _fits(estimator, other, limit)
    return ("--prefill pruned", other) if fits else None


def _sum_text(budget: Budget, use: Use, limit: int) -> str:
    """The parts whose sum is too much."""
    parts = [f"trunk {size_text(budget.trunk)}"]
    if budget.generating > limit:
        what = "network" if use.dense else "sub-network"
        what = what if budget.networks == 1 else f"{budget.networks} {what}s"
        size = size_text(budget.networks * budget.network)
        parts.append(f"{what} {size} ({k_text(use.ks)})")
        parts.append(f"keys and values {size_text(budget.kv)} ({use.generation.tokens} positions)")
        return f"{size_text(budget.generating)} are needed: {', '.join(parts)}"
    if not budget.selector or budget.selecting <= limit:
        parts.append(f"a layer's FFN {size_text(budget.prefill_weights)}")
        parts.append(f"keys and values of the prompt {size_text(budget.prefill_kv)}")
        return f"{size_text(budget.prefilling)} are needed to read the prompt: {', '.join(parts)}"
    if budget.networks > 1:
        size = size_text((budget.networks - 1) * budget.network)
        parts.append(f"{budget.networks - 1} sub-networks {size}")
    what = "predictor" if budget.selector == "predictor" else f"selector {budget.selector!r}"
    parts.append(f"{what} {size_text(budget.selector_weights)}")
    parts.append(f"its keys and values {size_text(budget.selector_kv)}")
    return f"{size_text(budget.selecting)} are needed to select: {', '.join(parts)}"
