"""Judges of every kind: pairs in both orders, rankings, other models, reward models, endpoints, known answers."""

import dataclasses
import itertools
import json
import math
import re

import endpoint_server
import jax
import numpy as np
import pytest
from endpoint_server import replied, serving

import tiny
from jaxsi.runs.records import Prompt, Response
from jaxsi.stages import endpoint_client, judges
from jaxsi.stages.endpoint import EndpointJudge
from jaxsi.stages.endpoint_client import EndpointError
from jaxsi.stages.judge import judge, judge_by, judgment_statistics
from jaxsi.stages.judges import (
    GapsBy,
    JudgeError,
    ModelJudge,
    RewardJudge,
    ScoringBy,
    TargetsBy,
    Verifier,
    rewards_by,
    same_answer,
    side_by_side,
)
from jaxsi.stages.prompts import Rubric
from jaxsi.stages.prompts.comparison import PairwiseRubric, RankingRubric
from jaxsi.stages.prompts.critique import load_critique_template
from jaxsi.stages.prompts.reviser import load_reviser_template
from jaxsi.stages.reviser import ReviseConfig
from jaxsi.stages.verdicts import JudgeConfig, LocalWriter, judged
from jaxsi.training.reward import reward_sequence, rewards, with_scalar_head

KEY = jax.random.key(0)
ONE = JudgeConfig(num_samples=1, max_new_tokens=8)
POINTS = Rubric(name="points", template="Q: {prompt}\nR: {response}\nScore:")
PAIR = PairwiseRubric(name="pair", template="Q: {prompt}\nA: {response_a}\nB: {response_b}\nVerdict:")
RANK = RankingRubric(name="rank", template="Q: {prompt}\n{responses}\nRanking:")
PROMPTS = [Prompt.of("p", "Sort: b a"), Prompt.of("q", "Reverse: c d")]


def answer(prompt_id: str, sample: int, text: str) -> Response:
    return Response.of(f"{prompt_id}#{sample}", prompt_id, sample, text)


def length(prompt: str, response: str) -> float:
    return len(response)


class Scripted:
    """A writer that replies to each request by ``reply(request, sample)``; None: the request is too long."""

    fingerprint, template = "scripted", ""

    def __init__(self, reply):
        self.reply, self.requests = reply, []

    def write(self, requests, cfg, key, num_samples, forced=()):
        self.requests += requests
        written = {}
        for request in requests:
            texts = [self.reply(request.text, k) for k in range(num_samples)]
            if None not in texts:
                written[request.id] = [answer(request.id, k, text) for k, text in enumerate(texts)]
        return written


def sides(request: str) -> tuple[str, str]:
    return re.search(r"A: (.*)\nB: (.*)\nVerdict", request).groups()


def longer_wins(request: str, sample: int) -> str:
    a, b = sides(request)
    return f"Verdict: {'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}"


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_are_asked_in_both_orders():
    writer = Scripted(longer_wins)
    responses = [answer("p", 0, "aa"), answer("p", 1, "aaaa"), answer("p", 2, "aaa"), answer("q", 0, "x")]
    judgments = judged(writer, PROMPTS, responses, PAIR, ONE, KEY)
    assert [j.scores for j in judgments] == [(0.0, 0.0), (1.0, 1.0), (1.0, 0.0), ()]
    assert [j.score for j in judgments] == [0.0, 1.0, 0.5, None]
    asked = {sides(request.text) for request in writer.requests}
    assert asked == set(itertools.permutations(["aa", "aaaa", "aaa"], 2))
    assert judgments[1].texts == ("Verdict: A", "Verdict: A")  # those in which it stood first
    assert judgment_statistics(judgments, PAIR)["parse_rate"] == 1.0  # q#0 has nothing to be compared with
    assert judgment_statistics(judgments, PAIR)["too_long"] == 0
    again = judged(Scripted(longer_wins), PROMPTS[::-1], responses[::-1], PAIR, ONE, KEY)
    assert again[::-1] == judgments


