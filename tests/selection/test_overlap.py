"""The overlap of many selections equals Selection.overlap and what is computed by hand."""

from itertools import combinations

import numpy as np
import pytest

from mlx_ifp import IFPError, Selection
from mlx_ifp.selection.overlap import overlap_matrix, overlap_summary

D_FFN = 40


def random_selection(seed: int, ks: tuple[int, ...] = (10, 10, 10)) -> Selection:
    random = np.random.default_rng(seed)
    layers = [np.sort(random.choice(D_FFN, k, replace=False)).astype(np.int32) for k in ks]
    return Selection(tuple(layers), None, D_FFN)


def chosen(*channels: int) -> Selection:
    """One layer of 8 channels."""
    return Selection((np.array(channels, dtype=np.int32),), None, 8)


def test_matrix_is_selection_overlap():
    # The last one has another k, which differs by layer.
    selections = [random_selection(seed) for seed in range(5)] + [random_selection(5, (4, 12, 40))]
    matrix = overlap_matrix(selections)
    assert matrix.shape == (6, 6, 3) and matrix.dtype == np.float64
    for i in range(6):
        for j in range(6):
            expected = selections[i].overlap(selections[j])[1]
            np.testing.assert_allclose(matrix[i, j], expected, rtol=1e-6)


def test_matrix_by_hand():
    matrix = overlap_matrix([chosen(0, 1, 2, 3), chosen(2, 3, 4, 5)])
    np.testing.assert_array_equal(matrix[..., 0], [[1, 0.5], [0.5, 1]])


def test_summary_is_the_mean_over_pairs():
    tasks = ["math", "code", None, "math", "code", None, "math"]
    selections = [random_selection(seed) for seed in range(len(tasks))]
    summary = overlap_summary(selections, tasks)
    pairs = {True: [], False: []}
    for i, j in combinations(range(len(tasks)), 2):
        pairs[tasks[i] == tasks[j]].append(selections[i].overlap(selections[j])[1])
    within, between = np.mean(pairs[True], axis=0), np.mean(pairs[False], axis=0)
    np.testing.assert_allclose(summary.within_by_layer, within, rtol=1e-6)
    np.testing.assert_allclose(summary.between_by_layer, between, rtol=1e-6)
    assert summary.within == pytest.approx(within.mean())
    assert summary.between == pytest.approx(between.mean())
    dead = 1 - np.any([selection.mask for selection in selections], axis=0).mean()
    assert summary.dead_channels == pytest.approx(dead)


def test_summary_by_hand():
    selections = [chosen(0, 1), chosen(0, 1), chosen(1, 2), chosen(2, 3)]
    summary = overlap_summary(selections, ["a", "a", "b", "b"])
    assert summary.within == 0.75  # 1 and 1/2
    assert summary.between == 0.25  # 1/2, 0, 1/2, 0
    assert summary.dead_channels == 0.5


def test_no_pair_is_none():
    alone = overlap_summary([chosen(0, 1)], ["a"])
    assert alone.within is None and alone.within_by_layer is None
    assert alone.between is None and alone.between_by_layer is None
    one_task = overlap_summary([chosen(0, 1), chosen(0, 1)], [None, None])
    assert one_task.within == 1 and one_task.between is None
    two_tasks = overlap_summary([chosen(0, 1), chosen(0, 2)], ["a", None])
    assert two_tasks.within is None and two_tasks.between == 0.5


def test_errors():
    with pytest.raises(IFPError, match="no selection"):
        overlap_matrix([])
    with pytest.raises(IFPError, match="different models: 1 x 8 and 3 x 40 channels"):
        overlap_matrix([random_selection(0), chosen(0)])
    with pytest.raises(IFPError, match="1 selections, but 2 tasks"):
        overlap_summary([chosen(0)], ["a", "b"])
