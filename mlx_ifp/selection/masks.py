"""Scores -> masks. Functions take and give arrays; nothing here knows a model.

The paper is Instruction-Following Pruning (Hou et al., ICML 2025, arXiv 2501.02086), section 3.1.
SoftTopK comes from Conditional Adapters (Lei et al., 2023, arXiv 2304.04947).

L is the number of layers, F = d_ffn the number of FFN channels of a layer, k how many are kept.
"""

import math

import mlx.core as mx

from ..errors import IFPError

# Both solvers search an interval of at most 42 + ln(F). After 48 halvings float32 cannot tell its
# ends apart.
_BISECTION_STEPS = 48


def _per_layer(k: int | list[int], scores: mx.array) -> mx.array:
    """k as float32 [..., 1], checked against the last axis of the scores."""
    size = scores.shape[-1]
    ks = [k] if isinstance(k, int) else list(k)
    if any(not 1 <= x <= size for x in ks):
        raise IFPError(f"k must be between 1 and the number of channels, {size}; got {k}.")
    if len(ks) > 1 and (scores.ndim < 2 or scores.shape[-2] != len(ks)):
        raise IFPError(f"{len(ks)} values of k were given for scores of shape {scores.shape}.")
    return mx.array(ks, dtype=mx.int32)[:, None] if len(ks) > 1 else mx.array(ks, dtype=mx.int32)


def _kth_largest(scores: mx.array, k: mx.array) -> mx.array:
    """The k-th largest score of each row, [..., 1]."""
    ascending = mx.sort(scores, axis=-1)
    index = mx.broadcast_to(scores.shape[-1] - k, (*scores.shape[:-1], 1))
    return mx.take_along_axis(ascending, index, axis=-1)


def topk_mask(scores: mx.array, k: int | list[int]) -> mx.array:
    """The mask of the k largest scores of each row. It always keeps exactly k.

    Ties at the k-th score go to the lower channel index.

    Args:
        scores (mx.array): [..., F].
        k (int or list): channels to keep; a list holds one number a row of [L, F] scores.

    Returns:
        mx.array: bool [..., F] with exactly k true values a row.
    """
    count = _per_layer(k, scores)
    threshold = _kth_largest(scores, count)
    above = scores > threshold
    tied = scores == threshold
    room = count - above.sum(axis=-1, keepdims=True)
    return above | (tied & (mx.cumsum(tied.astype(mx.int32), axis=-1) <= room))


def _bisect(excess, low: mx.array, high: mx.array) -> mx.array:
    """The point where the decreasing function ``excess`` changes sign, elementwise."""
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        too_low = excess(middle) > 0
        low = mx.where(too_low, middle, low)
        high = mx.where(too_low, high, middle)
    return (low + high) / 2


def soft_topk(
    scores: mx.array,
    k: int | list[int],
    *,
    operator: str = "sigmoid",
    temperature: float = 1.0,
) -> mx.array:
    """SoftTopK: 0 <= lambda <= 1 with sum k, differentiable in the scores (paper, section 3.1).

    lambda maximises ``scores . lambda + temperature * H(lambda)``. With the binary entropy
    (``"sigmoid"``) it is ``sigmoid(scores / temperature - nu)``; with ``H = -sum l log l``
    (``"capped_exp"``, CoDA) it is ``min(1, exp((scores + a) / temperature))``. The one unknown,
    nu or a, is found by bisection outside the graph. One Newton step inside the graph then
    carries the derivative of that unknown, so the gradient is the implicit function theorem's.

    Args:
        scores (mx.array): [..., F], finite.
        k (int or list): the sum of each row; a list holds one number a row of [L, F] scores.
        operator (str): ``"sigmoid"`` or ``"capped_exp"``.
        temperature (float): epsilon in the paper, above 0.

    Returns:
        mx.array: float32 [..., F].
    """
    if not temperature > 0:
        raise IFPError(f"The mask temperature must be above 0, got {temperature}.")
    if operator not in ("sigmoid", "capped_exp"):
        raise IFPError(f"SoftTopK has the operators sigmoid and capped_exp, not {operator!r}.")
    count = _per_layer(k, scores)
    z = scores.astype(mx.float32) / temperature
    # A shift of all scores changes nothing. With the k-th largest at 0 the unknown lies near 0,
    # where float32 is finest, however large the scores are.
    z = z - mx.stop_gradient(_kth_largest(z, count))
    target = count.astype(mx.float32)
    fixed = mx.stop_gradient(z)
    log_size = math.log(z.shape[-1])
    zeros = mx.zeros((*z.shape[:-1], 1))

    if operator == "sigmoid":

        def value(z: mx.array, nu: mx.array) -> mx.array:
            return mx.sigmoid(z - nu)

        slope = lambda values: values * (1 - values)  # noqa: E731
        low, high = zeros - 40, zeros + log_size + 1
    else:

        def value(z: mx.array, nu: mx.array) -> mx.array:
            return mx.exp(mx.minimum(z - nu, 0))

        slope = lambda values: mx.where(values < 1, values, 0)  # noqa: E731
        low, high = zeros, zeros + log_size + 1

    nu = _bisect(lambda nu: value(fixed, nu).sum(axis=-1, keepdims=True) - target, low, high)
    nu = mx.stop_gradient(nu)
    steepness = mx.stop_gradient(slope(value(fixed, nu)).sum(axis=-1, keepdims=True))
    # Only the derivative of this step is wanted. Its value is the rounding error of the bisection,
    # and is taken out.
    step = value(z, nu).sum(axis=-1, keepdims=True) - target
    step = (step - mx.stop_gradient(step)) / mx.maximum(steepness, 1e-20)
    soft = value(z, nu + step)
    # At k = F only lambda = 1 satisfies the constraints, and a sigmoid reaches 1 only at infinity.
    return mx.where(count == z.shape[-1], mx.ones_like(soft), soft)