@pytest.mark.parametrize("always", ["A", "B"])
def test_judge_that_goes_by_position_gives_only_ties(always):
    responses = [answer("p", n, "a" * (n + 1)) for n in range(3)]
    judgments = judged(Scripted(lambda request, k: f"Verdict: {always}"), PROMPTS, responses, PAIR, ONE, KEY)
    assert {score for j in judgments for score in j.scores} == {0.5}
    assert judgment_statistics(judgments, PAIR)["alarms"] == ["one_score", "ties"]


def test_compared_texts_have_no_thoughts():
    writer = Scripted(longer_wins)
    responses = [answer("p", 0, "<think>A long thought.</think>a"), answer("p", 1, "aaa")]
    assert [j.score for j in judged(writer, PROMPTS, responses, PAIR, ONE, KEY)] == [0.0, 1.0]
    assert not any("thought" in request.text for request in writer.requests)


def test_half_a_verdict_is_no_comparison_and_equal_texts_are_not_asked():
    writer = Scripted(lambda request, k: "Verdict: A" if request.startswith("Q: Sort: b a\nA: aa") else "Hm.")
    responses = [answer("p", 0, "aa"), answer("p", 1, "b"), answer("p", 2, "b")]
    judgments = judged(writer, PROMPTS, responses, PAIR, ONE, KEY)
    assert [j.scores for j in judgments] == [(None, None), (None, 0.5), (None, 0.5)]
    assert len(writer.requests) == 4
    too_long = judged(Scripted(lambda request, k: None), PROMPTS, responses[:2], PAIR, ONE, KEY)
    assert [(j.scores, j.texts) for j in too_long] == [((None,), ()), ((None,), ())]
    assert judgment_statistics(too_long, PAIR)["too_long"] == 2


def test_each_sample_has_its_own_verdict_in_both_orders():
    writer = Scripted(lambda request, k: longer_wins(request, k) if k == 0 else "Verdict: A")
    two = JudgeConfig(num_samples=2, max_new_tokens=8)
    judgments = judged(writer, PROMPTS, [answer("p", 0, "aa"), answer("p", 1, "a")], PAIR, two, KEY)
    assert [j.scores for j in judgments] == [(1.0, 0.5), (0.0, 0.5)]


def test_histogram_of_comparisons_has_halves():
    responses = [answer("p", 0, "a"), answer("p", 1, "b"), answer("p", 2, "cc")]
    statistics = judgment_statistics(judged(Scripted(longer_wins), PROMPTS, responses, PAIR, ONE, KEY), PAIR)
    assert statistics["histogram"] == pytest.approx({"0": 1 / 3, "0.5": 1 / 3, "1": 1 / 3})


def test_expected_wins_of_a_model_add_up_to_one():
    lm = tiny.make_lm()
    cfg = JudgeConfig(num_samples=2, max_new_tokens=4, expected=True)
    responses = [answer("p", 0, "a b"), answer("p", 1, "b a"), answer("q", 0, "d c"), answer("q", 1, "c")]
    judgments = judge(lm, PROMPTS, responses, PAIR, cfg, KEY)
    scores = np.asarray([j.scores for j in judgments])
    assert ((scores > 0) & (scores < 1) & (scores != 0.5)).all()
    np.testing.assert_allclose(scores[::2] + scores[1::2], 1.0, atol=1e-6)
    with pytest.raises(ValueError, match="ranks, which gives no expected scores"):
        judge(lm, PROMPTS, responses, RANK, cfg, KEY)


# ---- rankings --------------------------------------------------------------------------------------------------------


def by_length(request: str, sample: int) -> str:
    texts = re.findall(r'<response number="\d+">(.*?)</response>', request)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    return "Ranking: " + " > ".join(str(i + 1) for i in order)


