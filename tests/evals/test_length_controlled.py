"""The length-controlled fit on made-up rows: the optimum is exact, and each part of the formula is there."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import optimize

from jaxsi.evals.length_controlled import (
    STRENGTHS,
    FitError,
    Gamed,
    Rows,
    chosen_strength,
    fit,
    is_extreme,
    length_controlled,
    sigmoid,
    standardized,
    violation,
)


def made(seed: int, n: int = 60, theta: tuple[float, ...] = (-1.5, 1.0, -0.5)) -> Rows:
    rng = np.random.default_rng(seed)
    x_NK = np.stack([np.tanh(rng.normal(size=n)), rng.normal(size=n), np.ones(n)], axis=1)
    y_N = np.clip(sigmoid(x_NK @ np.asarray(theta)) + rng.normal(0, 0.2, n), 0, 1)
    return Rows(features_NK=x_NK, labels_N=y_N, weights_N=rng.uniform(0.1, 1.0, n))


def objective(theta: np.ndarray, rows: Rows, strength: float) -> float:
    z = rows.features_NK @ theta
    losses = rows.labels_N * np.logaddexp(0.0, -z) + (1 - rows.labels_N) * np.logaddexp(0.0, z)
    return float(np.abs(theta).sum() + strength * rows.weights_N @ losses)


@given(st.integers(0, 10_000), st.sampled_from([1e-3, 0.03, 0.3, 2.78, 50.0, 1e4]), st.integers(1, 80))
@settings(max_examples=30, deadline=None)
def test_fit_is_the_optimum_of_the_penalized_loss(seed, strength, n):
    rows = made(seed, n)
    theta = fit(rows, strength)
    split = optimize.minimize(  # the same with theta = u - v, u and v not below 0: smooth
        lambda uv: objective(uv[:3] - uv[3:], rows, strength) - np.abs(uv[:3] - uv[3:]).sum() + uv.sum(),
        np.full(6, 0.1), bounds=[(0, None)] * 6, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-13},
    )  # fmt: skip
    assert objective(theta, rows, strength) <= split.fun + 1e-9 * (1 + abs(split.fun))
    gradient = strength * rows.features_NK.T @ (rows.weights_N * (sigmoid(rows.features_NK @ theta) - rows.labels_N))
    assert violation(theta, gradient) <= 1e-8 * (1 + strength * n)


def test_a_strong_penalty_gives_exact_zeros_and_a_wrong_answer_is_seen():
    rows = made(0)
    assert fit(rows, 1e-4).tolist() == [0.0, 0.0, 0.0]
    assert violation(np.zeros(3), np.asarray([0.5, -1.0, 0.2])) == 0
    assert violation(np.asarray([1.0, 0.0]), np.asarray([-0.75, 1.5])) == 0.5


def test_separable_labels_have_a_finite_fit():
    x_NK = np.stack([np.linspace(-1, 1, 20)] * 2 + [np.ones(20)], axis=1)
    rows = Rows(features_NK=x_NK, labels_N=(x_NK[:, 0] > 0).astype(float), weights_N=np.ones(20))
    assert np.isfinite(fit(rows, 1e4)).all()


def test_strength_is_chosen_among_ten_and_folds_spread_rows():
    assert len(STRENGTHS) == 10 and STRENGTHS[5] == pytest.approx(2.782559402)
    informative = made(1, 400)
    noise = dataclasses.replace(informative, labels_N=np.random.default_rng(0).permutation(informative.labels_N))
    assert chosen_strength(informative) > chosen_strength(noise)
    with pytest.raises(FitError, match="4 rows are too few for 5-fold"):
        chosen_strength(made(0, 4))


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_c_is_a_number_above_0(strength):
    with pytest.raises(FitError, match="it must be a number above 0"):
        fit(made(0), strength)


def test_lengths_are_scaled_and_not_centred():
    assert standardized(np.asarray([100.0, 300.0])).tolist() == pytest.approx([0.70710678, 2.12132034])
    assert standardized(np.zeros(3)).tolist() == [0, 0, 0] and standardized(np.asarray([7.0])).tolist() == [0.0]


def world(seed: int = 0, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray, Gamed]:
    rng = np.random.default_rng(seed)
    difficulty_N = rng.normal(size=n)
    differences_N = rng.normal(-150, 300, n)
    t_N = np.tanh(standardized(differences_N))
    labels_N = sigmoid(-2.0 * t_N + difficulty_N - 1.0)
    t_G = rng.normal(size=2 * n)
    gamed_labels = sigmoid(-2.0 * np.tanh(t_G) + np.concatenate([difficulty_N] * 2))
    gamed = Gamed(differences_G=t_G, difficulty_G=np.concatenate([difficulty_N] * 2), labels_G=gamed_labels)
    return labels_N, differences_N, difficulty_N, gamed


def test_the_win_rate_is_that_of_equal_lengths_and_unannotated_rows_are_predicted():
    labels_N, differences_N, difficulty_N, gamed = world()
    result = length_controlled(labels_N, differences_N, difficulty_N, gamed, 1e4)
    assert (result.length, result.difficulty, result.model) == pytest.approx((-2.0, 1.0, -1.0), abs=0.01)
    assert result.win_rate == pytest.approx(100 * sigmoid(difficulty_N - 1.0).mean(), abs=0.05)
    assert result.win_rate < 100 * labels_N.mean() - 3  # longer responses won
    some = labels_N.copy()
    some[::3] = np.nan
    partly = length_controlled(some, differences_N, difficulty_N, gamed, 1e4)
    assert len(partly.predictions_N) == 300 and np.isfinite(partly.predictions_N).all()
    assert partly.win_rate == pytest.approx(result.win_rate, abs=0.1)
    with pytest.raises(FitError, match="no row is annotated"):
        length_controlled(np.full(300, np.nan), differences_N, difficulty_N, gamed, 1.0)


def test_warning_when_the_controlled_rate_is_far_from_the_raw_one():
    """The official limits: a quarter of the way to 0 or 100, and at least ten points."""
    assert [is_extreme(20, x) for x in (9.9, 10.1, 39.9, 40.1)] == [True, False, False, True]
    assert [is_extreme(80, x) for x in (59.9, 60.1, 89.9, 90.1)] == [True, False, False, True]
