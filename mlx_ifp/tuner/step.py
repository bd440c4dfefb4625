"""Do one training step: scores -> mask -> network -> loss, and gradients -> weights."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import build_schedule

from ..errors import IFPError
from ..llm.output import hidden_states, output_layer
from .batches import Batch
from .losses import Targets, blockwise_loss, contrastive_loss
from .student import Student
from .training_args import TrainingArgs

# Positions are padded to a multiple of this, so that shapes repeat.
_POSITIONS_MULTIPLE = 64


@dataclass(frozen=True)
class Positions:
    """Which positions of a batch count, as arrays.

    Attributes:
        rows: int32 [n], into the flattened [B * (S - 1)] positions, padded.
        answer: float32 [n], 1 for the answer's tokens, else 0.
        distilled: float32 [n], 1 where the dense model is to be matched, else 0.
        answer_tokens: how many ones ``answer`` has.
        distilled_tokens: how many ones ``distilled`` has.
    """

    rows: mx.array
    answer: mx.array
    distilled: mx.array
    answer_tokens: int
    distilled_tokens: int


def positions_of(batch: Batch, distill_on: str) -> Positions:
    """Find the positions of a batch that count.

    Args:
        batch (Batch): a batch of examples.
        distill_on (str): ``all`` tokens or the ``answer`` only; ``none`` for no distillation.
    """
    answer = np.array(batch.loss_mask).reshape(-1)
    tokens = np.array(batch.token_mask).reshape(-1)
    distilled = {"all": tokens, "answer": answer, "none": np.zeros_like(answer)}[distill_on]
    rows = np.flatnonzero(answer | distilled)
    padding = -len(rows) % _POSITIONS_MULTIPLE

    def weights(mask: np.ndarray) -> mx.array:
        return mx.array(np.pad(mask[rows].astype(np.float32), (0, padding)))

    return Positions(
        mx.array(np.pad(rows, (0, padding)).astype(np.int32)),
        weights(answer),
        weights(distilled),
        int(answer.sum()),
        int(distilled.sum()),
    )


@dataclass(frozen=True)
class Mix:
    """How the parts of the loss are weighed, and how the mask is made at this step.

    Attributes:
        ce: factor of an answer token's cross-entropy.
        kl: factor of a token's KL(dense || student).
        contrastive: factor of the contrastive term.
        temperature: epsilon of SoftTopK.
        blend: 0 is the dense model, 1 the masked one.
        shared_by: the row whose text selects for the whole batch; None if each selects for itself.
        k: channels kept in each layer; None for the checkpoint's k.
    """

    ce: float
    kl: float
    contrastive: float
    temperature: float
    blend: float
    shared_by: int | None
    k: int | None = None


def batch_loss(
    student: Student,
    batch: Batch,
    positions: Positions,
    teacher: tuple[mx.array, mx.array] | None,
    mix: Mix,
    contrast: Batch | None = None,
    contrast_tasks: list[str] | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute the loss of a batch.

    The network is narrow if the batch shares one mask, and wide otherwise; both have the same
    gradients.

    Args:
        student (Student): what is trained.
        batch (Batch): tokens [B, S].
        positions (Positions): the positions of the batch that count.
        teacher (tuple): ids and log-probabilities [B, S - 1, K] of the dense model, or None.
        mix (Mix): weights of the parts.
        contrast (Batch): prompts of several tasks for the contrastive term.
        contrast_tasks (list): their tasks.

    Returns:
        tuple: the loss; and, as values only, the summed weighted cross-entropy and KL.
    """
    selecting, lengths = batch.selecting, batch.selecting_lengths
    if mix.shared_by is not None:
        row = slice(mix.shared_by, mix.shared_by + 1)
        selecting, lengths = selecting[row], lengths[row]
    scores = student.scores(selecting, lengths)
    trunk = student.trunk()
    if mix.blend == 1.0 and scores.shape[0] == 1:
        network = student.narrow(trunk, scores[0], mix.temperature, mix.k)
    else:
        scores = mx.broadcast_to(scores, (batch.tokens.shape[0], *scores.shape[1:]))
        network = student.wide(trunk, scores, mix.temperature, mix.blend, mix.k)
    inputs = batch.tokens[:, :-1]
    hidden = hidden_states(network, inputs)
    rows = positions.rows
    targets = Targets(
        labels=batch.tokens[:, 1:].reshape(-1)[rows],
        ce_weights=positions.answer * mix.ce,
    )
    if teacher is not None:
        ids, logprobs = (part.reshape(-1, part.shape[-1])[rows] for part in teacher)
        targets = Targets(targets.labels, targets.ce_weights, ids, logprobs,
                          positions.distilled * mix.kl)  # fmt: skip
    parameters, logits = output_layer(trunk)
    hidden = hidden.reshape(-1, hidden.shape[-1])[rows]
    loss, ce, kl = blockwise_loss(parameters, hidden, targets, logits)
    if contrast is not None and contrast_tasks is not None:
        scores = student.scores(contrast.selecting, contrast.selecting_lengths)
        loss = loss + mix.contrastive * contrastive_loss(scores, contrast_tasks)
    return loss, ce, kl