def test_rankings_are_of_shuffled_responses():
    responses = [answer("p", n, "a" * (n + 1)) for n in range(4)]
    cfg = JudgeConfig(num_samples=3, max_new_tokens=8)
    writer = Scripted(by_length)
    judgments = judged(writer, PROMPTS, responses, RANK, cfg, KEY)
    assert [j.scores for j in judgments] == [(n / 3,) * 3 for n in range(4)]
    assert len({request.text for request in writer.requests}) == 3  # three orders
    assert judged(Scripted(by_length), PROMPTS, responses[::-1], RANK, cfg, KEY)[::-1] == judgments
    first = judged(Scripted(lambda request, k: "Ranking: 1 > 2 > 3 > 4"), PROMPTS, responses, RANK, cfg, KEY)
    assert len({j.scores for j in first}) > 1 and all(0 <= j.score <= 1 for j in first)  # position, not the response
    [alone] = judged(Scripted(by_length), PROMPTS, responses[:1], RANK, cfg, KEY)
    assert (alone.scores, alone.score) == ((), None)
    none = judged(Scripted(lambda request, k: "Ranking: 1 > 2"), PROMPTS, responses, RANK, cfg, KEY)
    assert {j.scores for j in none} == {(None,) * 3}


# ---- other judges ----------------------------------------------------------------------------------------------------


@pytest.fixture
def models(monkeypatch):
    """The run's model, and two others that judges find under the names "other" and "reward"."""
    reward_lm = with_scalar_head(tiny.make_lm(seed=2))
    reward_lm = dataclasses.replace(reward_lm, weights=reward_lm.weights | {"score": reward_lm.weights["score"] + 0.1})
    found = {"run": tiny.make_lm(), "other": tiny.make_lm(seed=1), "reward": reward_lm}
    monkeypatch.setattr(judges, "placed", lambda model, lm: found[model])
    return found


def test_another_model_judges_in_the_place_of_the_runs_own(models):
    responses = [answer("p", 0, "a b"), answer("q", 0, "d c")]
    cfg = JudgeConfig(num_samples=2, max_new_tokens=4, expected=True)
    judgments = ModelJudge("other")(models["run"], PROMPTS, responses, POINTS, cfg, KEY)
    assert judgments == judge(models["other"], PROMPTS, responses, POINTS, cfg, KEY)
    assert {j.fingerprint for j in judgments} == {models["other"].fingerprint} != {models["run"].fingerprint}
    assert judgments == judged(LocalWriter(models["other"]), PROMPTS, responses, POINTS, cfg, KEY)


def test_reward_model_scores_by_its_reward(models):
    responses = [answer("p", 0, "a b"), answer("q", 0, "cat " * 300), answer("q", 1, "d c")]
    judgments = RewardJudge("reward", batch_size=1)(models["run"], PROMPTS, responses, POINTS, ONE, KEY)
    texts = [
        reward_sequence(models["reward"].tokenizer, PROMPTS[i].messages, responses[j]) for i, j in ((0, 0), (1, 2))
    ]
    expected = rewards(models["reward"], texts)
    assert [judgments[0].score, judgments[2].score] == pytest.approx(expected.tolist())
    assert judgments[1].score is None and judgments[1].texts == ()
    narrow = [dataclasses.replace(j, score=0.1 * n, scores=(0.1 * n,)) for n, j in enumerate(judgments)]
    assert judgment_statistics(narrow, POINTS)["alarms"] == []  # all of them round to 0, and no two are equal


ANSWERS = [
    ("So 40 + 32 = 72 eggs.", "72", True),
    ("... #### 72", "48 / 2 = 24, and 48 + 24 = 72\n#### 72", True),
    ("The answer is \\boxed{1{,}024}.", "\\boxed{1{,}024}", True),
    ("It costs $1,024.00 in all.", "1024", True),
    ("Answer: 1/2", "0.5", True),
    ("The answer is 5, not 6", "5", False),  # two numbers after the marker: no number can be read off
    ("72 apples? No: 71.", "72", False),
    ("Answer: Paris.", "paris", True),
    ("I think it is Rome", "Paris", False),
    ("", "72", False),
    ("-3", "3", False),
    ("I answer step by step. 4 eggs and 3 more: 7.", "7", True),
    ("The answer to the question is simple: 7", "7", True),
    ("**Answer:** Paris", "paris", True),
]


