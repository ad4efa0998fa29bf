"""The meta-judge: which judgments compete, how wins are weighed, Elo scores, and what becomes a pair."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import optimize

import tiny
from jaxsi.runs.records import Judgment, Prompt, Response
from jaxsi.stages import meta_judge
from jaxsi.stages.meta_judge import (
    Contest,
    Entry,
    MetaJudgeConfig,
    compare_judgments,
    contests,
    elo,
    judge_pairs,
    matches,
    nearest_to_mean,
    weights,
    wins,
)
from jaxsi.stages.prompts import Rubric
from jaxsi.stages.prompts.comparison import PairwiseRubric
from jaxsi.stages.verdicts import JudgeConfig
from jaxsi.text.chat import render_response
from jaxsi.toyworld.seed_data import tossed

RUBRIC = Rubric(name="test", template="Q: {prompt}\nA: {response}\nScore: <0-5>")
KEY = jax.random.key(0)
PROMPTS = [Prompt.of("p", "why?"), Prompt.of("q", "how?")]


def judged(response: str, *texts: str, scores: tuple[float | None, ...] | None = None) -> Judgment:
    found = scores or tuple(None if (s := RUBRIC.parse(text)) is None else float(s) for text in texts)
    valid = [score for score in found if score is not None]
    mean = sum(valid) / len(valid) if valid else None
    prompt = response.partition("#")[0]
    return Judgment(id=response, prompt_id=prompt, scores=found, score=mean, texts=texts, fingerprint="f", template="t")


def answers(*ids: str) -> list[Response]:
    return [Response.of(id, id.partition("#")[0], int(id.partition("#")[2]), f"answer {id}") for id in ids]


def contest(*scores: float, id: str = "p#0") -> Contest:
    entries = tuple(Entry(n, score, f"sun right {n} Score: {score:g}") for n, score in enumerate(scores))
    return Contest(Prompt.of(id, f"judge {id}"), sum(scores) / len(scores), entries)


def compared(contest: Contest, **scores: float | None) -> list[Judgment]:
    """Comparisons of a contest: m01=1.0 says that judgment 0, which stands first, beats judgment 1."""
    found = []
    for match in matches([contest]):
        score = scores.get(f"m{match.first.number}{match.second.number}", 0.5)
        found.append(
            dataclasses.replace(judged("p#0", "", scores=(score,)), id=match.about.id, prompt_id=match.about.prompt_id)
        )
    return found


DEFAULTS = MetaJudgeConfig()


def pairs_of(found, comparisons, cfg=DEFAULTS, number=1, actor_pairs=1000, seed=0):
    return judge_pairs(found, comparisons, tiny.tokenizer(), cfg, number=number, actor_pairs=actor_pairs, seed=seed)


# ------------------------------------------------------------------------------------------------- what is compared


def test_response_whose_scores_vary_most_is_chosen():
    judgments = [
        judged("p#0", "a Score: 3", "b Score: 3", "c Score: 4"),
        judged("p#1", "a Score: 1", "b Score: 5", "c Score: 5"),
        judged("p#2", "a Score: 5", "b Score: 1", "c Score: 5"),  # as much: the first sample counts
        judged("q#0", "a Score: 3", "a Score: 3", "a Score: 3"),  # one judgment, three times
        judged("q#1", "", "", "", scores=(1.0, 2.0, 3.0)),  # a function judged
    ]
    responses = answers("p#2", "q#1", "p#1", "q#0", "p#0")
    (found,) = contests(PROMPTS, responses, judgments[::-1], RUBRIC)
    assert found.request == Prompt.of("p#1", RUBRIC.render("why?", "answer p#1"))
    assert found.mean == pytest.approx(11 / 3)
    assert [entry.text for entry in found.entries] == ["a Score: 1", "b Score: 5", "c Score: 5"]


def test_malformed_and_equal_judgments_are_left_out_and_texts_end_at_the_verdict():
    texts = ("a Score: 4\nThat is all.", "no verdict", "a Score: 4", "b Score: 9", "c Score: 2")
    judgment = judged("p#0", *texts, scores=(4.0, 3.0, 4.0, None, 2.0))  # 3.0 is an expected score
    (found,) = contests(PROMPTS, answers("p#0"), [judgment], RUBRIC)
    assert found.entries == (Entry(0, 4.0, "a Score: 4"), Entry(4, 2.0, "c Score: 2"))
    unread = judged("p#0", scores=(None, None))  # its prompt was too long for the judge
    assert contests(PROMPTS, answers("p#0"), [unread], RUBRIC) == []
    with pytest.raises(ValueError, match="'p#1' has no judgment"):
        contests(PROMPTS, answers("p#0", "p#1"), [judgment], RUBRIC)


def test_every_two_judgments_meet_in_both_orders():
    met = matches([contest(1, 2, 3), contest(4, 5, id="q#1")])
    names = [match.about.id for match in met]
    assert names == ["p#0@0|1", "p#0@0|2", "p#0@1|0", "p#0@1|2", "p#0@2|0", "p#0@2|1", "q#1@0|1", "q#1@1|0"]
    assert {match.about.prompt_id for match in met} == {"p#0", "q#1"}


# ------------------------------------------------------------------------------------------------------ who compares


class Recorded:
    """A writer that prefers the judgment with the word "good"; it has no room for "long", and says nothing of "odd"."""

    fingerprint, template = "weights", "template"
    requests = ()

    def __init__(self, lm):
        self.lm = lm

    def write(self, requests, cfg, key, num_samples, forced=()):
        Recorded.requests = tuple(requests)
        written = {}
        for request in requests:
            _, a, b = request.text.split("|")
            verdict = "Verdict: A" if "good" in a else "Verdict: B" if "good" in b else "Verdict: C"
            text = "Who knows?" if "odd" in request.text else verdict
            if "long" not in request.text:
                ids = [f"{request.id}#{n}" for n in range(num_samples)]
                written[request.id] = [Response.of(id, request.id, n, text) for n, id in enumerate(ids)]
        return written


def test_model_compares_judgments_and_sees_the_task_of_the_judge(monkeypatch):
    monkeypatch.setattr(meta_judge, "LocalWriter", Recorded)
    rubric = PairwiseRubric(name="meta", template="{prompt}|{response_a}|{response_b}")
    texts = ("good Score: 4", "poor Score: 1", "odd Score: 2", "long Score: 3")
    found = contests(PROMPTS, answers("p#0"), [judged("p#0", *texts)], RUBRIC)
    comparisons = compare_judgments(found, None, rubric, JudgeConfig(num_samples=2), KEY)
    assert Recorded.requests[0].text == f"{RUBRIC.render('why?', 'answer p#0')}|good Score: 4|poor Score: 1"
    by_id = {c.id: c for c in comparisons}
    assert [c.id for c in comparisons] == [m.about.id for m in matches(found)]
    assert by_id["p#0@0|1"].scores == (1.0, 1.0) and by_id["p#0@1|0"].score == 0.0
    assert by_id["p#0@0|2"].score is None and by_id["p#0@0|2"].texts == ("Who knows?",) * 2
    assert by_id["p#0@0|3"].scores == (None, None) and by_id["p#0@0|3"].texts == ()
    assert {(c.prompt_id, c.fingerprint, c.template) for c in comparisons} == {("p#0", "weights", "template")}
    (pair,), counts = pairs_of(found, comparisons)
    assert (pair.chosen.text, pair.rejected.text) == ("good Score: 4", "poor Score: 1")
    assert counts["parse_rate"] == 2 / 12 and counts["no_room"] == 6 and counts["orders_agree"] == 1.0


def test_tiny_model_compares_by_the_expected_verdict():
    rubric = PairwiseRubric(name="meta", template="{prompt} {response_a} {response_b}")
    cfg = JudgeConfig(num_samples=1, expected=True, max_new_tokens=4, batch_size=8)
    found = [contest(4, 1)]
    comparisons = compare_judgments(found, tiny.make_lm(), rubric, cfg, KEY)
    assert len(comparisons) == 2 and all(0 < c.score < 1 for c in comparisons)
    again = compare_judgments([contest(3, 2, id="q#0"), *found], tiny.make_lm(), rubric, cfg, KEY)
    assert [c.id for c in again[2:]] == [c.id for c in comparisons]
    assert [c.texts for c in again[2:]] == [c.texts for c in comparisons]  # whatever else is compared with it


def test_shipped_template_has_the_task_both_judgments_and_the_verdict():
    rubric = MetaJudgeConfig().rubric
    text = rubric.render("TASK", "ONE", "TWO")
    assert text.index("TASK") < text.index("ONE") < text.index("TWO") < text.index("Verdict: A")
    assert "{" not in text and "Verdict: C" not in text  # a meta-judge has to decide


def test_score_nearer_to_the_mean_wins():
    scores = {c.id: c.score for c in nearest_to_mean([contest(1, 3, 5, 4)], None)}  # mean 3.25
    assert scores["p#0@1|0"] == scores["p#0@1|2"] == scores["p#0@1|3"] == scores["p#0@3|2"] == 1.0
    assert scores["p#0@0|1"] == scores["p#0@0|3"] == 0.0
    assert {c.score for c in nearest_to_mean([contest(2, 4)], None)} == {0.5}


def test_coin_of_the_control_is_fair_and_depends_on_nothing_but_the_match_and_the_key():
    many = [contest(1, 2, 3, id=f"p#{n}") for n in range(200)]
    first = tossed(many, None, None, None, KEY)
    assert {c.score for c in first} == {0.0, 1.0}
    assert np.mean([c.score for c in first]) == pytest.approx(0.5, abs=0.06)  # 4 standard errors of 1,200 tosses
    assert tossed(many[7:8], None, None, None, KEY) == first[42:48]
    assert tossed(many, None, None, None, jax.random.key(1)) != first


# -------------------------------------------------------------------------------------------------- from wins to Elo


def test_weights_make_both_places_count_the_same():
    """Three wins in first place and one in second: a win in first place counts 1/4, one in second 3/4."""
    assert weights([1.0, 1.0, 0.0, 1.0]) == (0.25, 0.75)
    assert weights([0.5, 0.5]) == weights([]) == (0.5, 0.5)
    assert weights([1.0, 1.0]) == (0.0, 1.0)


def test_wins_are_weighted_by_place():
    found = contest(1, 2, 3)
    scores = {c.id: c.score for c in compared(found, m01=1.0, m10=0.0, m02=1.0, m20=1.0, m12=None, m21=0.8)}
    expected = [[0, 0.25 + 0.75, 0.25], [0, 0, 0.75 * 0.2], [0.25, 0.25 * 0.8, 0]]
    np.testing.assert_allclose(wins(found, scores, (0.25, 0.75)), expected)


def test_meta_judge_that_always_prefers_the_first_says_nothing():
    found = contest(1, 2, 3)
    comparisons = compared(found, **{f"m{a}{b}": 1.0 for a, b in itertools.permutations(range(3), 2)})
    pairs, counts = pairs_of([found], comparisons)
    assert pairs == [] and counts["ties"] == 1
    assert (counts["position_bias"], counts["orders_agree"], counts["prefers_higher"]) == (1.0, 0.0, 0.5)


def most_likely(matrix: np.ndarray, prior: float) -> np.ndarray:
    """By brute force: the scores in nats, mean 0, under which the wins are most likely."""
    n = len(matrix)

    def loss(free):
        e = np.asarray([*free, 0.0])
        margins = e[:, None] - e[None, :]
        return ((matrix + prior * (1 - np.eye(n))) * np.logaddexp(0.0, -margins)).sum()

    best = optimize.minimize(loss, np.zeros(n - 1), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    e = np.asarray([*best.x, 0.0])
    return e - e.mean()


@pytest.mark.parametrize(
    "matrix",
    [
        [[0, 1, 2], [0.5, 0, 1], [0.25, 1.5, 0]],
        [[0, 1, 1], [0, 0, 1], [0, 0, 0]],  # the first wins always, the last never
        [[0, 0.3, 0], [0.7, 0, 0], [0, 0, 0]],  # the last was never compared
    ],
)
def test_elo_is_the_maximum_likelihood(matrix):
    matrix = np.asarray(matrix, float)
    for prior in (0.05, 0.5):
        nats = elo(matrix, prior) * math.log(10) / 400
        np.testing.assert_allclose(nats, most_likely(matrix, prior), atol=1e-5)


def test_elo_scale_is_that_of_chess():
    points = elo(np.asarray([[0.0, 10.0], [1.0, 0.0]]), prior=0.0)
    assert points[0] - points[1] == pytest.approx(400) and points.sum() == pytest.approx(0)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(2, 6))
def test_elo_of_whole_tournaments_orders_by_wins_and_is_always_finite(data, n):
    """If any two meet equally often, the order is that of the wins: a property of the Bradley-Terry model."""
    matrix = np.zeros((n, n))
    for a, b in itertools.combinations(range(n), 2):
        matrix[a, b] = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
        matrix[b, a] = 1.0 - matrix[a, b]
    points, total = elo(matrix), matrix.sum(axis=1)
    assert np.isfinite(points).all() and points.mean() == pytest.approx(0, abs=1e-6)
    for a, b in itertools.combinations(range(n), 2):
        if total[a] == total[b]:
            assert points[a] == pytest.approx(points[b], abs=meta_judge.SAME / 10)
        else:
            assert (points[a] > points[b]) == (total[a] > total[b])
    order = np.asarray(data.draw(st.permutations(range(n))))
    np.testing.assert_allclose(elo(matrix[np.ix_(order, order)]), points[order], atol=1e-6)


# ------------------------------------------------------------------------------------------------------- the pairs


def test_pair_is_the_best_judgment_over_the_worst_as_answers_to_the_judges_prompt():
    found = contest(5, 3, 4)
    comparisons = nearest_to_mean([found], None)  # mean 4: the last is nearest, the others are equally far
    (pair,), counts = pairs_of([found], comparisons[::-1])
    assert pair.messages == found.request.messages and pair.id == "judge p#0"
    assert (pair.chosen.text, pair.rejected.text) == (found.entries[2].text, found.entries[0].text)
    assert pair.chosen.token_ids == tuple(render_response(tiny.tokenizer(), found.entries[2].text))
    assert pair.chosen_score > 0 > pair.rejected_score and pair.chosen.id != pair.rejected.id
    assert (counts["contests"], counts["comparisons"], counts["pairs"], counts["ties"]) == (1, 6, 1, 0)
    assert (counts["chosen_score"], counts["rejected_score"]) == (4.0, 5.0)
    assert (counts["position_bias"], counts["orders_agree"], counts["parse_rate"]) == (0.5, 1.0, 1.0)
    assert counts["prefers_higher"] == pytest.approx((0 + 1 + 0.5) / 3)


def test_ties_have_no_pair():
    """One beats two, two beats three, three beats one: nobody is best."""
    found = contest(1, 2, 3)
    comparisons = compared(found, m01=1.0, m10=0.0, m12=1.0, m21=0.0, m20=1.0, m02=0.0)
    assert pairs_of([found], comparisons)[1]["ties"] == 1
    assert pairs_of([contest(2, 4)], nearest_to_mean([contest(2, 4)], None))[1]["ties"] == 1


def test_chosen_judgment_may_not_be_longer_than_the_limit_of_its_round():
    found = contest(1, 3, 3)
    comparisons, length = nearest_to_mean([found], None), len(found.entries[1].text)
    cfg = MetaJudgeConfig(max_characters=(length, length - 1))
    kept = [len(pairs_of([found], comparisons, cfg, number)[0]) for number in (1, 2, 3)]
    assert kept == [1, 0, 0]  # the last limit holds for later rounds, too
    assert pairs_of([found], comparisons, cfg, 2)[1]["too_long"] == 1


def test_share_of_the_judge_is_kept_and_drawn_by_id():
    many = [contest(1, 3, 3, id=f"p#{n}") for n in range(50)]
    comparisons = nearest_to_mean(many, None)
    for actor, most in ((17, 3), (16, 2), (5, 0), (0, 0), (1000, 50)):  # 3 of 20 are 15 %
        pairs, counts = pairs_of(many, comparisons, actor_pairs=actor)
        assert len(pairs) == counts["pairs"] == most and counts["thinned"] == 50 - most
        assert most == 50 or most <= 0.15 * (actor + most) < most + 1
    ids = [pair.id for pair in pairs_of(many, comparisons, actor_pairs=40)[0]]
    assert ids != [f"judge p#{n}" for n in range(len(ids))]  # not the first ones
    backwards = [pair.id for pair in pairs_of(many[::-1], comparisons, actor_pairs=40)[0]]
    assert backwards == ids[::-1]
    assert [pair.id for pair in pairs_of(many, comparisons, actor_pairs=40, seed=1)[0]] != ids


def test_prompts_without_contests_are_no_error():
    pairs, counts = pairs_of([], [])
    assert pairs == [] and counts["parse_rate"] is counts["position_bias"] is counts["chosen_score"] is None


def test_missing_and_unreadable_comparisons_are_errors():
    found = contest(1, 3, 3)
    with pytest.raises(ValueError, match=r"5 comparisons are missing, the first is 'p#0@0\|2'"):
        pairs_of([found], nearest_to_mean([found], None)[:1])
    unread = [dataclasses.replace(c, score=None) for c in nearest_to_mean([found], None)]
    with pytest.raises(ValueError, match=r"0\.0% of the meta-judge's comparisons have a verdict, fewer than"):
        pairs_of([found], unread)


@pytest.mark.parametrize(
    "fields", [{"judge_share": 0.0}, {"judge_share": 1.0}, {"judge_share": math.nan}, {"judge_iterations": -1},
               {"max_characters": (0,)}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        MetaJudgeConfig(**fields)
