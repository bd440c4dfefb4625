"""Cross-entropy and KL to the dense model, over the whole vocabulary, block by block.

The logits are the largest tensors of a training step. Here forward and backward of some rows run
together before the next rows' begin, so the logits of a batch never exist as a whole.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# (hidden states [n, d], the output layer's weight [V, d]) -> logits [n, V]
Logits = Callable[[Tensor, Tensor], Tensor]


def terms(
    logits: Tensor, teacher: Tensor | None, labels: Tensor, ce_weights: Tensor, kl_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of some positions, and their gradient.

    Args:
        logits (Tensor): [n, V] of the student.
        teacher (Tensor): [n, V], logits of the dense model, or None.
        labels (Tensor): int64 [n], the next tokens.
        ce_weights, kl_weights (Tensor): float32 [n], what a position counts for.

    Returns:
        tuple: the weighted sums of -log p(label) and of KL(dense || student), and the gradient of
        both together, in the type of the logits.
    """
    values = logits.float()
    logprobs = values - torch.logsumexp(values, dim=-1, keepdim=True)
    ce = -logprobs.gather(-1, labels[:, None])[:, 0]
    probs = logprobs.exp()
    is_label = torch.arange(values.shape[-1], device=values.device) == labels[:, None]
    gradient = ce_weights[:, None] * (probs - is_label.float())
    if teacher is None:
        return (ce_weights * ce).sum(), ce.new_zeros(()), gradient.to(logits.dtype)
    wanted = teacher.float()
    wanted = wanted - torch.logsumexp(wanted, dim=-1, keepdim=True)
    target = wanted.exp()
    kl = (target * (wanted - logprobs)).sum(dim=-1)
    gradient = gradient + kl_weights[:, None] * (probs - target)
    return (ce_weights * ce).sum(), (kl_weights * kl).sum(), gradient.to(logits.dtype)


class _BlockwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, logits, teacher, labels, ce_weights, kl_weights, block, dtype,
                terms_of):  # fmt: skip
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        # Cast once, not for every block.
        cast = weight.detach().to(dtype).requires_grad_()
        ce_sum = kl_sum = torch.zeros((), device=hidden.device)
        theirs = their_weight = None
        if teacher is not None:
            theirs, their_weight = teacher[0], teacher[1].to(dtype)
        for start in range(0, len(hidden), block):
            rows = slice(start, start + block)
            wanted = None if theirs is None else logits(theirs[rows].to(dtype), their_weight)
            with torch.enable_grad():
                part = hidden[rows].detach().to(dtype).requires_grad_()
                made = logits(part, cast)
            ce, kl, gradient = terms_of(
                made.detach(), wanted, labels[rows], ce_weights[rows], kl_weights[rows]
            )
            of_hidden, of_weight = torch.autograd.grad(made, (part, cast), gradient)
            hidden_gradient[rows] = of_hidden
            weight_gradient += of_weight
            ce_sum, kl_sum = ce_sum + ce, kl_sum + kl
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(ce_sum, kl_sum)
        return ce_sum + kl_sum, ce_sum, kl_sum

    @staticmethod
    def backward(ctx, scale, *_):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        weight_gradient = (scale * weight_gradient).to(ctx.weight_dtype)
        return (scale * hidden_gradient, weight_gradient, *[None] * 8)


def blockwise_loss(
    hidden: Tensor,
    weight: Tensor,
    logits: Logits,
    teacher: tuple[Tensor, Tensor] | None,
    labels: Tensor,
    ce_weights: Tensor,
    kl_weights: Tensor,
    *,
    block: int,
    dtype: torch.dtype,
    terms_of: Callable = terms,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy and KL(dense || student) of n positions.

    Args:
        hidden (Tensor): [n, d], final hidden states of the student.
        weight (Tensor): [V, d], of its output layer.
        logits (Callable): makes logits of the two; used for the dense model, too.
        teacher (tuple): hidden states [n, d] and output weight of the dense model, or None.
        labels, ce_weights, kl_weights (Tensor): as for :func:`terms`.
        block (int): positions at a time.
        dtype (torch.dtype): of the logits.
        terms_of (Callable): :func:`terms`, or that compiled.

    Returns:
        tuple: the loss to differentiate, and as values its two parts.
    """
    return _BlockwiseLoss.apply(
        hidden, weight, logits, teacher, labels, ce_weights, kl_weights, block, dtype,
        terms_of,
    )  # fmt: skip
