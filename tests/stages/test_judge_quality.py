"""The measures of a judge on human rankings, against scipy and cases worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from jaxsi.runs.records import Judgment, RankedResponses
from jaxsi.stages.judge_quality import judge_quality


def case(*rows):
    """Ranked responses and judgments of [(scores, ranks), ...]."""
    ranked, judgments = [], []
    for number, (scores, ranks) in enumerate(rows):
        messages = ({"role": "user", "content": f"question {number}"},)
        texts = tuple(f"answer {i}" for i in range(len(ranks)))
        ranked.append(RankedResponses(id=str(number), messages=messages, responses=texts, ranks=tuple(ranks)))
        for i, score in enumerate(scores):
            judgments.append(
                Judgment(
                    id=f"{number}#{i}",
                    prompt_id=str(number),
                    scores=(score,),
                    score=score,
                    texts=("",),
                    fingerprint="weights",
                    template="template",
                )
            )
    return ranked, judgments


def test_case_worked_out_by_hand():
    ranked, judgments = case(
        ([5.0, 4.0, 2.0], [0, 1, 2]),  # all three pairs right
        ([5.0, 4.0, 4.0], [1, 0, 2]),  # one right, one wrong, one tied; a 5 that is not people's best
        ([4.0, 4.0], [0, 1]),  # constant: one tied pair
        ([None, 5.0, 3.0], [0, 1, 2]),  # one right pair; people's best has no score
        ([3.0, 4.0], [0, 0]),  # people ordered nothing
    )
    found = judge_quality(ranked, judgments[::-1])
    assert (found["prompts"], found["pairs"]) == (5, 8)
    assert found["scored"] == pytest.approx(12 / 13)
    assert found["accuracy"] == pytest.approx(5 / 8)
    assert found["accuracy_without_ties"] == pytest.approx(5 / 6)
    assert found["tie_share"] == pytest.approx(2 / 8)
    assert found["exact_match"] == pytest.approx(1 / 4)
    assert found["five_best"] == pytest.approx(1 / 3)
    second = ([5, 4, 4], [-1, 0, -2])
    assert found["spearman"] == pytest.approx((1 + stats.spearmanr(*second).statistic + 0 + 1) / 4)
    assert found["kendall"] == pytest.approx((1 + stats.kendalltau(*second).statistic + 0 + 1) / 4)
    assert found["constant_share"] == pytest.approx(1 / 4)


def test_correlations_are_scipys_averaged_over_prompts():
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 6, 5).astype(float).tolist(), rng.permutation(5).tolist()) for _ in range(40)]
    found = judge_quality(*case(*rows))
    pairs = [(scores, [-rank for rank in ranks]) for scores, ranks in rows if len(set(scores)) > 1]
    for name, function in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        total = sum(function(*pair).statistic for pair in pairs)
        assert found[name] == pytest.approx(total / len(rows), abs=1e-12)


def test_judge_that_gives_every_response_the_same_score_has_found_nothing():
    found = judge_quality(*case(*[([4.0] * 4, [0, 1, 2, 3])] * 10))
    assert (found["accuracy"], found["tie_share"], found["exact_match"]) == (0, 1, 0)
    assert (found["spearman"], found["kendall"], found["constant_share"]) == (0, 0, 1)
    assert found["accuracy_without_ties"] is None and found["five_best"] is None


@pytest.mark.parametrize("rows", [[], [([None, None], [0, 1])]], ids=["no rankings", "no score"])
def test_figure_over_nothing_is_none(rows):
    found = judge_quality(*case(*rows))
    names = ("accuracy", "accuracy_without_ties", "tie_share", "five_best", "spearman", "kendall", "constant_share")
    assert [found[name] for name in names] == [None] * len(names)
    assert found["exact_match"] == (0 if rows else None) and found["scored"] == (0 if rows else None)


def test_top_score_is_that_of_the_rubric():
    ranked, judgments = case(([10.0, 5.0], [0, 1]))
    assert judge_quality(ranked, judgments)["five_best"] == 0.5
    assert judge_quality(ranked, judgments, top=10.0)["five_best"] == 1


def test_judgments_that_do_not_fit_are_errors():
    ranked, judgments = case(([1.0, 2.0], [0, 1]))
    with pytest.raises(ValueError, match="0#1 has no judgment"):
        judge_quality(ranked, judgments[:1])
    with pytest.raises(ValueError, match="repeat an id"):
        judge_quality(ranked, judgments * 2)
