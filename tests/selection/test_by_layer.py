"""k by layer: one threshold over standardised scores, multiples of 64, the sum of L * k."""

import numpy as np
import pytest

from mlx_ifp import IFPError
from mlx_ifp.selection.by_layer import check_by_layer, ks_by_layer
from mlx_ifp.selection.ranks import blended, ranks


@pytest.mark.parametrize("k", [64, 128, 320, 448, 512, 520])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_counts_are_multiples_with_the_sum_of_all_layers(k, seed):
    # The layers' tails differ, so that some want more channels than others.
    rng = np.random.default_rng(seed)
    scores = rng.gamma(rng.uniform(0.02, 20, (6, 1)), size=(6, 520)).astype(np.float32)
    ks = ks_by_layer(scores, k)
    assert sum(ks) == 6 * k
    assert all(64 <= one <= 520 for one in ks)
    if k < 520:
        assert all(one % 64 == 0 for one in ks)


def test_counts_follow_the_threshold():
    # Half of the first layer's channels stand out, and a quarter of the second's.
    scores = np.zeros((2, 512), np.float32)
    scores[0, :256] = 1 + np.linspace(0, 0.01, 256)
    scores[1, :128] = 100 * (1 + np.linspace(0, 0.01, 128))
    assert ks_by_layer(scores, 192) == [256, 128]
    # A layer whose scores are all alike has nothing that stands out, but keeps the least.
    scores[1] = 7
    assert ks_by_layer(scores, 128) == [192, 64]


def test_what_cannot_differ_by_layer():
    with pytest.raises(IFPError, match=r"must be one too, such as 64, not 100"):
        check_by_layer([100] * 3, 160)
    with pytest.raises(IFPError, match="exclude each other"):
        check_by_layer([64, 64, 128], 160)
    check_by_layer([160] * 3, 160)
    assert ks_by_layer(np.ones((3, 160), np.float32), 160) == [160] * 3


def test_ranks_and_their_blend_by_hand():
    prompt = np.array([[0.3, 0.1, 0.2, 0.2]])
    prior = np.array([[0.0, 5.0, 1.0, 2.0]])
    assert ranks(prompt).tolist() == [[1.0, 0.25, 0.75, 0.5]]
    assert np.allclose(
        blended(prompt, prior, 0.25),
        [[0.25 + 0.75 * 0.25, 0.0625 + 0.75, 0.1875 + 0.375, 0.125 + 0.75 * 0.75]],
    )
