"""Masks with one bit for each channel. All comparisons of selections use them.

With thousands of channels in a layer, comparing lists of channels would take longer than loading a
small sub-network.
"""

import numpy as np


def pack(mask: np.ndarray) -> np.ndarray:
    """A hard mask, bool [..., F], as words of 64 bits: uint64 [..., W]."""
    packed = np.packbits(mask, axis=-1)
    words = -(-packed.shape[-1] // 8)
    padded = np.zeros((*packed.shape[:-1], words * 8), dtype=np.uint8)
    padded[..., : packed.shape[-1]] = packed
    return padded.view(np.uint64)


def count(bits: np.ndarray) -> np.ndarray:
    """How many channels each row of packed bits, uint64 [..., W], holds: int64 [...]."""
    return np.bitwise_count(bits).sum(axis=-1, dtype=np.int64)


def overlap(bits: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Shared channels / k (paper, section 4.4 and appendix A.3); k is the larger of the two.

    Args:
        bits, others: from :func:`pack`, uint64 [..., L, W] each, which numpy can broadcast.

    Returns:
        np.ndarray: float64 [..., L].
    """
    return count(bits & others) / np.maximum(count(bits), count(others))
