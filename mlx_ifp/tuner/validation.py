"""Measure how good the hard-masked student is, and whether its masks depend on the prompt."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..llm.modules import scalar
from ..llm.output import hidden_states, output_layer
from ..selection.overlap import overlap_summary
from ..selection.selection import Selection, select_channels
from .batches import make_batch
from .data import Example
from .dense_targets import DenseTargets
from .losses import cross_entropy, kl_to_teacher
from .student import Student

_BLOCK = 512
# Masks that agree more than this between tasks do not depend on the prompt any more.
COLLAPSED = 0.99


@dataclass(frozen=True)
class AnswerScore:
    """The scores of one example's answer under its own selection.

    Attributes:
        loss: summed cross-entropy of the answer's tokens.
        kl: summed KL(dense || student) of the answer's tokens.
        tokens: how many tokens the answer has.
        exact: whether greedy decoding gives this very answer.
    """

    loss: float
    kl: float
    tokens: int
    exact: bool


def score_answers(
    student: Student,
    examples: list[Example],
    targets: DenseTargets,
    indices: list[int],
    select: Callable[[mx.array], Selection],
) -> tuple[list[AnswerScore], list[Selection]]:
    """Run examples as one batch, each under its own selection, as it would run at inference.

    Args:
        student (Student): its masked full model equals the sub-network.
        examples (list): all examples of a split.
        targets (DenseTargets): the dense model's targets of the same examples.
        indices (list): which examples to run.
        select (Callable): scores [L, d_ffn] -> the selection.
    """
    batch = make_batch(examples, indices)
    scores = student.scores(batch.selecting, batch.selecting_lengths)
    selections = [select(each) for each in scores]
    masks = np.stack([selection.mask for selection in selections]).astype(np.float32)
    for mask, selection in zip(masks, selections, strict=True):
        for row, channels, soft in zip(
            mask, selection.layers, selection.soft_values or (), strict=False
        ):
            row[channels] = soft
    trunk = student.trunk()
    network = student.masked(trunk, mx.array(masks))
    hidden = hidden_states(network, batch.tokens[:, :-1])
    mx.eval(hidden)
    parameters, logits = output_layer(trunk)
    ids, logprobs = targets.teacher(indices, batch.tokens.shape[1] - 1)
    results = []
    for row in range(len(indices)):
        positions = np.flatnonzero(np.array(batch.loss_mask[row]))
        loss = kl = 0.0
        exact = True
        for start in range(0, len(positions), _BLOCK):
            part = mx.array(positions[start : start + _BLOCK])
            values = logits(parameters, hidden[row][part]).astype(mx.float32)
            lse = mx.logsumexp(values, axis=-1)
            labels = batch.tokens[row, 1:][part]
            loss += scalar(cross_entropy(values, lse, labels).sum())
            divergence = kl_to_teacher(values, lse, ids[row][part], logprobs[row][part])
            kl += scalar(divergence.sum())
            exact = exact and bool((values.argmax(axis=-1) == labels).all())
        results.append(AnswerScore(loss, kl, len(positions), exact))
    return results, selections


def validate(
    student: Student,
    examples: list[Example],
    targets: DenseTargets,
    batch_size: int,
    temperature: float,
) -> dict[str, Any]:
    """Compute losses, overlaps and dead channels over a validation set.

    Args:
        student (Student): the model.
        examples (list): the set.
        targets (DenseTargets): of the same examples.
        batch_size (int): examples to run at once.
        temperature (float): of the mask.

    Returns:
        dict: ``val_loss`` and ``dense_loss``, cross-entropy a token of the answers, ``val_kl``,
        ``exact_match``, ``val_time`` in seconds, ``overlap_within`` and ``overlap_between`` tasks
        (also ``..._by_layer``), ``dead_channels``: the share that no prompt selects, and
        ``tasks``: the same losses by task.
    """
    start = time.perf_counter()
    mask = student.ifp.mask

    def select(scores: mx.array) -> Selection:
        return select_channels(scores, student.k, operator=mask.operator, temperature=temperature,
                               keep_soft_values=mask.keep_soft_values)  # fmt: skip

    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    by_task: dict[str, list[tuple[AnswerScore, float, bool]]] = defaultdict(list)
    selections: dict[int, Selection] = {}
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        results, selected = score_answers(student, examples, targets, indices, select)
        for i, result, selection in zip(indices, results, selected, strict=True):
            by_task[examples[i].task or ""].append((result, *targets.answer_loss(i)))
            selections[i] = selection
    tasks = {task: _means(results) for task, results in sorted(by_task.items())}
    everything = _means([result for results in by_task.values() for result in results])
    overlap = overlap_summary(
        [selections[i] for i in range(len(examples))], [each.task for each in examples]
    )
    return {
        "val_loss": everything["loss"],
        "dense_loss": everything["dense_loss"],
        "val_kl": everything["kl"],
        "mean_task_kl": float(np.mean([task["kl"] for task in tasks.values()])),
        "exact_match": everything["exact_match"],
        "dense_exact_match": everything["dense_exact_match"],
        "overlap_within": overlap.within,
        "overlap_between": overlap.between,
        "overlap_within_by_layer": overlap.within_by_layer,
        "overlap_between_by_layer": overlap.between_by_layer,
        "dead_channels": overlap.dead_channels,
        "tasks": tasks,
        "val_time": time.perf_counter() - start,
    }


def _means(results: list[tuple[AnswerScore, float, bool]]) -> dict[str, Any]:
    tokens = sum(score.tokens for score, _, _ in results)
    return {
        "loss": sum(score.loss for score, _, _ in results) / tokens,
        "dense_loss": sum(dense for _, dense, _ in results) / tokens,
        "kl": sum(score.kl for score, _, _ in results) / tokens,
        "exact_match": float(np.mean([score.exact for score, _, _ in results])),
        "dense_exact_match": float(np.mean([right for _, _, right in results])),
        "examples": len(results),
        "tokens": tokens,
    }


def collapse_warning(report: dict[str, Any], share: float) -> str | None:
    """The warning to give if the masks no longer depend on the prompt, else None.

    Args:
        report (dict): of :func:`validate`.
        share (float): k / d_ffn; with all channels kept there is nothing to collapse.
    """
    between = report["overlap_between"]
    between = report["overlap_within"] if between is None else between
    if between is None or share == 1 or between < COLLAPSED:
        return None
    return (
        f"The masks hardly depend on the prompt: prompts share {between:.1%} of their channels. "
        "Warm-start the predictor (--warm-start-iters) or lower its learning rate"
        + (", or add --contrastive-weight." if len(report["tasks"]) > 1 else ".")
    )
