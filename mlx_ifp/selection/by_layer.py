"""k by layer: one threshold over the scores of all layers says how many channels each keeps."""

import numpy as np

from ..errors import IFPError
from .keep import WIDTH_MULTIPLE


def check_by_layer(ks: list[int], d_ffn: int) -> None:
    """Find out whether k can differ by layer.

    Args:
        ks (list): L counts, whose mean is kept.
        d_ffn (int): channels of a layer.

    Raises:
        IFPError: if it cannot.
    """
    if len(set(ks)) > 1:
        raise IFPError("k by layer and one k for each layer exclude each other; give one number.")
    if ks[0] % WIDTH_MULTIPLE and ks[0] != d_ffn:
        lower = max(ks[0] // WIDTH_MULTIPLE, 1) * WIDTH_MULTIPLE
        raise IFPError(
            f"With k by layer each layer keeps a multiple of {WIDTH_MULTIPLE} channels, so k must "
            f"be one too, such as {lower}, not {ks[0]}."
        )


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores [L, d_ffn] with mean 0 and variance 1 in each layer; all 0 if they are alike."""
    values = scores.astype(np.float64)
    values = values - values.mean(axis=1, keepdims=True)
    spread = values.std(axis=1, keepdims=True)
    return np.divide(values, spread, out=np.zeros_like(values), where=spread > 0)


def ks_by_layer(scores: np.ndarray, k: int) -> list[int]:
    """How many channels each layer keeps under one threshold: multiples of 64 with the sum L * k.

    Scores are standardised in each layer (mean 0, variance 1), as their size differs by layer. The
    L * k largest of them make a share of each layer, which is rounded by largest remainders.

    Args:
        scores (array): [L, d_ffn], finite.
        k (int): the mean over layers; see :func:`check_by_layer`.

    Returns:
        list: L counts, each at least 64 and at most d_ffn.
    """
    layers, d_ffn = scores.shape
    if k == d_ffn:
        return [d_ffn] * layers
    largest = np.argsort(-standardised(scores), axis=None, kind="stable")[: layers * k]
    shares = np.bincount(largest // d_ffn, minlength=layers) / WIDTH_MULTIPLE
    most = d_ffn // WIDTH_MULTIPLE
    counts = np.clip(np.floor(shares), 1, most).astype(int)
    while (left := layers * k // WIDTH_MULTIPLE - counts.sum()) != 0:
        # A layer that cannot give or take any more is out of the question.
        remainders = shares - counts
        if left > 0:
            counts[np.where(counts < most, remainders, -np.inf).argmax()] += 1
        else:
            counts[np.where(counts > 1, remainders, np.inf).argmin()] -= 1
    return [int(count) * WIDTH_MULTIPLE for count in counts]
