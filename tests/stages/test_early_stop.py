"""Early stopping: win rates, the two rules, and how the judge is asked."""

import logging
import math
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

from jaxsi.runs.records import Prompt, Response
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages import early_stop
from jaxsi.stages.early_stop import EarlyStop, WinRate, does_not_win, is_better, loses, win_rate, win_rate_of
from jaxsi.stages.judge import judge_by
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.prompts.comparison import PairwiseRubric
from jaxsi.stages.verdicts import JudgeConfig, judged

KEY = jax.random.key(0)
JUDGE_LM: Any = SimpleNamespace(fingerprint="f", tokenizer=SimpleNamespace(template_hash="t"))
SAMPLING = SamplingConfig(num_samples=4, temperature=0.7, max_new_tokens=8)
JUDGE = JudgeConfig(num_samples=1, max_new_tokens=8)
PAIR = PairwiseRubric(name="pair", template="Q: {prompt}\nA: {response_a}\nB: {response_b}\nVerdict:")
TEXTS = {"now": ["four four", "b", "same", "long one"], "before": ["one", "a a", "same", "long one two"]}


def prompts() -> list[Prompt]:
    return [Prompt.of(f"p{i}", f"prompt {i}") for i in range(4)]


def rate(wins: int, losses: int, ties: int = 0) -> WinRate:
    found = win_rate_of([1.0] * wins + [0.0] * losses + [0.5] * ties, [0.0] * wins + [1.0] * losses + [0.5] * ties)
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------- rates and rules


@pytest.mark.parametrize(
    ("new", "old", "mean", "prompts"),
    [
        ([2.0, 1.0, 3.0, 3.0], [1.0, 2.0, 3.0, 1.0], 2.5 / 4, 4),
        ([1.0, 1.0], [2.0, 2.0], 0.0, 2),
        ([2.0, None, 1.0], [1.0, 1.0, None], 1.0, 1),  # prompts without both scores are left out
        ([0.0], [0.0], 0.5, 1),
    ],
)
def test_win_rate_by_hand(new, old, mean, prompts):
    found = win_rate_of(new, old)
    assert found is not None and (found.mean, found.prompts) == (mean, prompts)
    assert found.low <= mean <= found.high


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_win_rates_of_the_two_sides_add_up_to_one(scores):
    new, old = (list(map(float, side)) for side in zip(*scores, strict=True))
    ours, theirs = win_rate_of(new, old), win_rate_of(old, new)
    assert ours is not None and theirs is not None and ours.mean + theirs.mean == pytest.approx(1)
    assert not (loses(ours) and loses(theirs)), "both sides cannot be worse"


def test_interval_narrows_with_the_prompts():
    few, many = rate(4, 6), rate(400, 600)
    assert few.mean == many.mean == 0.4 and many.high - many.low < (few.high - few.low) / 5
    error = 1.96 * math.sqrt(0.4 * 0.6 / 1000)
    assert (many.low, many.high) == (pytest.approx(0.4 - error, abs=0.004), pytest.approx(0.4 + error, abs=0.004))


@pytest.mark.parametrize(
    ("found", "by_evidence", "by_the_paper"),
    [
        (rate(0, 0, 253), False, True),  # nothing but ties
        (rate(0, 1, 252), False, True),  # one loss in 253 is none in a third of the samples
        (rate(39, 61), True, True),
        (rate(40, 60), False, True),  # the interval ends at one half; so does a sign test at 5 %
        (rate(48, 52), False, True),
        (rate(52, 48), False, False),
        (rate(0, 10), True, True),
        (rate(10, 0), False, False),
    ],
)
def test_rules_stop_on_evidence_or_as_soon_as_a_model_does_not_win(found, by_evidence, by_the_paper):
    assert (loses(found), does_not_win(found)) == (by_evidence, by_the_paper)


