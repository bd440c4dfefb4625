"""Compute losses on the answer's tokens, and on prompts of one task.

The logits of a vocabulary are the largest arrays of a training step. Here they are made by blocks
of tokens: the forward and backward pass of a block run before the next block begins, and only
its gradients are kept (as fused linear cross-entropy kernels do).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

# The block is small, so that its logits are small compared with the weights: with 512 the peak of
# a step on SmolLM2 is 350 MB higher, and on a CPU the step is no faster.
BLOCK = 128


@dataclass(frozen=True)
class Targets:
    """What each of n positions should predict.

    Attributes:
        labels: int32 [n], the next token.
        ce_weights: float32 [n], what each counts for in the cross-entropy.
        teacher_ids: uint32 [n, K], the dense model's likeliest tokens, or None.
        teacher_logprobs: float32 [n, K], their log-probabilities, or None.
        kl_weights: float32 [n], what each counts for in KL(dense || student), or None.
    """

    labels: mx.array
    ce_weights: mx.array
    teacher_ids: mx.array | None = None
    teacher_logprobs: mx.array | None = None
    kl_weights: mx.array | None = None

    def block(self, rows: slice) -> "Targets":
        """The targets of some positions."""

        def some(part: mx.array | None) -> mx.array | None:
            return None if part is None else part[rows]

        return Targets(
            self.labels[rows],
            self.ce_weights[rows],
            some(self.teacher_ids),
            some(self.teacher_logprobs),
            some(self.kl_weights),
        )


def cross_entropy(logits: mx.array, lse: mx.array, labels: mx.array) -> mx.array:
    """-log p(label): float32 [n] of logits [n, V], their logsumexp [n] and labels [n]."""
    return lse - mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def kl_to_teacher(
    logits: mx.array, lse: mx.array, teacher_ids: mx.array, teacher_logprobs: mx.array
) -> mx.array:
    """Compute KL(teacher || student) if only the teacher's K likeliest tokens are known.

    All other tokens count as one outcome with the remaining probability. The result is a lower
    bound of the full divergence, and equals it if K is the vocabulary's size.

    Args:
        logits (mx.array): float32 [n, V] of the student.
        lse (mx.array): float32 [n], their logsumexp.
        teacher_ids (mx.array): [n, K].
        teacher_logprobs (mx.array): float32 [n, K].

    Returns:
        mx.array: float32 [n], nats.
    """
    student = mx.take_along_axis(logits, teacher_ids, axis=-1) - lse[:, None]
    probabilities = mx.exp(teacher_logprobs)
    top = (probabilities * (teacher_logprobs - student)).sum(axis=-1)
    # Rounding may leave a rest just below zero; so small a rest adds nothing to the sum.
    rest = mx.maximum(1 - probabilities.sum(axis=-1), 1e-8)
    student_rest = mx.maximum(1 - mx.exp(student).sum(axis=-1), 1e-8)
    return top + rest * mx.log(rest / student_rest)


@mx.custom_function
def _logsumexp(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Logsumexp of the last axis, and the softmax, which is its gradient.

    MLX computes the exponentials anew for the gradient, which costs a CPU as much as a fifth of
    the output layer's matrix products. No gradient flows through the softmax that is returned.
    """
    softmax = mx.softmax(logits, axis=-1)
    return logits.max(axis=-1) - mx.log(softmax.max(axis=-1)), softmax


