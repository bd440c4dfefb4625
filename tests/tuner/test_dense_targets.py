"""What the dense model does on the examples."""

import numpy as np
import pytest

from mlx_ifp.tuner.dense_targets import _largest


@pytest.mark.parametrize("size", [100, 64 * 64, 64 * 65, 49_152, 50_001])
def test_the_likeliest_tokens_are_those_of_a_sort(size):
    values = np.random.default_rng(0).normal(size=(5, size)).astype(np.float32)
    values[1, -3:] = 9  # behind the last whole block
    values[2, 7] = np.inf
    found = np.sort(_largest(values, 64), axis=-1)
    assert found.shape == (5, 64)
    assert np.array_equal(found, np.sort(np.argsort(values, axis=-1)[:, -64:], axis=-1))


def test_of_equal_tokens_any_is_taken_but_once():
    found = _largest(np.zeros((2, 64 * 100), np.float32), 64)
    assert all(len(set(row)) == 64 for row in found.tolist())
