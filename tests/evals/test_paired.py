"""Paired comparisons: the intervals cover the truth, and the figures mean what they say."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.evals.length_controlled import sigmoid, standardized
from jaxsi.evals.paired import LEAST, EqualLength, paired, sign_test
from jaxsi.runs.metrics import share_ci

SIMULATIONS = 1_000


def outcomes(kind: str, p_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One verdict, the mean of two orders, or probabilities."""
    if kind == "probabilities":
        return rng.beta(3 * p_N, 3 * (1 - p_N))
    first, second = (rng.random(len(p_N)) < p_N), (rng.random(len(p_N)) < p_N)
    return first.astype(float) if kind == "verdicts" else (first + second.astype(float)) / 2


@pytest.mark.parametrize("kind", ["verdicts", "orders", "probabilities"])
@pytest.mark.parametrize(("theta", "theta_len"), [(0.3, -1.5), (-2.5, -1.0)], ids=["even", "one-sided"])
def test_intervals_cover_the_truth_in_93_of_100_simulations(kind, theta, theta_len):
    """The raw rate's truth is that of all prompts; the controlled rate's is theta's. A longer response wins more often,
    and A is the longer one, so that the two truths differ."""
    rng = np.random.default_rng(1)
    n, shift = 80, -0.5
    everywhere = np.tanh(rng.normal(size=400_000) + shift)
    truth = float(sigmoid(theta + theta_len * everywhere).mean())
    raw = controlled = 0
    for _ in range(SIMULATIONS):
        t_N = rng.normal(size=n) + shift
        y_N = outcomes(kind, sigmoid(theta + theta_len * np.tanh(t_N)), rng)
        _, low, high = share_ci(y_N)
        raw += low <= truth <= high
        fit = EqualLength(y_N, np.tanh(standardized(300 * t_N)))
        controlled += fit.t_squared(theta) <= fit.limit
    assert raw >= 0.93 * SIMULATIONS and controlled >= 0.93 * SIMULATIONS, (raw, controlled)


def test_the_ends_of_the_interval_are_where_its_test_is():
    rng = np.random.default_rng(2)
    t_N = rng.normal(size=60)
    y_N = (rng.random(60) < sigmoid(1 - t_N)).astype(float)
    fit = EqualLength(y_N, np.tanh(t_N))
    low, high = fit.interval
    assert low < fit.logit < high
    assert fit.t_squared(low) == pytest.approx(fit.limit, rel=1e-4) == fit.t_squared(high)
    assert fit.t_squared(low + 0.01) < fit.limit < fit.t_squared(high + 0.01)


def test_a_win_by_length_alone_is_none_at_equal_length():
    """A's responses are longer and win by that; the fit sees a side that is shorter now and then."""
    rng = np.random.default_rng(3)
    difference = rng.normal(-200, 200, size=600)
    y_N = (rng.random(600) < sigmoid(-2.0 * np.tanh(difference / difference.std()))).astype(float)
    result = paired(y_N.tolist(), difference.tolist())
    assert result.win_rate > 65 and result.interval[0] > 60 and result.p_value < 1e-6
    assert result.controlled_interval[0] < 50 < result.controlled_interval[1] and result.controlled_p_value > 0.05
    assert result.length_effect < -1


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=40), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_swapping_the_sides_mirrors_every_figure(y, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(-50, 50, len(y)).astype(float).tolist()
    one, other = paired(y, lengths), paired([1 - v for v in y], [-v for v in lengths])
    assert (one.wins, one.losses, one.ties) == (other.losses, other.wins, other.ties)
    assert one.win_rate == pytest.approx(100 - other.win_rate)
    assert one.interval[0] == pytest.approx(100 - other.interval[1], abs=1e-6)
    if len(y) >= LEAST:
        assert one.controlled == pytest.approx(100 - other.controlled, abs=1e-4)
        assert one.controlled_interval[0] == pytest.approx(100 - other.controlled_interval[1], abs=1e-3)
        assert 0 <= one.controlled_interval[0] <= one.controlled <= one.controlled_interval[1] <= 100
    else:
        assert one.controlled is one.controlled_interval is one.controlled_p_value is None
    assert one.p_value == pytest.approx(other.p_value)
    low, high = one.interval
    assert 0 <= low <= one.win_rate <= high <= 100


def test_interval_holds_a_mean_of_nothing_or_of_everything():
    for n in range(2, 40):
        assert paired([0.0] * n, [0.0] * n).interval[0] == 0.0 and paired([1.0] * n, [0.0] * n).interval[1] == 100.0


def test_one_side_that_wins_everything_has_an_interval_with_room():
    result = paired([1.0] * 30, [10.0 * i - 145 for i in range(30)])
    assert result.win_rate == 100 and 80 < result.interval[0] < 95 and result.interval[1] == 100
    assert 50 < result.controlled < 100 and result.controlled_interval[0] > 50
    assert result.p_value == pytest.approx(2 * 0.5**30)


def test_the_sign_test_is_exact_and_ties_say_nothing():
    assert sign_test(np.asarray([0.5] * 8 + [-0.5] * 2 + [0.0] * 5)) == pytest.approx(112 / 1024)
    assert sign_test(np.zeros(4)) == 1.0
    graded = np.asarray([0.4, 0.3, 0.2, 0.35, 0.15, 0.25, -0.05, 0.45])
    assert sign_test(graded) == sign_test(graded) == pytest.approx(4 / 256, abs=1e-9)


def test_equal_lengths_leave_the_raw_logit():
    result = paired([1.0, 1.0, 0.0, 1.0] * 10, [0.0] * 40)
    assert result.length_effect == 0 and result.controlled == pytest.approx(100 * 30.5 / 41)  # Jeffreys' prior


def test_a_row_that_alone_decides_the_effect_of_length_has_the_prior_beside_it():
    """All other lengths are equal. With Jeffreys' prior that row's probability is (1 + 1/2) / 2, the others' 1/2."""
    result = paired([1.0, 0.0] * 10 + [1.0], [0.0] * 20 + [300.0])
    assert result.controlled == pytest.approx(50)
    assert result.length_effect == pytest.approx(np.log(3) / np.tanh(np.sqrt(21)))
    low, high = result.controlled_interval
    assert low == pytest.approx(100 - high, abs=1e-3) and 25 < low < 35


def test_one_prompt_is_no_comparison():
    with pytest.raises(EvaluationError, match="1 prompts were judged; a comparison needs at least 2"):
        paired([1.0], [0.0])
