"""Ranks of channels, and their blend: what a prompt and a prior say together."""

import numpy as np


def ranks(scores: np.ndarray) -> np.ndarray:
    """The rank of each channel in its layer, 1 / d_ffn for the lowest score and 1 for the highest.

    Of equal scores the lower channel has the higher rank, as in
    :func:`~mlx_ifp.selection.masks.topk_mask`.

    Args:
        scores (array): [L, d_ffn], finite.

    Returns:
        array: float32 [L, d_ffn].
    """
    descending = np.argsort(-scores, axis=-1, kind="stable")
    made = np.empty(scores.shape, np.float32)
    size = scores.shape[-1]
    places = np.broadcast_to(np.arange(size, 0, -1, dtype=np.float32) / size, scores.shape)
    np.put_along_axis(made, descending, places, axis=-1)
    return made


def blended(prompt: np.ndarray, prior: np.ndarray, blend: float) -> np.ndarray:
    """Scores that blend ranks: ``blend`` times the prompt's, and the rest times the prior's.

    This is GLASS: ranks of the prompt's statistic and of a global one are summed in each layer
    ("GLASS: Test-Time Acceleration for LLMs via Global-Local Neural Importance Aggregation", 2025,
    arXiv 2508.14302).

    Args:
        prompt, prior (array): scores [L, d_ffn], finite.
        blend (float): 0 to 1.

    Returns:
        array: float32 [L, d_ffn].
    """
    return blend * ranks(prompt) + (1 - blend) * ranks(prior)
