"""Scores -> masks (paper, section 3.1: ``m = lambda * Top(lambda, k)``), as mlx_ifp/masks.py.

The paper is Instruction-Following Pruning (Hou et al., ICML 2025, arXiv 2501.02086); SoftTopK comes
from Conditional Adapters (Lei et al., 2023, arXiv 2304.04947). F is the number of channels of a
layer, k how many are kept. Nothing here waits for the device.
"""

import math

import torch
from torch import Tensor

OPERATORS = ("sigmoid", "capped_exp")
MODES = ("soft", "hard", "straight_through")

# The interval is at most 42 + ln(F) wide; after 40 halvings float32 cannot tell its ends apart.
_BISECTION_STEPS = 40


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest score of each row, [..., 1]."""
    return torch.sort(scores, dim=-1, descending=True).values[..., k - 1 : k]


def _check(scores: Tensor, k: int) -> None:
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k must be between 1 and the {scores.shape[-1]} channels, not {k}")


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """The k largest scores of each row: bool [..., F] with exactly k true values a row.

    Ties at the k-th score go to the lower channel.
    """
    _check(scores, k)
    scores = scores.detach()
    threshold = _kth_largest(scores, k)
    above, tied = scores > threshold, scores == threshold
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


def soft_topk(
    scores: Tensor, k: int, operator: str = "sigmoid", temperature: float = 0.1
) -> Tensor:
    """SoftTopK: 0 <= lambda <= 1 with sum k, differentiable in the scores.

    lambda maximises ``scores . lambda + temperature * H(lambda)``. With the binary entropy
    (``sigmoid``) it is ``sigmoid(scores / temperature - nu)``; with ``H = -sum l log l``
    (``capped_exp``, CoDA) it is ``min(1, exp(scores / temperature - nu))``. The unknown nu is found
    by bisection outside the graph. One Newton step inside the graph carries its derivative, so the
    gradient is that of the implicit function theorem.

    Args:
        scores (Tensor): [..., F], finite.
        k (int): the sum of each row; at k = F every lambda is exactly 1.
        operator (str): ``sigmoid`` or ``capped_exp``.
        temperature (float): epsilon in the paper, above 0.

    Returns:
        Tensor: float32 [..., F].
    """
    _check(scores, k)
    if operator not in OPERATORS:
        raise ValueError(f"the operator must be one of {', '.join(OPERATORS)}, not {operator}")
    if not temperature > 0:
        raise ValueError(f"the mask temperature must be above 0, not {temperature}")
    size = scores.shape[-1]
    if k == size:
        # Only lambda = 1 satisfies the constraints; a sigmoid reaches it at infinity. The gradient
        # is 0, not absent: several processes want one of every parameter.
        return torch.ones_like(scores, dtype=torch.float32) + 0 * scores.float()
    z = scores.float() / temperature
    # A shift of all scores changes nothing. With the k-th largest at 0 the unknown lies near 0,
    # where float32 is finest, however large the scores are.
    z = z - _kth_largest(z.detach(), k)

    def value(z: Tensor, nu: Tensor) -> Tensor:
        return torch.sigmoid(z - nu) if operator == "sigmoid" else torch.exp((z - nu).clamp(max=0))

    with torch.no_grad():
        fixed = z.detach()
        low = torch.full_like(fixed[..., :1], -40.0 if operator == "sigmoid" else 0.0)
        high = torch.full_like(low, math.log(size) + 1)
        for _ in range(_BISECTION_STEPS):
            nu = (low + high) / 2
            too_low = value(fixed, nu).sum(dim=-1, keepdim=True) > k
            low, high = torch.where(too_low, nu, low), torch.where(too_low, high, nu)
        nu = (low + high) / 2
        found = value(fixed, nu)
        slope = found * (1 - found) if operator == "sigmoid" else found * (found < 1)
        steepness = slope.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    # Only the derivative of this step is wanted: its value is the rounding of the bisection.
    step = value(z, nu).sum(dim=-1, keepdim=True)
    step = (step - step.detach()) / steepness
    return value(z, nu + step)


def mask_of(
    scores: Tensor,
    k: int,
    operator: str = "sigmoid",
    temperature: float = 0.1,
    mode: str = "straight_through",
) -> Tensor:
    """The mask of scores [..., F]: float32 [..., F], exactly k of each row are not 0.

    Args:
        scores (Tensor): [..., F].
        k (int): channels to keep; at k = F every mask is exactly 1.
        operator (str): of SoftTopK.
        temperature (float): of SoftTopK.
        mode (str): ``soft``: lambda * Top; ``hard``: 0 or 1, without a gradient;
            ``straight_through``: 0 or 1, with the gradient of lambda * Top.
    """
    if mode not in MODES:
        raise ValueError(f"the mask mode must be one of {', '.join(MODES)}, not {mode}")
    hard = topk_mask(scores, k).float()
    if mode == "hard" or (mode == "straight_through" and not scores.requires_grad):
        return hard
    soft = hard * soft_topk(scores, k, operator, temperature)
    return soft if mode == "soft" else hard + (soft - soft.detach())