@_logsumexp.vjp
def _logsumexp_vjp(_: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
    return cotangents[0][..., None] * outputs[1]


def _weighted(logits: mx.array, targets: Targets) -> tuple[mx.array, mx.array, mx.array]:
    """Compute the weighted sum of both losses, and each loss alone."""
    logits = logits.astype(mx.float32)
    lse, _ = cast(tuple[mx.array, mx.array], _logsumexp(logits))
    ce = (targets.ce_weights * cross_entropy(logits, lse, targets.labels)).sum()
    if targets.teacher_ids is None:
        return ce, ce, mx.zeros(())
    assert targets.teacher_logprobs is not None and targets.kl_weights is not None
    kl = kl_to_teacher(logits, lse, targets.teacher_ids, targets.teacher_logprobs)
    kl = (targets.kl_weights * kl).sum()
    return ce + kl, ce, kl


def blockwise_loss(
    parameters: dict,
    hidden: mx.array,
    targets: Targets,
    logits: Callable[[dict, mx.array], mx.array],
    block: int = BLOCK,
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute weighted cross-entropy and KL, by blocks of ``block`` rows of logits.

    Args:
        parameters (dict): trainable parameters of the output layer; may be empty.
        hidden (mx.array): [n, d], final hidden states of the positions that count.
        targets (Targets): the targets of the same positions.
        logits (Callable): from :func:`~mlx_ifp.tuner.networks.output_layer`.
        block (int): positions at a time.

    Returns:
        tuple: the loss to differentiate, which is the sum of w_ce * CE + w_kl * KL; and its two
        parts, which have no gradient.
    """

    def of_block(parameters: dict, hidden: mx.array, targets: Targets):
        return _weighted(logits(parameters, hidden), targets)

    # value_and_grad refuses a tree without arrays.
    wanted = (0, 1) if parameters else 1
    value_and_grad = mx.value_and_grad(of_block, argnums=wanted)

    @mx.custom_function
    def total(parameters: dict, hidden: mx.array):
        values: tuple[mx.array, ...] = ()
        hidden_grads: list[mx.array] = []
        parameter_grads: dict | None = None

        for start in range(0, hidden.shape[0], block):
            rows = slice(start, start + block)
            part = hidden[rows]
            if hidden_grads:
                # Everything that needs a block's logits is evaluated before the next block;
                # otherwise all logits would stay in memory until the end.
                leaves = dict(tree_flatten(parameter_grads or {})).values()
                before = [hidden_grads[-1], *values, *leaves]
                part = mx.depends(part, before)
            value, grads = value_and_grad(parameters, part, targets.block(rows))
            if parameters:
                parameter_grads = (
                    grads[0] if parameter_grads is None
                    else tree_map(mx.add, parameter_grads, grads[0])
                )  # fmt: skip
            hidden_grads.append(grads[1] if parameters else grads)
            values = tuple(map(mx.add, values, value)) if values else value
        return (*values, parameter_grads or {}, mx.concatenate(hidden_grads))

    @total.vjp
    def vjp(primals, cotangents, outputs):
        scale = cotangents[0]
        return tree_map(lambda g: (scale * g).astype(g.dtype), (outputs[3], outputs[4]))

    loss, ce, kl, *_ = cast(list[mx.array], total(parameters, hidden))
    return loss, mx.stop_gradient(ce), mx.stop_gradient(kl)


def contrastive_loss(scores: mx.array, tasks: list[str], temperature: float = 0.1) -> mx.array:
    """Pull the scores of prompts of one task together, and push those of different tasks apart.

    The paper leaves this open (section 6); the form is the supervised contrastive loss of Khosla
    et al. (2020, arXiv 2004.11362) on scores that are centred by layer and normalised.

    Args:
        scores (mx.array): float32 [n, L, d_ffn].
        tasks (list): n names.
        temperature (float): of the softmax over the other prompts.

    Returns:
        mx.array: the mean over prompts that have a companion; 0 if there is none.
    """
    n = scores.shape[0]
    same = mx.array([[a == b for b in tasks] for a in tasks])
    itself = mx.eye(n, dtype=mx.bool_)
    positives = mx.logical_and(same, ~itself).astype(mx.float32)
    # The scores are centred, as what all prompts share says nothing about the task.
    z = (scores - mx.stop_gradient(scores.mean(axis=0, keepdims=True))).reshape(n, -1)
    z = z / mx.maximum(mx.linalg.norm(z, axis=-1, keepdims=True), 1e-6)
    similarity = mx.where(itself, -mx.inf, z @ z.T / temperature)
    logprobs = mx.where(itself, 0, similarity - mx.logsumexp(similarity, axis=-1, keepdims=True))
    companions = positives.sum(axis=-1)
    per_prompt = -(positives * logprobs).sum(axis=-1) / mx.maximum(companions, 1)
    return per_prompt.sum() / mx.maximum((companions > 0).sum(), 1)
