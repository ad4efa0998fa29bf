"""Statistics of scores, against loops, SciPy and cases worked out by hand."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from jaxsi.runs.metrics import (
    agreement_figures,
    dense_ranks,
    edit_distance,
    kendall,
    mean_ci,
    paired_bootstrap,
    pairwise_agreement,
    ratio_ci,
    share_ci,
    spearman,
    table,
)

# ---- agreement -------------------------------------------------------------------------------------------------------


def test_agreement_of_a_case_worked_out_by_hand():
    # Group a: truth 1 < 2 < 3; the scores order (1,2) wrong, tie (1,3), order (2,3) right. Group b: the truth is tied.
    result = pairwise_agreement([4, 2, 4, 5, 1], [1, 2, 3, 7, 7], ["a", "a", "a", "b", "b"])
    assert result.count == 3
    assert result.accuracy == pytest.approx(1 / 3)
    assert result.without_ties == pytest.approx(1 / 2) and result.tie_share == pytest.approx(1 / 3)


def test_judge_of_one_score_has_no_accuracy():
    """It had an agreement of 0.50, as a judge that guesses has."""
    result = pairwise_agreement([4] * 6, [1, 2, 3, 4, 5, 6], ["a"] * 6)
    assert (result.count, result.accuracy, result.without_ties, result.tie_share) == (15, 0, None, 1)
    figures = {"judge_agreement": 0, "judge_agreement_without_ties": None, "judge_tie_share": 1, "judge_pairs": 15}
    assert agreement_figures(result) == figures


def test_agreement_counts_pairs_within_groups_and_skips_rows_without_a_score():
    nothing = pairwise_agreement([1, 2], [2, 1], ["a", "b"])
    assert (nothing.accuracy, nothing.without_ties, nothing.tie_share) == (None, None, None)
    result = pairwise_agreement([1, None, 3], [1, 0, 3], ["a"] * 3)
    assert (result.count, result.accuracy) == (1, 1.0)
    assert pairwise_agreement([None, None], [0, 1], ["a"] * 2).accuracy is None


rows = st.lists(st.tuples(st.none() | st.integers(0, 5), st.integers(0, 3), st.integers(0, 3)), min_size=0, max_size=25)


@given(rows=rows, seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_agreement_equals_a_double_loop_in_any_order(rows, seed):
    right = count = tied = 0
    for i, (score, truth, group) in enumerate(rows):
        for other_score, other_truth, other_group in rows[:i]:
            if group != other_group or truth == other_truth or score is None or other_score is None:
                continue
            count += 1
            tied += score == other_score
            right += score != other_score and (score > other_score) == (truth > other_truth)
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    for order in (rows, shuffled):
        result = pairwise_agreement([r[0] for r in order], [r[1] for r in order], [r[2] for r in order])
        assert result.count == count
        assert result.accuracy == (pytest.approx(right / count) if count else None)
        assert result.tie_share == (pytest.approx(tied / count) if count else None)
        assert result.without_ties == (pytest.approx(right / (count - tied)) if count > tied else None)


def test_agreement_rejects_different_lengths_and_nan():
    with pytest.raises(ValueError, match="lengths differ"):
        pairwise_agreement([1], [1, 2], ["a"])
    with pytest.raises(ValueError, match="scores hold nan"):
        pairwise_agreement([math.nan, 1], [1, 2], ["a", "a"])


# ---- correlations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_equals_scipy(levels):
    rng = np.random.default_rng(levels)
    a = rng.integers(0, levels, 200)
    b = a + rng.integers(0, levels, 200)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize("levels", [3, 1000])
def test_kendall_equals_scipy_and_counts_pairs(levels):
    rng = np.random.default_rng(levels)
    a = rng.integers(0, levels, 50)
    b = a + rng.integers(0, levels, 50)
    assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)
    first, second = np.triu_indices(50, k=1)
    signs_a, signs_b = np.sign(a[first] - a[second]), np.sign(b[first] - b[second])
    tau_b = (signs_a * signs_b).sum() / math.sqrt((signs_a != 0).sum() * (signs_b != 0).sum())
    assert kendall(a, b) == pytest.approx(tau_b, abs=1e-12)


def test_kendall_of_constant_scores_is_none():
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall([1, 1, 1], [1, 2, 3]) is None and kendall([1], [1]) is None and kendall([], []) is None


def test_spearman_of_sorted_and_of_constant_scores():
    assert spearman([1, 2, 3], [10, 20, 21]) == pytest.approx(1)
    assert spearman([1, 2, 3], [21, 20, 10]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1], [1]) is None
    with pytest.raises(ValueError, match="of the same length"):
        spearman([1, 2], [1, 2, 3])


def test_equal_scores_share_a_rank_without_gaps():
    assert dense_ranks([0.5, 2.0, 0.5, -1.0]) == [1, 0, 1, 2]
    assert dense_ranks([]) == []


# ---- bootstrap -------------------------------------------------------------------------------------------------------


def test_mean_interval_agrees_with_the_normal_approximation():
    values = np.random.default_rng(0).normal(50, 10, 400)
    mean, low, high = mean_ci(values)
    error = values.std() / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1)
    assert mean_ci(values) == (mean, low, high)  # the same seed, the same interval
    assert mean_ci(values, seed=1) != (mean, low, high)


def test_interval_of_a_share_holds_that_equal_outcomes_prove_little():
    for outcomes, lowest, highest in (([1.0] * 12, 0.7, 0.76), ([0.5] * 12, 0.4, 0.42), ([1.0], 0.0, 0.0)):
        mean, low, high = share_ci(outcomes)
        assert mean == outcomes[0] and lowest <= low <= highest and low <= mean <= high
        mirrored = share_ci(1 - np.asarray(outcomes))
        assert mirrored == pytest.approx((1 - mean, 1 - high, 1 - low))
    coins = np.random.default_rng(0).random(2000) < 0.3
    assert share_ci(coins) == pytest.approx(mean_ci(coins), abs=0.002)
    with pytest.raises(ValueError, match="from 0 to 1"):
        share_ci([0.5, 1.5])


def test_ratio_draws_what_belongs_to_a_prompt_together():
    rng = np.random.default_rng(0)
    wholes = rng.integers(1, 4, 400)
    parts = wholes * (rng.random(400) < 0.3)  # a prompt has all of its parts or none
    share, low, high = ratio_ci(parts, wholes)
    assert share == pytest.approx(parts.sum() / wholes.sum())
    error = math.sqrt(((parts - share * wholes) ** 2).sum()) / wholes.sum()
    assert low == pytest.approx(share - 1.96 * error, abs=0.005)
    assert high == pytest.approx(share + 1.96 * error, abs=0.005)
    assert ratio_ci(parts, np.ones(400)) == pytest.approx(mean_ci(parts))
    with pytest.raises(ValueError, match="above 0"):
        ratio_ci([1, 0], [1, 0])


def test_more_samples_of_a_prompt_do_not_narrow_the_interval():
    values = np.random.default_rng(0).normal(0, 1, 100)
    assert mean_ci(np.repeat(values[:, None], 4, axis=1)) == pytest.approx(mean_ci(values))


def test_bootstrap_is_fast_and_bounded_at_full_size():
    start = time.monotonic()
    mean_ci(np.random.default_rng(0).normal(size=20_000), samples=1000)
    paired_bootstrap(np.ones((3, 500)), np.zeros((3, 500)))
    assert time.monotonic() - start < 20


def test_paired_bootstrap_of_a_constant_gain_is_that_gain():
    b = np.random.default_rng(0).normal(size=(3, 50))
    assert paired_bootstrap(b + 7, b, samples=100) == pytest.approx((7, 7, 7))


def test_paired_bootstrap_covers_seeds_as_well_as_prompts():
    rng = np.random.default_rng(0)
    seeds = np.array([-5.0, 0.0, 5.0])[:, None]
    mean, low, high = paired_bootstrap(seeds + rng.normal(0, 0.1, (3, 200)), np.zeros((3, 200)))
    assert mean == pytest.approx(0, abs=0.05)
    assert low < -4.5  # all three draws are the worst seed in 1 of 27 cases: within the lower 2.5 % + the next
    assert high > 4.5
    prompts = rng.normal(0, 10, 200)[None, :]
    _, low, high = paired_bootstrap(np.repeat(prompts, 3, axis=0), np.zeros((3, 200)))
    assert (high - low) == pytest.approx(2 * 1.96 * prompts.std() / math.sqrt(200), rel=0.1)


def test_paired_bootstrap_equals_a_loop_over_draws():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    means = []
    for _ in range(20_000):
        means.append((a - b)[np.ix_(rng.integers(0, 2, 2), rng.integers(0, 6, 6))].mean())
    mean, low, high = paired_bootstrap(a, b, samples=20_000)
    assert mean == pytest.approx((a - b).mean())
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.05)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.05)


def test_bootstrap_rejects_unpaired_empty_and_infinite_values():
    with pytest.raises(ValueError, match=r"\(1, 3\) and b \(1, 2\)"):
        paired_bootstrap([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="values hold nan"):
        mean_ci([1, math.nan])
    with pytest.raises(ValueError, match="not empty"):
        mean_ci([])


# ---- tables and texts ------------------------------------------------------------------------------------------------


def test_table_is_aligned():
    text = table([{"arm": "judge", "quality": 61.23456, "n": 7}, {"arm": "permuted", "quality": None, "n": 12}])
    assert text == ("arm       quality   n\n--------  -------  --\njudge       61.23   7\npermuted        -  12")
    assert table([]) == ""


def test_edit_distance_counts_replacements_deletions_and_insertions():
    assert edit_distance("kitten", "sitting") == edit_distance("sitting", "kitten") == 3
    assert edit_distance([], ["a", "b"]) == 2 and edit_distance(["a"], ["a"]) == 0
