"""Fit the predictor to what the dense LLM's channels did on each example, before joint training.

With little data, joint training from a random head tends to give every prompt the same channels.
After this fit the scores depend on the instruction from the first step of joint training. Only the
predictor is trained here, and the targets cost one forward pass of the dense model.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from ..llm.modules import scalar
from .batches import batches_by_length, make_batch, spread
from .data import Example
from .dense_targets import DenseTargets
from .step import compiled_update
from .student import Student


def standardized(statistics: np.ndarray) -> np.ndarray:
    """Take logarithms of activation statistics, with mean 0 and variance 1 in each layer.

    Args:
        statistics (array): float32 [..., L, d_ffn], 0 or more.
    """
    logs = np.log(np.maximum(statistics, 1e-4))
    logs = logs - logs.mean(axis=-1, keepdims=True)
    return logs / np.maximum(logs.std(axis=-1, keepdims=True), 1e-6)


def mean_importance(targets: DenseTargets, indices: list[int], batch_size: int) -> np.ndarray:
    """Average the standardized statistic over examples; a static score, float32 [L, d_ffn]."""
    total = np.zeros((), np.float32)
    for start in range(0, len(indices), batch_size):
        statistics = targets.activations(indices[start : start + batch_size])
        total = total + standardized(statistics).sum(axis=0)
    return (total / len(indices)).astype(np.float32)


def fit_predictor(
    student: Student,
    examples: list[Example],
    targets: DenseTargets,
    *,
    iters: int,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    examples_used: int = 512,
    seed: int = 0,
    report: Callable[[dict[str, Any]], Any] = lambda _: None,
    report_every: int = 10,
) -> float:
    """Regress the scores on the standardized activation statistics of prompts and answers.

    The last bias starts as their mean, so the predictor starts as the best static mask and learns
    how instructions differ from it.

    Args:
        student (Student): its backbone and head are changed.
        examples (list): of the training set.
        targets (DenseTargets): of the same examples.
        iters (int): how many steps to take.
        batch_size (int): examples of a step.
        learning_rate (float): Adam's; the backbone learns at a tenth of it.
        examples_used (int): how many examples, spread evenly over the set.
        seed (int): seed of the order of the examples.
        report (Callable): called with a dict every ``report_every`` steps.
        report_every (int): how many steps lie between two reports.

    Returns:
        float: the share of the variance between examples that the last steps explained.
    """
    used = spread(len(examples), examples_used)
    # The examples are sorted so that those of similar length share a batch of the dense model.
    used.sort(key=lambda i: len(examples[i].tokens))
    mean = mx.array(mean_importance(targets, used, batch_size))
    last = student.head.linears[-1]
    last.bias = mean.reshape(-1).astype(last.bias.dtype)

    def loss_of(parts: nn.Module, batch: Any, wanted: mx.array) -> mx.array:
        scores = student.scores(batch.selecting, batch.selecting_lengths)
        return (scores - wanted).square().mean()

    trained = nn.Module()
    trained.backbone, trained.head = student.backbone, student.head
    optimizer = optim.MultiOptimizer(
        [optim.Adam(learning_rate=learning_rate), optim.Adam(learning_rate=learning_rate / 10)],
        [lambda path, _: path.startswith("head")],
    )
    value_and_grad = nn.value_and_grad(trained, loss_of)
    optimizer.init(trained.trainable_parameters())
    update = compiled_update(trained, optimizer)
    random = np.random.default_rng([seed, 1])
    lengths = np.array([len(example.selecting) for example in examples])
    batches: list[np.ndarray] = []
    explained = []
    for step in range(1, iters + 1):
        if not batches:
            batches = batches_by_length(random.permutation(used), lengths, batch_size)
            batches = [batches[i] for i in random.permutation(len(batches))]
        indices = batches.pop().tolist()
        wanted = mx.array(standardized(targets.activations(indices)))
        loss, grads = value_and_grad(trained, make_batch(examples, indices), wanted)
        update(grads)
        around_mean = (wanted - mean).square().mean()
        mx.eval(trained.parameters(), optimizer.state, loss, around_mean)
        explained.append(1 - scalar(loss) / max(scalar(around_mean), 1e-9))
        if step % report_every == 0 or step == iters:
            share = float(np.mean(explained[-report_every:]))
            report({"warm_start_iteration": step, "warm_start_loss": loss.item(),
                    "variance_explained": share})  # fmt: skip
    return float(np.mean(explained[-report_every:])) if explained else 0.0