def make_optimizer(student: Student, args: TrainingArgs) -> optim.Optimizer:
    """Make AdamW for predictor and LLM, each with its own rate, as far as they are trained."""

    def adamw(rate: float, schedule: dict[str, Any] | None) -> optim.Optimizer:
        try:
            scheduled = build_schedule(schedule) if schedule else None
            if scheduled is not None:
                # Whether the schedule's arguments are numbers shows only when it is called.
                mx.eval(scheduled(mx.array(0)))
        except Exception as error:
            raise IFPError(
                f"The learning rate schedule {schedule} is not one of mlx-lm's ({error!r}); it has "
                "name, arguments and maybe warmup."
            ) from error
        # Without bias correction the first 50 steps are four to seven times what the rate says.
        return optim.AdamW(
            learning_rate=rate if scheduled is None else scheduled,
            weight_decay=args.weight_decay,
            bias_correction=True,
        )

    names = list(dict(tree_flatten(student.trainable_parameters())))
    of_llm = adamw(args.learning_rate, args.lr_schedule)
    of_predictor = adamw(args.predictor_learning_rate, args.predictor_lr_schedule)
    groups = {name.startswith("llm.") for name in names}
    if not groups:
        raise IFPError("Nothing is trained: a static mask and a frozen LLM.")
    if groups == {True}:
        return of_llm
    if groups == {False}:
        return of_predictor
    return optim.MultiOptimizer([of_llm, of_predictor], [lambda path, _: path.startswith("llm.")])


def optimizers_of(optimizer: optim.Optimizer) -> list[optim.Optimizer]:
    """The parts of a MultiOptimizer, or the one optimizer."""
    return optimizer.optimizers if isinstance(optimizer, optim.MultiOptimizer) else [optimizer]


def compiled_update(
    model: nn.Module, optimizer: optim.Optimizer, max_grad_norm: float = 0.0
) -> Callable[[dict], None]:
    """Make clipping and the optimizer one graph, which passes over the weights only once.

    Args:
        model (nn.Module): the model whose weights are updated.
        optimizer (optim.Optimizer): initialized; its state must not be replaced afterwards.
        max_grad_norm (float): gradients are scaled down to this norm; 0 for never.

    Returns:
        Callable: takes the gradients; the new weights are not evaluated yet.
    """
    # MLX needs these very dictionaries. A MultiOptimizer's state is a new one each time it is read.
    state = [model.state, *(each.state for each in optimizers_of(optimizer))]

    @partial(mx.compile, inputs=state, outputs=state)
    def apply(grads: dict) -> None:
        if max_grad_norm:
            grads, _ = optim.clip_grad_norm(grads, max_grad_norm)
        optimizer.update(model, grads)

    return apply
