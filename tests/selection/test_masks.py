"""Masks are exact top-k, and both SoftTopK operators solve their problems."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_ifp import IFPError
from mlx_ifp.selection.masks import soft_topk, topk_mask
from mlx_ifp.selection.selection import Selection, select_channels

SOFT = ("sigmoid", "capped_exp")


def scores(layers=4, size=96, scale=1.0, seed=0):
    return scale * mx.random.normal((layers, size), key=mx.random.key(seed))


@pytest.mark.parametrize("k", [1, 2, 50, 95, 96])
def test_topk_keeps_the_k_largest(k):
    z = scores()
    mask = np.array(topk_mask(z, k))
    expected = np.zeros_like(mask)
    order = np.argsort(-np.array(z), axis=-1)[:, :k]
    np.put_along_axis(expected, order, True, axis=-1)
    assert (mask == expected).all()


def test_ties_go_to_the_lower_index():
    z = mx.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    mask = topk_mask(z, 3)
    assert mask.tolist() == [
        [False, True, True, True, False, False],
        [True, True, True, False, False, False],
    ]


def test_k_may_differ_by_layer():
    mask = topk_mask(scores(), [1, 20, 95, 96])
    assert mask.sum(axis=-1).tolist() == [1, 20, 95, 96]


@pytest.mark.parametrize("k", [0, -1, 97, [1, 2], [1, 2, 3, 97]])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(IFPError):
        topk_mask(scores(), k)


@pytest.mark.parametrize("operator", SOFT)
@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("k", [1, 2, 48, 95, 96])
def test_soft_values_are_bounded_and_sum_to_k(operator, temperature, k):
    soft = soft_topk(scores(), k, operator=operator, temperature=temperature)
    assert soft.dtype == mx.float32
    assert soft.min().item() >= 0
    assert soft.max().item() <= 1
    assert np.allclose(np.array(soft.sum(axis=-1)), k, rtol=1e-5)


@pytest.mark.parametrize("operator", SOFT)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4, 1e8])
@pytest.mark.parametrize("k", [1, 30, 96])
def test_extreme_scores(operator, scale, k):
    soft = soft_topk(scores(scale=scale), k, operator=operator)
    assert mx.isfinite(soft).all()
    assert np.allclose(np.array(soft.sum(axis=-1)), k, rtol=1e-5)
    if scale == 0:
        assert np.allclose(np.array(soft), k / 96, rtol=1e-5)
    if scale >= 1e8:
        assert np.allclose(np.array(soft), np.array(topk_mask(scores(), k)), atol=1e-6)


@pytest.mark.parametrize("operator", SOFT)
def test_one_outlier_does_not_spoil_the_rest(operator):
    z = mx.concatenate([scores(1, 95), mx.array([[1e6]])], axis=-1)
    soft = soft_topk(z, 10, operator=operator)
    assert soft[0, -1].item() == pytest.approx(1)
    rest = soft_topk(z[:, :-1], 9, operator=operator)
    assert np.allclose(np.array(soft[:, :-1]), np.array(rest), atol=1e-5)


def test_sigmoid_solves_its_problem():
    """Where z.lambda + eps * binary entropy is largest, logit(lambda) - z / eps is constant."""
    z, eps = scores(), 0.5
    soft = np.array(soft_topk(z, 30, operator="sigmoid", temperature=eps), np.float64)
    shift = np.log(soft / (1 - soft)) - np.array(z) / eps
    assert np.allclose(shift, shift[:, :1], atol=1e-3)


def test_capped_exp_equals_the_alternating_updates_of_coda():
    z, eps, k = np.array(scores(), np.float64), 0.7, 30
    b = np.zeros_like(z)
    for _ in range(2000):
        a = eps * np.log(k) - eps * np.log(np.exp((z + b) / eps).sum(-1, keepdims=True))
        b = np.minimum(-z - a, 0)
    expected = np.exp((z + a + b) / eps)
    soft = soft_topk(mx.array(z.astype(np.float32)), k, operator="capped_exp", temperature=eps)
    assert np.allclose(np.array(soft), expected, atol=1e-5)


@pytest.mark.parametrize("operator", SOFT)
@pytest.mark.parametrize("k", [1, 7, 23])
def test_gradients_equal_finite_differences(operator, k):
    z = scores(2, 24, seed=3)
    weights = mx.random.normal((2, 24), key=mx.random.key(9))

    def loss(z):
        return (soft_topk(z, k, operator=operator, temperature=0.8) * weights).sum()

    gradient = np.array(mx.grad(loss)(z))
    step = 1e-2
    numeric = np.zeros_like(gradient)
    for index in np.ndindex(*gradient.shape):
        delta = np.zeros_like(gradient)
        delta[index] = step
        ends = [loss(z + mx.array(sign * delta)).item() for sign in (1, -1)]
        numeric[index] = (ends[0] - ends[1]) / (2 * step)
    # A channel that is capped within the step has a kink that finite differences straddle.
    soft = np.array(soft_topk(z, k, operator=operator, temperature=0.8))
    smooth = np.abs(1 - soft) > 0.05 if operator == "capped_exp" else np.ones_like(soft, bool)
    assert np.abs(gradient).max() > 1e-2
    assert np.allclose(gradient[smooth], numeric[smooth], atol=3e-3)


@pytest.mark.parametrize("operator", SOFT)
def test_gradients_leave_the_sum_unchanged(operator):
    """The sum is k whatever the scores are, so its gradient is zero."""
    gradient = mx.grad(lambda z: soft_topk(z, 20, operator=operator).sum())(scores())
    assert mx.abs(gradient).max().item() < 1e-5


@pytest.mark.parametrize("operator", SOFT)
@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_gradients_of_extreme_scores_are_finite(operator, scale):
    gradient = mx.grad(lambda z: soft_topk(z, 20, operator=operator).square().sum())(
        scores(scale=scale)
    )
    assert mx.isfinite(gradient).all()


def test_wrong_operator_and_temperature_are_refused():
    with pytest.raises(IFPError, match="softmax"):
        soft_topk(scores(), 3, operator="softmax")
    with pytest.raises(IFPError, match="temperature"):
        soft_topk(scores(), 3, temperature=0.0)


def test_selection_holds_ascending_indices_and_soft_values():
    z = scores()
    hard = select_channels(z, 40)
    assert hard.indices.dtype == mx.int32
    assert hard.indices.shape == (4, 40)
    assert (np.diff(np.array(hard.indices)) > 0).all()
    assert hard.weights is None
    soft = select_channels(z, 40, operator="sigmoid", keep_soft_values=True)
    assert (np.array(soft.indices) == np.array(hard.indices)).all()
    values = soft_topk(z, 40, operator="sigmoid")
    assert mx.array_equal(soft.weights, mx.take_along_axis(values, soft.indices, axis=-1))
    assert soft.digest != hard.digest


def test_scores_that_are_not_finite_are_refused():
    z = scores()
    z[2, 5] = float("nan")
    with pytest.raises(IFPError, match="layer 2 are not finite: the weights"):
        select_channels(z, 4)
    with pytest.raises(IFPError, match="layer 2 are not finite in bfloat16: the weights"):
        select_channels(z, 4, computed_in=mx.bfloat16)
    with pytest.raises(IFPError, match=r"float16 overflowed.*--dtype bfloat16"):
        select_channels(z, 4, computed_in=mx.float16)


def test_overlap_is_shared_channels_over_k():
    def selection(*layers):
        return Selection(tuple(np.array(layer, np.int32) for layer in layers), None, 10)

    one = selection([0, 1, 2, 3], [0, 1, 2, 3])
    other = selection([2, 3, 4, 5], [6, 7, 8, 9])
    mean, per_layer = one.overlap(other)
    assert per_layer.tolist() == [0.5, 0.0]
    assert mean == 0.25
    assert one.overlap(one)[0] == 1
    assert one.overlap(selection([0, 1], [0, 1]))[0] == 0.5
    with pytest.raises(IFPError, match="different models"):
        one.overlap(selection([0]))


def test_digest_is_of_content_and_checkpoint():
    z = scores()
    assert select_channels(z, 40).digest == select_channels(z + 1, 40).digest
    assert select_channels(z, 40).digest != select_channels(z, 41).digest
    assert select_channels(z, 40, checkpoint="a").digest != select_channels(z, 40).digest
