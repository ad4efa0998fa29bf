"""CREAM's implicit rewards, and how far two models agree on the order of a prompt's responses."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import kendalltau

import tiny
from jaxsi.runs.records import Judgment, Prompt
from jaxsi.sampling.scoring import score
from jaxsi.stages.answers import answers
from jaxsi.stages.consistency import consistencies, implicit_rewards, judge_rewards, with_agreement
from jaxsi.stages.judge import judge
from jaxsi.stages.prompts import Rubric
from jaxsi.stages.verdicts import JudgeConfig

KEY = jax.random.key(0)
POINTS = Rubric(name="points", template="Q: {prompt}\nR: {response}\nScore:")
JUDGE = JudgeConfig(num_samples=1, max_new_tokens=4, expected=True)
PROMPTS = [Prompt.of("p", "loop tree"), Prompt.of("q", "sun")]
END = tiny.tokenizer().eos_id
RESPONSES = [
    tiny.response(PROMPTS[0], 0, [11, 12, END]),
    tiny.response(PROMPTS[1], 0, [13, END]),
    tiny.response(PROMPTS[0], 1, [14, 15, 16, 17, 18, END]),
    tiny.response(PROMPTS[1], 1, [19, 20], stopped=False),
]
ASKED = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]]


def rewards(lm, reference, reader=implicit_rewards):
    items = answers(PROMPTS, RESPONSES)
    return {j.id: j for j in reader(items, lm, reference, POINTS, JUDGE, KEY)}


def test_reward_is_the_difference_of_two_log_probabilities():
    lm, reference = tiny.make_lm(), tiny.make_lm(seed=1)
    found = rewards(lm, reference)
    expected = score(lm, ASKED, RESPONSES) - score(reference, ASKED, RESPONSES)
    assert [found[r.id].score for r in RESPONSES] == pytest.approx(expected.tolist(), abs=1e-4)
    assert len({j.score for j in found.values()}) == 4
    assert {j.fingerprint for j in found.values()} == {lm.fingerprint} and found["q#1"].prompt_id == "q"
    assert [j.score for j in rewards(lm, lm).values()] == [0.0] * 4


def test_reward_without_a_reference_is_the_mean_of_the_tokens():
    lm = tiny.make_lm()
    found = rewards(lm, None)
    expected = score(lm, ASKED, RESPONSES) / [3, 2, 6, 2]
    assert [found[r.id].score for r in RESPONSES] == pytest.approx(expected.tolist(), abs=1e-5)


def test_reward_may_be_the_models_own_judgment():
    lm = tiny.make_lm()
    found = rewards(lm, tiny.make_lm(seed=1), judge_rewards)
    assert list(found.values()) == judge(
        lm, PROMPTS, [r for a in answers(PROMPTS, RESPONSES) for r in a.responses], POINTS, JUDGE, KEY
    )


# -------------------------------------------------------------------------------------------------------- consistency


def judged(prompt: str, *scores: float | None) -> list[Judgment]:
    return [
        Judgment(id=f"{prompt}#{n}", prompt_id=prompt, scores=(x,), score=x, texts=("",), fingerprint="", template="")
        for n, x in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ((1.0, 2.0, 3.0), (10.0, 20.0, 90.0), 1.0),
        ((1.0, 2.0, 3.0), (3.0, 2.0, 1.0), 0.0),
        ((1.0, 2.0, 3.0), (1.0, 3.0, 2.0), 2 / 3),  # 2 pairs alike, 1 not: tau 1/3
        ((1.0, 2.0, 3.0, 4.0), (1.0, 4.0, 2.0, 3.0), 2 / 3),  # 4 alike, 2 not
        ((1.0, 1.0, 2.0), (1.0, 2.0, 2.0), 0.75),  # 1 alike, one tie in each: tau-b 1/2
        ((1.0, 2.0), (2.0, 1.0), 0.0),
        ((1.0, None, 2.0), (5.0, 7.0, 6.0), 1.0),  # what a model has not scored does not count
        ((1.0, 3.0, 2.0), (5.0, None, 6.0), 1.0),
    ],
)
def test_consistency_by_hand(now, before, expected):
    assert consistencies(judged("p", *now), judged("p", *before)) == {"p": pytest.approx(expected)}


@pytest.mark.parametrize(
    ("now", "before"),
    [
        ((1.0, 1.0, 1.0), (1.0, 2.0, 3.0)),
        ((1.0, 2.0, 3.0), (2.0, 2.0, 2.0)),
        ((1.0,), (1.0,)),
        ((1.0, None), (1.0, 2.0)),
        ((None, None), (None, None)),
    ],
)
def test_prompt_without_an_order_has_no_consistency(now, before):
    assert consistencies(judged("p", *now), judged("p", *before)) == {}


SCORES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=7)


@given(SCORES, st.randoms())
def test_consistency_is_kendalls_tau_of_what_has_the_same_id(scores, shuffle):
    now, before = (judged("p", *map(float, side)) for side in zip(*scores, strict=True))
    expected = kendalltau(*zip(*scores, strict=True)).statistic
    shuffle.shuffle(before)
    found = consistencies(now, before)
    if np.isnan(expected):
        assert found == {}
    else:
        assert found == {"p": pytest.approx((expected + 1) / 2)} and 0 <= found["p"] <= 1


def test_consistency_is_of_each_prompt_whatever_the_order_of_the_records():
    now = judged("p", 1.0, 2.0, 3.0) + judged("q", 1.0, 2.0) + judged("r", 1.0, 1.0)
    before = judged("p", 1.0, 2.0, 3.0) + judged("q", 2.0, 1.0) + judged("r", 1.0, 2.0)
    assert consistencies(now, before[::-1]) == consistencies(now[::-1], before)
    assert consistencies(now, before[::-1]) == {"p": pytest.approx(1.0), "q": 0.0}


def test_pairs_have_the_consistency_of_their_prompt_or_the_mean():
    pairs = [dataclasses.replace(pair, id=id) for pair, id in zip(tiny.preference_pairs(3), "prq", strict=True)]
    found = {"q": 0.2, "other": 0.3, "p": 1.0}  # "other" has no pair, as its rewards tie; "r" has no consistency
    own, counts = with_agreement(pairs, found, per_prompt=True)
    assert [(pair.id, pair.agreement) for pair in own] == [("p", 1.0), ("r", 0.5), ("q", 0.2)]
    assert counts == {"consistency": 0.5}
    alike, counts = with_agreement(pairs, found, per_prompt=False)
    assert [pair.agreement for pair in alike] == [0.5] * 3 and counts == {"consistency": 0.5}
    assert [dataclasses.replace(pair, agreement=1.0) for pair in own] == pairs
    for per_prompt in (True, False):
        sure, counts = with_agreement(pairs, {}, per_prompt=per_prompt)
        assert sure == pairs and counts == {"consistency": None}
