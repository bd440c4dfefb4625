"""Fit the predictor to what the dense LLM's channels did, before joint training.

With little data, joint training from a random head tends to give every prompt the same channels.
Here scores depend on the instruction from the first step, as in mlx_ifp/tuner/warm_start.py.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from data import DeviceData, by_length
from model import MaskedLM
from torch import Tensor, nn


@torch.no_grad()
def activation_statistics(
    teacher: MaskedLM, data: DeviceData, batches: list[np.ndarray], prefill: str = "pruned"
) -> dict[int, Tensor]:
    """GRIFFIN's statistic of each channel, on the tokens that the mask holds for, by example.

    ``sqrt(sum of w * z^2 / |z|^2)`` over these tokens. If the pruned model reads the prompt, the
    weights w of the answer's tokens add up to 1, and so do those of the prompt's; if the dense
    model does, those of the answer's tokens alone count.

    Returns:
        dict: example -> float16 [L, F], on the device.
    """
    found: dict[int, Tensor] = {}
    downs = teacher.downs
    for indices in batches:
        weights = _weights(data, indices, prefill)
        totals: list[Tensor] = []

        def record(_: nn.Module, args: tuple[Tensor, ...], weights=weights, totals=totals) -> None:
            squares = args[0].float().square()
            shares = squares / squares.sum(dim=-1, keepdim=True).clamp(min=1e-30)
            totals.append((shares * weights[..., None]).sum(dim=1))

        hooks = [down.register_forward_pre_hook(record) for down in downs]
        try:
            teacher.hidden(data.batch(indices).tokens)
        finally:
            for hook in hooks:
                hook.remove()
        statistics = torch.stack(totals, dim=1).sqrt().half()
        found |= dict(zip(indices.tolist(), statistics, strict=True))
    return found


def _weights(data: DeviceData, indices: np.ndarray, prefill: str) -> Tensor:
    """Weights of positions, float32 [B, S]: 1 spread over the prompt's, 1 over the answer's.

    Position t predicts token t + 1, and belongs where that belongs. If the dense model reads the
    prompt, the answer's are the positions that hold a token of it, and the prompt's count nothing.
    """
    width = -(-int(data.lengths[indices].max()) // 64) * 64
    lengths, offsets = data.lengths[indices][:, None], data.offsets[indices][:, None]
    token = np.arange(1, width + 1)[None]
    inside = token < lengths
    if prefill == "dense":
        parts = [((token > offsets) & inside).astype(np.float32)]
    else:
        answer = inside & (token >= offsets)
        parts = [part.astype(np.float32) for part in (answer, inside & ~answer)]
    weights = sum(part / np.maximum(part.sum(axis=1, keepdims=True), 1) for part in parts)
    return torch.from_numpy(weights).to(data.device)


def standardized(statistics: Tensor) -> Tensor:
    """Logarithms of statistics [..., L, F] with mean 0 and variance 1 in each layer."""
    logs = statistics.float().clamp(min=1e-4).log()
    logs = logs - logs.mean(dim=-1, keepdim=True)
    return logs / logs.std(dim=-1, keepdim=True, unbiased=False).clamp(min=1e-6)


def _own_states(model: MaskedLM, data: DeviceData, batches: list[np.ndarray]) -> dict[int, Tensor]:
    """What the head reads of each example: example -> [d]."""
    found: dict[int, Tensor] = {}
    for indices in batches:
        found |= dict(zip(indices.tolist(), model.own_state(*data.selecting(indices)), strict=True))
    return found


def fit_predictor(
    model: MaskedLM,
    teacher: MaskedLM,
    data: DeviceData,
    *,
    iters: int,
    examples: int,
    batch_size: int,
    batch_tokens: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
    report: Callable[[dict[str, Any]], Any] = lambda _: None,
) -> None:
    """Regress the scores on the standardized statistics; the LLM and its embedding stay.

    Scores start as the mean of all examples, the best mask that is the same for all; a static mask
    is left at that.

    Args:
        model (MaskedLM): its predictor is changed.
        teacher (MaskedLM): the dense model.
        data (DeviceData): of the training set.
        iters, batch_size (int): steps of Adam, and examples of each.
        examples (int): how many are used, spread evenly over the set.
        batch_tokens (int): of a batch of the dense model.
        learning_rate (float): of the head; the backbone learns at a tenth of it.
    """
    batches = by_length(data, batch_tokens, examples)
    statistics = activation_statistics(teacher, data, batches, model.prefill)
    used = np.array(sorted(statistics))
    mean = sum(standardized(statistics[i]) for i in used.tolist()) / len(used)
    predictor = model.predictor
    predictor.start_from_mean(mean)
    if not hasattr(predictor, "extractor"):
        return
    shared = {id(parameter) for parameter in model.llm.parameters()}
    backbone = []
    if model.reads_own_state:
        # The LLM does not change here: each text is read once.
        states = _own_states(model, data, batches)
    else:
        backbone = [p for p in predictor.extractor.parameters() if id(p) not in shared]
    groups = [
        {"params": list(predictor.mlp.parameters()), "lr": learning_rate},
        {"params": backbone, "lr": learning_rate / 10},
    ]
    optimizer = torch.optim.Adam(groups)
    random = np.random.default_rng([seed, 1])
    for step in range(1, iters + 1):
        indices = random.choice(used, min(batch_size, len(used)), replace=False)
        wanted = standardized(torch.stack([statistics[i].float() for i in indices.tolist()]))
        if model.reads_own_state:
            scores = predictor.head(torch.stack([states[i] for i in indices.tolist()]))
        else:
            scores = model.scores(*data.selecting(indices))
        loss = (scores - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # The embedding is the LLM's, which does not learn here.
        model.zero_grad()
        if step % 50 == 0 or step == iters:
            around_mean = (wanted - mean).square().mean().clamp(min=1e-9)
            explained = 1 - loss.item() / around_mean.item()
            report({"warm_start_iteration": step, "warm_start_loss": loss.item(),
                    "variance_explained": explained})  # fmt: skip
