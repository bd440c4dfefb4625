"""Ridge regression in closed form equals what plain numpy computes."""

import numpy as np
import pytest

from mlx_ifp.errors import IFPError
from mlx_ifp.fitting.ridge import Standard, fit_ridge, left_out_errors

N, WIDTH, OUTPUTS = 40, 7, 50


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray]:
    """Inputs of different sizes, and outputs with noise."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(N, WIDTH)) * rng.uniform(0.1, 5, WIDTH) + rng.normal(size=WIDTH)
    outputs = inputs @ rng.normal(size=(WIDTH, OUTPUTS)) + rng.normal(size=(N, OUTPUTS))
    return inputs, outputs.astype(np.float32)


def by_hand(inputs, outputs, strength):
    """The normal equations on standardised inputs: fitted outputs without their mean."""
    x = Standard.of(inputs)(inputs)
    lam = strength * np.trace(x @ x.T) / len(x)
    centred = outputs - outputs.mean(axis=0)
    return x, x @ np.linalg.solve(x.T @ x + lam * np.eye(x.shape[1]), x.T @ centred)


def test_it_equals_the_normal_equations(problem):
    inputs, outputs = problem
    ridge = fit_ridge(inputs, outputs, OUTPUTS, strengths=[0.05])
    _, fitted = by_hand(inputs, outputs, 0.05)
    np.testing.assert_allclose(ridge(inputs), fitted + outputs.mean(axis=0), atol=2e-5)


def test_a_rank_limit_cuts_the_singular_values_of_the_fit(problem):
    inputs, outputs = problem
    ridge = fit_ridge(inputs, outputs, 3, strengths=[0.05])
    _, fitted = by_hand(inputs, outputs, 0.05)
    left, sizes, right = np.linalg.svd(fitted, full_matrices=False)
    expected = (left[:, :3] * sizes[:3]) @ right[:3] + outputs.mean(axis=0)
    assert ridge.first.shape == (3, WIDTH) and ridge.second.shape == (OUTPUTS, 3)
    np.testing.assert_allclose(ridge(inputs), expected, atol=2e-5)


def test_outputs_on_disk_in_half_precision_give_the_same_fit(problem, tmp_path):
    inputs, outputs = problem
    path = tmp_path / "outputs.npy"
    np.save(path, outputs.astype(np.float16))
    ridge = fit_ridge(inputs, np.load(path, mmap_mode="r"), OUTPUTS, strengths=[0.05])
    expected = fit_ridge(inputs, outputs, OUTPUTS, strengths=[0.05])
    np.testing.assert_allclose(ridge(inputs), expected(inputs), atol=2e-2)


def test_errors_of_examples_left_out_equal_fits_without_them(problem):
    inputs, outputs = problem
    x = Standard.of(inputs)(inputs)
    centred = outputs.astype(np.float64) - outputs.mean(axis=0)
    size = np.trace(x @ x.T) / N
    ((_, error),) = left_out_errors(x @ x.T / size, centred @ centred.T, [0.05])
    squares = mean_alone = 0.0
    for i in range(N):
        others = np.arange(N) != i
        mean_x, mean_y = x[others].mean(axis=0), outputs[others].astype(np.float64).mean(axis=0)
        near, far = x[others] - mean_x, outputs[others] - mean_y
        slope = np.linalg.solve(near.T @ near + 0.05 * size * np.eye(WIDTH), near.T @ far)
        squares += np.square(outputs[i] - mean_y - (x[i] - mean_x) @ slope).sum()
        mean_alone += np.square(outputs[i] - mean_y).sum()
    assert error == pytest.approx(squares / mean_alone, rel=1e-5)


def test_the_strength_with_the_smallest_error_is_taken(problem):
    inputs, outputs = problem
    noise = np.random.default_rng(1).normal(size=outputs.shape).astype(np.float32)
    assert fit_ridge(inputs, outputs, 5).strength < 0.1
    # Where there is nothing to predict, the strongest is best.
    assert fit_ridge(inputs, noise, 5).strength == max(
        e[0] for e in fit_ridge(inputs, noise, 5).errors
    )


def test_an_input_that_never_varies_does_no_harm(problem):
    inputs, outputs = problem
    more = np.concatenate([inputs, np.full((N, 1), 3.0)], axis=1)
    ridge = fit_ridge(more, outputs, OUTPUTS, strengths=[0.05])
    assert np.isfinite(ridge.first).all()
    np.testing.assert_allclose(
        ridge(more), fit_ridge(inputs, outputs, OUTPUTS, [0.05])(inputs), atol=1e-4
    )


@pytest.mark.parametrize("inputs", [np.ones((1, 2)), np.ones((5, 2))])
def test_nothing_to_fit_is_one_line(inputs):
    with pytest.raises(IFPError):
        fit_ridge(inputs, np.random.default_rng(0).normal(size=(len(inputs), 3)), 2)