@pytest.mark.parametrize(("response", "known", "same"), ANSWERS)
def test_answers_are_compared_by_value(response, known, same):
    assert same_answer(response, known) is same


def test_verifier_scores_by_known_answers(tmp_path):
    file = tmp_path / "known.jsonl"
    rows = [{"question": "Sort: b a", "gold": "a b"}, {"question": "Reverse: c d", "gold": 3}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verifier = Verifier(str(file), prompt="question", answer="gold")
    responses = [answer("p", 0, "Answer: A b"), answer("p", 1, "b a"), answer("q", 0, "That makes 3.")]
    judgments = verifier(None, PROMPTS, responses, POINTS, ONE, KEY)
    assert [j.score for j in judgments] == [1.0, 0.0, 1.0]
    with pytest.raises(JudgeError, match=r"known\.jsonl has no answer to the prompt 'other'"):
        verifier(None, [Prompt.of("r", "other")], [answer("r", 0, "x")], POINTS, ONE, KEY)
    with pytest.raises(JudgeError, match=r"known\.jsonl:1: no column 'prompt' .*'question', 'gold'"):
        Verifier(str(file))(None, PROMPTS, responses, POINTS, ONE, KEY)


# ---- an endpoint -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="an endpoint needs openai: pip install 'jaxsi[endpoint]'")
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.005)
    monkeypatch.setenv("A_KEY", endpoint_server.KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def make(server, **changes):
        return EndpointJudge(
            base_url=server.url, model="m", cache=str(tmp_path / "c.jsonl"), api_key_variable="A_KEY", retries=1,
            **changes,
        )  # fmt: skip

    return make


def test_endpoint_judges_by_points_pairs_and_ranking(ask):
    responses = [answer("p", 0, "a"), answer("p", 1, "aaa"), answer("q", 0, "x")]
    cfg = JudgeConfig(num_samples=2, temperature=0.7, top_p=0.9, max_new_tokens=50)

    with serving(lambda name, before: replied("<think>Score: 5</think>Good.\nScore: 4")) as server:
        judgments = ask(server)(None, PROMPTS, responses, POINTS, cfg, KEY)
        assert [j.scores for j in judgments] == [(4.0, 4.0)] * 3  # thoughts are not judgments
        assert {(j.fingerprint, j.texts) for j in judgments} == {("m", ("Good.\nScore: 4",) * 2)}
        assert len(server.bodies) == 6  # each request is sent twice
        sent = {(b["temperature"], b["top_p"], b["max_tokens"]) for b in server.bodies}
        assert sent == {(0.7, 0.9, 50)}
        assert ask(server)(None, PROMPTS, responses, POINTS, cfg, KEY) == judgments
        assert len(server.bodies) == 6  # all from the cache
        plain = ask(server, sends_temperature=False)
        plain(None, PROMPTS, responses[:1], POINTS, cfg, KEY)
        assert "temperature" not in server.bodies[-1] and "top_p" not in server.bodies[-1]
        with pytest.raises(EndpointError, match="no expected scores"):
            ask(server)(None, PROMPTS, responses, POINTS, dataclasses.replace(cfg, expected=True), KEY)

    with serving(lambda name, before: replied("Verdict: A")) as server:
        assert [j.score for j in ask(server)(None, PROMPTS, responses, PAIR, cfg, KEY)] == [0.5, 0.5, None]
        assert len(server.bodies) == 4  # two orders, two samples
    with serving(lambda name, before: replied("Ranking: 1 > 2")) as server:
        scores = [j.scores for j in ask(server)(None, PROMPTS, responses[:2], RANK, cfg, KEY)]
        assert [sum(pair) for pair in zip(*scores, strict=True)] == [1.0, 1.0]


def test_refused_and_cut_off_answers_have_no_score(ask):
    with serving(lambda name, before: replied("Score: 4", "length")) as server:
        [cut] = ask(server)(None, PROMPTS, [answer("p", 0, "cut")], POINTS, ONE, KEY)
        server.play = lambda name, before: replied(None, refusal="I may not say Score: 5")
        [refused] = ask(server)(None, PROMPTS, [answer("p", 0, "bad")], POINTS, ONE, KEY)
        server.play = lambda name, before: replied("<think>It may be Score: 5", "stop")
        [thought] = ask(server)(None, PROMPTS, [answer("p", 0, "thought")], POINTS, ONE, KEY)
    assert (cut.score, refused.score, thought.score) == (None, None, None)
    assert (refused.texts, thought.texts) == (("",), ("",))


# ---- in a method's place ---------------------------------------------------------------------------------------------


def test_judges_in_the_places_of_srt_seft_and_pit():
    by_length_of_text = judge_by(length)
    template = load_critique_template()
    drafts = [answer("p", 0, template.marked("aa")), answer("q", 0, template.marked("b"))]
    refined = [dataclasses.replace(drafts[0], text=template.marked("aaaa"))]
    before, after = ScoringBy(judging=by_length_of_text)(PROMPTS, drafts, refined, template)
    assert (before, after) == ([2.0, None], [4.0])

    four = [answer("p", n, "a" * n) for n in range(3)] + [answer("q", 0, "b")]
    four[2] = dataclasses.replace(four[2], finish_reason="length")
    reviser = load_reviser_template()
    chosen = TargetsBy(judging=by_length_of_text)(None, PROMPTS, four, reviser, ReviseConfig(), KEY)
    assert [(r.id, r.label) for r in chosen] == [("p#1", reviser.no), ("q#0", reviser.no)]

    items = [(PROMPTS[0].messages, four[1], "aaaa"), (PROMPTS[1].messages, "bbb", "b"), (PROMPTS[1].messages, "?", "b")]
    gaps, zero = GapsBy(judging=judge_by(no_question))(None, items, "improve")
    assert gaps[:2].tolist() == [-3.0, 2.0] and math.isnan(gaps[2]) and not zero.any()
    with pytest.raises(JudgeError, match="GapsBy needs a judge of another kind"):
        GapsBy(judging=judge)


def no_question(prompt: str, response: str) -> float | None:
    return None if response == "?" else len(response)


def test_reward_of_a_text_is_the_same_in_every_step_and_nan_without_a_score():
    asked = []

    def judging(lm, prompts, responses, rubric, cfg, key):
        asked.append({r.text: (r.id, key) for r in responses})
        return judge_by(lambda prompt, text: None if text == "b a" else len(text))(lm, prompts, responses)

    lm = tiny.make_lm()
    reward = rewards_by(judging, lm, POINTS, ONE)
    first = reward(PROMPTS, [answer("p", 0, "a b"), answer("p", 1, "b a"), answer("q", 0, "d")])
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, [3, math.nan, 1])
    again = reward(PROMPTS, [answer("p", 0, "a"), answer("q", 0, "d")])
    np.testing.assert_array_equal(again, [1, 1])
    before, now = asked
    assert now["d"] == before["d"]  # the id, and the key: the noise is folded from both
    assert now["a"][0] != before["a b"][0], "another text in the same place has other noise"


def test_two_sides_may_be_compared():
    def by_pairs(lm, prompts, responses, rubric, cfg, key):
        return judged(Scripted(longer_wins), prompts, responses, rubric, cfg, key)

    firsts, seconds = side_by_side(by_pairs, None, PROMPTS, ["aa", "b"], ["a", "b"], PAIR, ONE, KEY)
    assert (firsts, seconds) == ([1.0, 0.5], [0.0, 0.5])
    twice, _ = side_by_side(by_pairs, None, [PROMPTS[0]] * 2, ["aa", "aa"], ["a", "a"], PAIR, ONE, KEY)
    assert twice == [1.0, 1.0]  # the same texts again are one question