# ------------------------------------------------------------------------------------------------- asking the judge


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The models "now" and "before" respond from TEXTS; the settings of each call."""
    calls: list[dict[str, Any]] = []

    def generate(lm: str, prompts: list[Prompt], **settings: Any) -> list[Response]:
        calls.append(settings)
        return [Response.of(f"{p.id}#0", p.id, 0, text) for p, text in zip(prompts, TEXTS[lm], strict=True)]

    monkeypatch.setattr(early_stop, "generate", generate)
    return calls


def asked(stop: EarlyStop, now: str = "now", before: str = "before") -> WinRate | None:
    models: Any = (JUDGE_LM, now, before)
    return win_rate(stop, *models, SAMPLING, JUDGE, KEY)


def length(prompt: str, response: str) -> float | None:
    return len(response)


def no_score(prompt: str, response: str) -> float | None:
    return None


def longer_wins(lm, prompts, responses, rubric, cfg, key):
    """A judge that writes verdicts, and prefers A among texts of equal length."""
    assert (lm, rubric, cfg) == (JUDGE_LM, PAIR, JUDGE)

    class Writer:
        fingerprint = template = ""

        def write(self, requests, cfg, key, num_samples, forced=()):
            found = {}
            for request in requests:
                a, b = request.text.split("\nA: ")[1].removesuffix("\nVerdict:").split("\nB: ")
                ORDERS.append((a, b))
                verdict = "A" if len(a) >= len(b) else "B"
                found[request.id] = [Response.of(f"{request.id}#0", request.id, 0, f"Verdict: {verdict}")]
            return found

        def expected(self, *_: object):
            raise AssertionError("not asked for")

    return judged(Writer(), prompts, responses, rubric, cfg, key)


ORDERS: list[tuple[str, str]] = []


def test_pairs_are_asked_in_both_orders_and_disagreement_is_a_tie(sampled, monkeypatch):
    ORDERS.clear()
    found = asked(EarlyStop(prompts=prompts, judging=longer_wins, rubric=PAIR))
    both = [(new, old) for new, old in zip(TEXTS["now"], TEXTS["before"], strict=True) if new != old]
    assert sorted(ORDERS) == sorted([*both, *((b, a) for a, b in both)])
    assert found is not None and (found.mean, found.prompts) == ((1 + 0 + 0.5 + 0) / 4, 4)
    monkeypatch.setitem(TEXTS, "before", ["ninechars", "c", "else", "long two"])  # lengths are equal: position decides
    assert asked(EarlyStop(prompts=prompts, judging=longer_wins, rubric=PAIR)) == WinRate(0.5, 0.5, 0.5, 4)


def test_both_models_respond_once_with_the_same_noise(sampled):
    asked(EarlyStop(prompts=prompts, judging=judge_by(length)))
    new, old = sampled
    assert new == old and new["num_samples"] == 1 and new["key"] is KEY
    assert {name: new[name] for name in ("temperature", "max_new_tokens")} == {"temperature": 0.7, "max_new_tokens": 8}


def test_judge_of_its_own_takes_the_place_of_the_models(sampled):
    found = asked(EarlyStop(prompts=prompts, judging=judge_by(length)))
    assert found is not None and found.mean == (1 + 0 + 0.5 + 0) / 4
    back = asked(EarlyStop(prompts=prompts, judging=judge_by(length)), "before", "now")
    assert back is not None and back.mean == 1 - found.mean


def test_default_judge_is_the_given_model_which_compares_and_settings_may_be_its_own(sampled, monkeypatch):
    seen: list[Any] = []

    def judging(lm, prompts, responses, rubric, cfg, key):
        seen.append((lm, rubric, cfg))
        return judge_by(length)(None, prompts, responses)

    own = JudgeConfig(num_samples=5)
    asked(EarlyStop(prompts=prompts, judging=judging))
    asked(EarlyStop(prompts=prompts, judging=judging, judge=own, rubric=load_rubric()))
    [(lm, rubric, cfg), other] = seen
    assert lm is JUDGE_LM and isinstance(rubric, PairwiseRubric) and cfg is JUDGE
    assert other == (JUDGE_LM, load_rubric(), own)
    assert EarlyStop(prompts=prompts).judging is early_stop.judges.judge


def test_prompts_without_a_verdict_do_not_count_and_none_at_all_goes_on(sampled, caplog):
    def first_two(prompt: str, response: str) -> float | None:
        return len(response) if prompt in ("prompt 0", "prompt 1") else None

    found = asked(EarlyStop(prompts=prompts, judging=judge_by(first_two)))
    assert found is not None and (found.mean, found.prompts) == (0.5, 2)
    silent = EarlyStop(prompts=prompts, judging=judge_by(no_score), rule=does_not_win)
    with caplog.at_level(logging.WARNING):
        assert asked(silent) is None and win_rate_of([], []) is None
    assert "no comparison of 4 prompts has a verdict, so nothing stops" in caplog.text
    models: Any = (JUDGE_LM, SAMPLING, JUDGE, KEY, "now", "before")
    assert is_better(silent, *models)


@pytest.mark.parametrize(("rule", "goes_on"), [(loses, True), (does_not_win, False)])
def test_checkpoint_is_better_by_the_rule(sampled, monkeypatch, rule, goes_on):
    monkeypatch.setitem(TEXTS, "before", TEXTS["now"])  # nothing but ties
    models: Any = (JUDGE_LM, SAMPLING, JUDGE, KEY, "now", "before")
    assert is_better(EarlyStop(prompts=prompts, judging=judge_by(length), rule=rule), *models) is goes_on
    monkeypatch.setitem(TEXTS, "before", [text + " longer" for text in TEXTS["now"]])
    assert not is_better(EarlyStop(prompts=prompts, judging=judge_by(length), rule=rule), *models)


def test_interval_is_the_same_each_time():
    assert rate(3, 7) == rate(3, 7) and np.isfinite(rate(3, 7)).all()
