"""Ridge regression of reduced rank, in closed form.

There are far more outputs (L * d_ffn) than examples, so everything that is N x N is made first: the
kernel K of the inputs and the products C of the outputs. Strength and rank are chosen there, and
the outputs are then read once more, in blocks of columns.

With inputs X and outputs Y, both centred, ridge regression is ``B = X^T (K + lambda I)^-1 Y``
(Saunders, Gammerman, Vovk, "Ridge Regression Learning Algorithm in Dual Variables", 1998). The best
fit of rank r projects its fitted values on their first r right singular vectors (Izenman,
"Reduced-rank regression for the multivariate linear model", 1975).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import IFPError

# Strengths that are tried, relative to the mean of the kernel's diagonal.
STRENGTHS = tuple(float(f"{10.0 ** (power / 4):.3g}") for power in range(-10, 7))
# Columns of outputs that are read at a time.
_COLUMNS = 1 << 14
# An input that hardly varies tells nothing, and is not divided by its deviation.
_FLAT = 1e-6


@dataclass(frozen=True)
class Standard:
    """How inputs are standardised: minus ``mean`` [D], divided by ``scale`` [D]."""

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, inputs: np.ndarray) -> "Standard":
        """Of inputs [N, D]."""
        values = inputs.astype(np.float64)
        deviation = values.std(axis=0)
        least = _FLAT * max(float(deviation.max(initial=0)), 1e-30)
        return cls(values.mean(axis=0), np.where(deviation > least, deviation, np.inf))

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs [..., D] as float64 of mean 0 and deviation 1."""
        return (inputs.astype(np.float64) - self.mean) / self.scale


@dataclass(frozen=True)
class Ridge:
    """The regression: outputs = ``mean + second @ (first @ inputs + offset)``.

    Attributes:
        first: float64 [rank, D]; inputs are as they come, because their standardisation is in it.
        offset: float64 [rank].
        second: float32 [outputs, rank], orthonormal columns.
        mean: float32 [outputs].
        strength: lambda, relative to the mean of the kernel's diagonal.
        errors: (strength, error) of each strength that was tried: the squared error on examples
            that are left out, as a share of what the mean alone leaves.
    """

    first: np.ndarray
    offset: np.ndarray
    second: np.ndarray
    mean: np.ndarray
    strength: float
    errors: list[tuple[float, float]]

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Outputs [..., outputs] of inputs [..., D]."""
        return (inputs @ self.first.T + self.offset) @ self.second.T + self.mean


def left_out_errors(
    kernel: np.ndarray, products: np.ndarray, strengths: Sequence[float] = STRENGTHS
) -> list[tuple[float, float]]:
    """The squared error on each example if it is left out, for each strength.

    It needs no second fit: the residual of an example that is left out is its residual divided by
    one minus its leverage (Allen, "The Relationship between Variable Selection and Data
    Augmentation", 1974).

    Args:
        kernel (np.ndarray): float64 [N, N] of centred inputs, with a diagonal of mean 1.
        products (np.ndarray): float64 [N, N], the products of centred outputs.
        strengths (sequence): lambdas.

    Returns:
        list: (strength, error); an error of 1 is that of the mean alone.
    """
    n = len(kernel)
    values, vectors = np.linalg.eigh(kernel)
    values = np.maximum(values, 0)
    rotated = vectors.T @ products @ vectors
    alone = np.trace(products) / (1 - 1 / n) ** 2
    errors = []
    for strength in strengths:
        shrunk = strength / (values + strength)
        residual = vectors * shrunk
        # The leverage of an example includes what it adds to the mean.
        left = np.einsum("ij,ij->i", residual, vectors) - 1 / n
        squares = np.einsum("ij,ij->i", residual @ rotated, residual)
        errors.append(
            (float(strength), float((squares / np.maximum(left, 1e-12) ** 2).sum() / alone))
        )
    return errors


def output_products(
    outputs: Any, progress: Callable[[int], Any] = lambda _: None
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of outputs [N, outputs], and the products of centred ones: float64 [N, N].

    Args:
        outputs (array): float16 or float32, in memory or mapped.
        progress (Callable): called with the number of columns of each block.
    """
    n, width = outputs.shape
    products, means = np.zeros((n, n)), []
    for start in range(0, width, _COLUMNS):
        block = np.asarray(outputs[:, start : start + _COLUMNS], np.float32)
        means.append(block.mean(axis=0))
        block = block - means[-1]
        products += block @ block.T
        progress(block.shape[1])
    return np.concatenate(means), products


def fit_ridge(
    inputs: np.ndarray,
    outputs: Any,
    rank: int,
    strengths: Sequence[float] = STRENGTHS,
    progress: Callable[[int], Any] = lambda _: None,
) -> Ridge:
    """Fit a ridge regression of reduced rank; its strength is chosen on examples left out.

    Args:
        inputs (np.ndarray): float [N, D].
        outputs (array): float16 or float32 [N, outputs], in memory or mapped; it is read twice, a
            block of columns at a time.
        rank (int): at most; fewer if the inputs do not have it.
        strengths (sequence): lambdas that are tried.
        progress (Callable): called with the number of columns of each block that is done.

    Raises:
        IFPError: if there are fewer than two examples, or all inputs or outputs are equal.
    """
    n = len(inputs)
    if n < 2:
        raise IFPError(f"{n} examples are too few to fit anything.")
    standard = Standard.of(inputs)
    x = standard(inputs)
    kernel = x @ x.T
    size = np.trace(kernel) / n
    mean, products = output_products(outputs, progress)
    if not (size > 0 and np.trace(products) > 0):
        raise IFPError("All examples are equal, so there is nothing to fit.")
    kernel /= size
    errors = left_out_errors(kernel, products, strengths)
    strength = min(errors, key=lambda each: each[1])[0]
    solved = np.linalg.inv(kernel + strength * np.eye(n))
    # Fitted values are P Y, and their left singular vectors those of P C P.
    smoother = kernel @ solved
    squares, left = np.linalg.eigh(smoother @ products @ smoother.T)
    kept = np.flatnonzero(squares > squares[-1] * 1e-12)[::-1][:rank]
    left = left[:, kept] / np.sqrt(squares[kept])
    # V = Y^T P U / S, and the first map is V^T B^T = (X^T (K + lambda)^-1 Y V)^T.
    weights = (smoother.T @ left).astype(np.float32)
    second = np.empty((outputs.shape[1], len(kept)), np.float32)
    for start in range(0, len(second), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        block = np.asarray(outputs[:, columns], np.float32) - mean[columns]
        second[columns] = block.T @ weights
        progress(block.shape[1])
    dual = solved @ (products @ (smoother.T @ left)) / size
    first = (x.T @ dual).T / standard.scale
    return Ridge(first, -(first @ standard.mean), second, mean, strength, errors)
