"""How good the masked model is, and whether its masks still depend on the prompt."""

import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from data import DeviceData
from model import MaskedLM
from torch import Tensor

# Masks that agree more than this between tasks do not depend on the prompt any more.
COLLAPSED = 0.99


@torch.no_grad()
def validate(
    model: MaskedLM,
    teacher: MaskedLM,
    data: DeviceData,
    batches: list[np.ndarray],
    k: int,
    *,
    block: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Losses a token of the answers, overlaps of masks and dead channels; names of mlx_ifp.train.

    Every example runs under its own mask, as at inference.

    Args:
        model, teacher (MaskedLM): what is trained, and the dense model.
        data (DeviceData): the validation set.
        batches (list): what of it is used.
        k (int): channels kept.
        block (int): positions whose logits are made at once.
        dtype (torch.dtype): of logits.

    Returns:
        dict: ``val_loss``, ``dense_loss``, ``val_kl``, ``mean_task_kl``, ``agreement`` (the share
        of tokens for which both models find the same one likeliest), ``overlap_within`` and
        ``overlap_between`` tasks and both by layer, ``dead_channels``, ``tasks`` and ``val_time``.
    """
    start = time.perf_counter()
    mode = "soft" if model.mode == "soft" else "hard"
    rows, masks, order = [], [], []
    for indices in batches:
        batch = data.batch(indices, "answer")
        own = model.masks(model.scores(batch.selecting, batch.selecting_mask), k, mode=mode)
        masks.append(own > 0)
        order += batch.indices
        dense_on = batch.prompt if model.prefill == "dense" else None
        hidden = model.hidden(batch.tokens, own, dense=dense_on).flatten(0, 1)
        theirs = teacher.hidden(batch.tokens).flatten(0, 1)
        sums = torch.zeros(len(indices), 4, device=data.device)
        for first in range(0, len(batch.places), block):
            part = slice(first, first + block)
            places = batch.places[part]
            logprobs = model.logits(hidden[places].to(dtype)).float().log_softmax(dim=-1)
            wanted = teacher.logits(theirs[places].to(dtype)).float().log_softmax(dim=-1)
            label = batch.labels[part, None]
            values = torch.stack(
                [
                    -logprobs.gather(-1, label)[:, 0],
                    -wanted.gather(-1, label)[:, 0],
                    (wanted.exp() * (wanted - logprobs)).sum(dim=-1),
                    (wanted.argmax(dim=-1) == logprobs.argmax(dim=-1)).float(),
                ],
                dim=1,
            )
            # Padding counts nothing.
            values = values * batch.answer[part, None]
            sums.index_add_(0, places // batch.tokens.shape[1], values)
        rows.append(sums)
    counts = (data.lengths - data.offsets)[order]
    names = [data.examples[i].task or "" for i in order]
    values = torch.cat(rows).double().cpu().numpy()
    everything = _means(values, counts)
    tasks = {
        name: _means(values[chosen], counts[chosen])
        for name in sorted(set(names))
        for chosen in [np.array([other == name for other in names])]
    }
    return {
        "val_loss": everything["loss"],
        "dense_loss": everything["dense_loss"],
        "val_kl": everything["kl"],
        "mean_task_kl": float(np.mean([task["kl"] for task in tasks.values()])),
        "agreement": everything["agreement"],
        **overlaps(torch.cat(masks), names),
        "tasks": tasks,
        "k": k,
        "val_time": time.perf_counter() - start,
    }


def _means(values: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    tokens = int(counts.sum())
    loss, dense, kl, agreement = (values.sum(axis=0) / max(tokens, 1)).tolist()
    return {"loss": loss, "dense_loss": dense, "kl": kl, "agreement": agreement,
            "examples": len(counts), "tokens": tokens}  # fmt: skip


def overlaps(masks: Tensor, tasks: list[str]) -> dict[str, Any]:
    """Shared channels / k, the mean over pairs of prompts (paper, section 4.4, appendix A.3).

    Args:
        masks (Tensor): bool [n, L, F], with the same number of ones in each row.
        tasks (list): n names.

    Returns:
        dict: ``overlap_within``, ``overlap_between`` and both ``_by_layer``, None without a pair;
        ``dead_channels``: the share that no prompt selects.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, task in enumerate(tasks):
        groups[task].append(i)
    n, k = len(tasks), int(masks[0, 0].sum())
    same = torch.zeros(n, n, dtype=torch.bool, device=masks.device)
    for members in groups.values():
        rows = torch.tensor(members, device=masks.device)
        same[rows[:, None], rows] = True
    itself = torch.eye(n, dtype=torch.bool, device=masks.device)
    pairs = {"within": same & ~itself, "between": ~same}
    means: dict[str, list[float]] = {"within": [], "between": []}
    for layer in range(masks.shape[1]):
        # One layer at a time: [n, n, L] of a large model would take gigabytes.
        rows = masks[:, layer].float()
        shared = rows @ rows.T / k
        for kind, chosen in pairs.items():
            if n > 1 and bool(chosen.any()):
                means[kind].append(float(shared[chosen].mean()))
    report: dict[str, Any] = {}
    for kind, by_layer in means.items():
        report[f"overlap_{kind}"] = float(np.mean(by_layer)) if by_layer else None
        report[f"overlap_{kind}_by_layer"] = by_layer or None
    report["dead_channels"] = 1 - float(masks.any(dim=0).float().mean())
    return report


def collapse_warning(report: dict[str, Any], share: float) -> str | None:
    """What to say if the masks stopped depending on the prompt; ``share`` is k / F."""
    between = report["overlap_between"]
    between = report["overlap_within"] if between is None else between
    if between is None or share == 1 or between < COLLAPSED:
        return None
    return (
        f"the masks hardly depend on the prompt: prompts share {between:.1%} of their channels; "
        "use --warm-start-iters or lower --predictor-learning-rate"
    )
