"""A budget is printed as a table."""

from .budget import Budget, Estimator, Use, k_text


def table(estimator: Estimator, use: Use, limit: int | None = None) -> str:
    """The table that ``--estimate-only`` prints: each part of a use, what it is, its bytes."""
    checkpoint, generation = estimator.checkpoint, use.generation
    budget = estimator.budget(use)
    dtype = str(estimator.dtype or "as stored").removeprefix("mlx.core.")
    rows: list[tuple[str, str, int | str]] = [
        ("part", "what it is", "bytes"),
        ("trunk", f"embeddings, attention, norms, output layer; {dtype}", budget.trunk),
    ]
    if use.selector == "predictor":
        shared = checkpoint.ifp.predictor_embedding == "llm"
        what = "backbone and head" + ", embedding in the trunk" * shared
        if checkpoint.reads_own_state:
            what = "head, and one layer's FFN at a time"
        rows.append(("predictor", what, budget.selector_weights))
    elif use.selector is not None:
        what = {
            "activations": "one layer's FFN at a time",
            "static": "scores",
            "glass": "one layer's FFN at a time, and scores",
        }[use.selector]
        rows.append((use.selector, what, budget.selector_weights))
    if budget.selector_kv:
        what = f"its keys and values, {use.selector_tokens} positions"
        rows.append(("", what, budget.selector_kv))
    if use.dense_prefill:
        rows.append(("dense prefill", "one layer's FFN at a time", budget.prefill_weights))
    name = "network" if use.dense else "sub-network"
    name = name if use.networks == 1 else f"{use.networks} {name}s"
    what = f"{k_text(use.ks)} of {checkpoint.d_ffn} channels in {len(checkpoint.ffns)} layers"
    rows.append((name, what, use.networks * budget.network))
    how = f", {generation.kv.kv_bits} bits" if generation.kv.kv_bits is not None else ""
    rows.append(("KV cache", f"{generation.tokens} positions{how}", budget.kv))
    rows.append(("", "", ""))
    others = f", {use.networks - 1} sub-networks" if use.networks > 1 else ""
    if use.selector is not None:
        rows.append(("selecting", f"trunk and selector{others}", budget.selecting))
    if use.dense_prefill:
        what = f"trunk, a layer's FFN, keys and values of the prompt{others}"
        rows.append(("prefilling", what, budget.prefilling))
    rows.append(("generating", f"trunk, {name} and KV cache", budget.generating))
    if use.selector == "predictor":
        stays = budget.generating + budget.staying
        rows.append(("", "the same, the predictor still in memory", stays))
    if limit is not None:
        rows.append(("limit", _limit_text(budget, limit), limit))
    width = max(len(what) for _, what, _ in rows) + 2
    lines = []
    for name, what, size in rows:
        size = f"{size:,}" if isinstance(size, int) else size
        lines.append(f"{name:<14} {what:<{width}} {size:>15}".rstrip())
    return "\n".join(lines)


def _limit_text(budget: Budget, limit: int) -> str:
    if budget.least > limit:
        return "too low"
    networks = budget.fitting_networks(limit)
    text = f"room for {networks} network{'s' * (networks > 1)}"
    if budget.selector == "predictor":
        text += f"; the predictor {'stays' if budget.keeps_predictor(limit) else 'is dropped'}"
    return text
