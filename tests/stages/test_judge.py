"""The judge with recorded texts in place of a model: joins, invalid judgments, expected scores, statistics."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxsi.lm import LM
from jaxsi.model import decoder, mesh
from jaxsi.runs.records import Judgment, Prompt, Response
from jaxsi.sampling import generate, scoring
from jaxsi.stages.judge import Comparison, JudgeConfig, check_judge, compare, judge, judgment_statistics
from jaxsi.stages.prompts import Rubric
from jaxsi.text.tokenizer import Tokenizer, load_tokenizer
from jaxsi.toyworld.vocabulary import ENTRIES, build_tokenizer

RUBRIC = Rubric(name="test", template="Q: {prompt}\nA: {response}\nReason, then Score: <0-5>")


class CharTokenizer(Tokenizer):
    """One id per character; 0 ends a text. A stand-in for tests in which only lengths and ids count."""

    opens_thought = False

    def __init__(self):
        self.template_hash = "template"

    def encode_text(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


@pytest.fixture
def lm(monkeypatch):
    def render(tokenizer, messages):
        return tokenizer.encode_text("".join(message["content"] for message in messages))

    monkeypatch.setattr("jaxsi.stages.verdicts.render_prompt", render)
    monkeypatch.setattr("jaxsi.text.chat.render_prompt", render)
    lm = object.__new__(LM)
    lm.__dict__.update(config=SimpleNamespace(max_positions=400), tokenizer=CharTokenizer(), fingerprint="weights")
    return lm


def recorded(monkeypatch, texts_by_prompt, cut_off=()):
    """Makes `generate` return texts_by_prompt[prompt id], in a shuffled order; returns the list of its calls."""
    calls = []

    def fake_generate(lm, prompts, *, num_samples, temperature, top_p, max_new_tokens, key, batch_size):
        calls.append(
            SimpleNamespace(
                prompts=list(prompts), num_samples=num_samples, temperature=temperature, max_new_tokens=max_new_tokens
            )
        )
        samples = [
            Response(
                id=f"{prompt.id}#{n}",
                prompt_id=prompt.id,
                sample=n,
                text=texts_by_prompt[prompt.id][n],
                token_ids=tuple(map(ord, texts_by_prompt[prompt.id][n])),
                logps=(0.0,) * len(texts_by_prompt[prompt.id][n]),
                finish_reason="length" if texts_by_prompt[prompt.id][n] in cut_off else "stop",
                fingerprint="weights",
                template="template",
            )
            for prompt in prompts
            for n in range(num_samples)
        ]
        return samples[::-1]  # joins must not rely on the order

    monkeypatch.setattr(generate, "generate", fake_generate)
    return calls


def answer(prompt_id, sample, text="an answer"):
    return Response(
        id=f"{prompt_id}#{sample}",
        prompt_id=prompt_id,
        sample=sample,
        text=text,
        token_ids=(1,),
        logps=(0.0,),
        finish_reason="stop",
        fingerprint="policy",
        template="template",
    )


PROMPTS = [Prompt.of("p", "why?"), Prompt.of("q", "how?")]
KEY = jax.random.key(0)


def test_scores_are_parsed_from_generated_text_and_averaged_over_the_valid(lm, monkeypatch):
    texts = {
        "p#0": ["Good. Score: 4", "Fine. Score: 5", "Hm."],
        "p#1": ["Score: 10", "", "Score:"],
        "q#0": ["x Score: 0", "x Score: 1", "x Score: 1"],
    }
    calls = recorded(monkeypatch, texts, cut_off={"Score:"})
    responses = [answer("q", 0), answer("p", 0, "Score: 5"), answer("p", 1, "Score: 5")]
    judgments = judge(lm, PROMPTS, responses, RUBRIC, JudgeConfig(), KEY)
    assert [j.id for j in judgments] == ["q#0", "p#0", "p#1"] and [j.prompt_id for j in judgments] == ["q", "p", "p"]
    assert [j.scores for j in judgments] == [(0, 1, 1), (4, 5, None), (None, None, None)]
    assert [j.score for j in judgments] == [2 / 3, 4.5, None]
    assert all(
        type(score) is float for j in judgments for score in j.scores if score is not None
    )  # as they are read back
    assert [j.texts for j in judgments] == [tuple(texts[j.id]) for j in judgments]
    assert {(j.fingerprint, j.template) for j in judgments} == {("weights", "template")}
    (call,) = calls
    assert call.num_samples == 3 and call.temperature == 0.7 and call.max_new_tokens == 256
    assert {p.id: p.text for p in call.prompts}["p#0"] == "Q: why?\nA: Score: 5\nReason, then Score: <0-5>"


def test_permuted_responses_give_the_same_judgments(lm, monkeypatch):
    responses = [answer(p, n) for p in "pq" for n in range(3)]
    recorded(monkeypatch, {r.id: [f"Score: {i % 6}"] for i, r in enumerate(responses)})
    cfg = JudgeConfig(num_samples=1)
    forwards = judge(lm, PROMPTS, responses, RUBRIC, cfg, KEY)
    backwards = judge(lm, PROMPTS[::-1], responses[::-1], RUBRIC, cfg, KEY)
    assert forwards == backwards[::-1]
    assert [j.id for j in forwards] == [r.id for r in responses]


def each_choice(score):
    """A stand-in for scoring.score_choices that asks `score` about one continuation at a time."""

    def score_choices(lm, prefixes, choices, *, batch_size):
        flat = [prefix for prefix, ends in zip(prefixes, choices, strict=True) for _ in ends]
        return score(lm, flat, [end for ends in choices for end in ends]).reshape(len(prefixes), -1)

    return score_choices


@pytest.mark.parametrize("expected", [False, True])
def test_judge_prompt_that_does_not_fit_is_invalid_and_not_cut(lm, monkeypatch, expected):
    calls = recorded(monkeypatch, {"p#0": ["Score: 3"] * 2})

    def zeros(lm, prefixes, ends):
        return np.zeros(len(prefixes), np.float32)

    monkeypatch.setattr(scoring, "score_choices", each_choice(zeros))
    cfg = JudgeConfig(num_samples=2, max_new_tokens=100, expected=expected)
    short, long = judge(lm, PROMPTS, [answer("p", 0), answer("p", 1, "x" * 300)], RUBRIC, cfg, KEY)
    assert short.score is not None
    assert (long.scores, long.score, long.texts) == ((None, None), None, ())
    assert [p.id for call in calls for p in call.prompts] == ["p#0"]
    assert judgment_statistics([short, long], RUBRIC)["too_long"] == 1


def test_limit_counts_prompt_and_new_tokens(lm, monkeypatch):
    recorded(monkeypatch, {"p#0": ["Score: 3"], "p#1": ["Score: 3"]})
    fixed = len(RUBRIC.render("why?", ""))
    fits = answer("p", 0, "x" * (400 - 100 - fixed))
    too_long = answer("p", 1, fits.text + "x")
    cfg = JudgeConfig(num_samples=1, max_new_tokens=100)
    assert [j.score for j in judge(lm, PROMPTS, [fits, too_long], RUBRIC, cfg, KEY)] == [3, None]


def test_judge_accepts_no_fitting_and_no_responses(lm, monkeypatch):
    calls = recorded(monkeypatch, {})
    assert judge(lm, PROMPTS, [], RUBRIC, JudgeConfig(), KEY) == []
    (only,) = judge(lm, PROMPTS, [answer("p", 0, "x" * 500)], RUBRIC, JudgeConfig(expected=True), KEY)
    assert only.score is None and calls == []


def test_unknown_prompt_and_repeated_id_are_refused(lm):
    with pytest.raises(ValueError, match="'r#0' answers prompt 'r'"):
        judge(lm, PROMPTS, [answer("r", 0)], RUBRIC, JudgeConfig(), KEY)
    with pytest.raises(ValueError, match="two responses have the id 'p#0'"):
        judge(lm, PROMPTS, [answer("p", 0), answer("p", 0)], RUBRIC, JudgeConfig(), KEY)


def test_missing_judgment_is_an_error(lm, monkeypatch):
    recorded(monkeypatch, {"p#0": ["Score: 1", "Score: 2"]})
    complete = generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args, **kwargs: complete(*args, **kwargs)[1:])
    with pytest.raises(AssertionError, match="'p#0'"):
        judge(lm, PROMPTS, [answer("p", 0)], RUBRIC, JudgeConfig(num_samples=2), KEY)


def test_expected_score_follows_the_justification(lm, monkeypatch):
    recorded(monkeypatch, {"p#0": ["Good. Score: 4", "no verdict"], "q#0": ["", "Bad. Score: n/a"]})
    seen = []

    def score(lm, prefixes, continuations):
        seen.extend(
            (lm.tokenizer.decode(a), lm.tokenizer.decode(b)) for a, b in zip(prefixes, continuations, strict=True)
        )
        wanted = {"Good. Score: ": 4, "no verdict\nScore: ": 1, "Score: ": 0, "Bad. Score: ": 5}
        rows = []
        for prefix, continuation in seen:
            justification = prefix.removeprefix(RUBRIC.render("why?", "an answer")).removeprefix(
                RUBRIC.render("how?", "an answer")
            )
            rows.append(math.log(0.75 if int(continuation) == wanted[justification] else 0.05) - 7.0)
        return np.asarray(rows, np.float32)

    monkeypatch.setattr(scoring, "score_choices", each_choice(score))
    cfg = JudgeConfig(num_samples=2, max_new_tokens=64, expected=True)
    p, q = judge(lm, PROMPTS, [answer("p", 0), answer("q", 0)], RUBRIC, cfg, KEY)

    def mean(favourite):
        return 0.05 * 15 + 0.7 * favourite

    assert p.scores == pytest.approx((mean(4), mean(1)), abs=1e-5)
    assert q.scores == pytest.approx((mean(0), mean(5)), abs=1e-5)
    assert p.score == pytest.approx((mean(4) + mean(1)) / 2, abs=1e-5)
    assert [continuation for _, continuation in seen] == list("012345") * 4
    assert p.texts == ("Good. Score: 4", "no verdict")


def test_expected_score_of_text_that_grows_when_read_again_stays_in_the_context(lm, monkeypatch):
    recorded(monkeypatch, {"p#0": ["\ufffd" * 500]})  # as a byte-level model of random weights may write
    longest = []

    def score(lm, prefixes, continuations):
        longest.append(max(len(a) + len(b) for a, b in zip(prefixes, continuations, strict=True)))
        assert [lm.tokenizer.decode(prefix)[-8:] for prefix in prefixes] == ["\nScore: "] * 6
        return np.zeros(len(prefixes), np.float32)

    monkeypatch.setattr(scoring, "score_choices", each_choice(score))
    cfg = JudgeConfig(num_samples=1, max_new_tokens=200, expected=True)
    (judgment,) = judge(lm, PROMPTS, [answer("p", 0)], RUBRIC, cfg, KEY)
    assert judgment.score == pytest.approx(2.5) and max(longest) <= 400


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_expected_score_without_probabilities_is_invalid(lm, monkeypatch, bad):
    recorded(monkeypatch, {"p#0": ["x"]})

    def full(lm, prefixes, ends):
        return np.full(len(prefixes), bad, np.float32)

    monkeypatch.setattr(scoring, "score_choices", each_choice(full))
    (judgment,) = judge(lm, PROMPTS, [answer("p", 0)], RUBRIC, JudgeConfig(num_samples=1, expected=True), KEY)
    assert judgment.scores == (None,) and judgment.score is None


def test_expected_score_refuses_score_strings_that_are_prefixes(lm, monkeypatch):
    recorded(monkeypatch, {"p#0": ["x"]})
    ten = dataclasses.replace(RUBRIC, high=10)
    with pytest.raises(ValueError, match="is a prefix of another"):
        judge(lm, PROMPTS, [answer("p", 0)], ten, JudgeConfig(num_samples=1, expected=True), KEY)


def judgment(prompt_id, sample, *whole, texts=None):
    scores = tuple(None if s is None else float(s) for s in whole)
    valid = [s for s in scores if s is not None]
    return Judgment(
        id=f"{prompt_id}#{sample}",
        prompt_id=prompt_id,
        scores=scores,
        score=sum(valid) / len(valid) if valid else None,
        texts=("x",) * len(scores) if texts is None else texts,
        fingerprint="weights",
        template="template",
    )


def test_statistics():
    judgments = [
        judgment("a", 0, 4, 4),
        judgment("a", 1, 4, 4),
        judgment("b", 0, 1, None),
        judgment("b", 1, 3, 4),
        judgment("c", 0, 2, 2),
        judgment("c", 1, None, None, texts=()),
    ]
    stats = judgment_statistics(judgments, RUBRIC)
    assert stats["judged"] == 6 and stats["unscored"] == 1 and stats["too_long"] == 1
    assert stats["parse_rate"] == 9 / 12 and stats["tie_rate"] == 1 / 2
    assert stats["histogram"] == {"0": 0.0, "1": 1 / 9, "2": 2 / 9, "3": 1 / 9, "4": 5 / 9, "5": 0.0}
    shares = np.array([1, 2, 1, 5]) / 9
    assert stats["entropy"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert stats["mean"] == pytest.approx(np.mean([4, 4, 1, 3.5, 2])) and stats["alarms"] == []


def test_alarms():
    always_five = [judgment(p, n, 5, 5) for p in "ab" for n in range(2)]
    assert judgment_statistics(always_five, RUBRIC)["alarms"] == ["one_score", "ties"]
    assert judgment_statistics(always_five, RUBRIC)["entropy"] == 0.0
    silent = [judgment("a", n, None, None) for n in range(2)]
    stats = judgment_statistics(silent, RUBRIC)
    assert stats["alarms"] == ["parse_rate"] and stats["mean"] is None and stats["tie_rate"] is None
    assert judgment_statistics([], RUBRIC)["parse_rate"] is None


def test_compare_by_prompt():
    a = [judgment("p", 0, 4), judgment("p", 1, 2), judgment("q", 0, 1), judgment("r", 0, 5), judgment("s", 0, None)]
    b = [judgment("s", 0, 5), judgment("r", 0, 5), judgment("q", 0, 2), judgment("p", 0, 2)]
    found = compare(a, b)
    assert found == Comparison(wins=1, losses=1, ties=1, invalid=1) and found.win_rate == 0.5
    assert compare(b, a) == Comparison(wins=1, losses=1, ties=1, invalid=1)
    assert compare([], []).win_rate is None
    with pytest.raises(ValueError, match="'s'"):
        compare(a, b[1:])


@pytest.mark.parametrize(
    "fields", [{"num_samples": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"min_parse_rate": 10}]
)
def test_config_rejects_settings_out_of_range(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        JudgeConfig(**fields)


@pytest.mark.slow
def test_random_weights_can_judge_by_the_expected_score(tmp_path):
    build_tokenizer(tmp_path)
    config = decoder.ModelConfig(
        family="llama",
        vocab_size=ENTRIES,
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=32,
        max_positions=128,
    )
    devices = mesh.make_mesh(devices=jax.devices()[:1])
    weights = decoder.initialise(config, devices, jax.random.key(0))
    tokenizer = load_tokenizer(tmp_path)
    lm = LM(config=config, weights=weights, tokenizer=tokenizer, mesh=devices, dtype=jax.numpy.float32)
    responses = [answer(p, 0, "sun Score: 5") for p in "pq"]
    prompts = [Prompt.of("p", "Reverse: sun cat"), Prompt.of("q", "Sort: sun cat")]
    cfg = JudgeConfig(num_samples=2, max_new_tokens=8, expected=True)
    judgments = judge(lm, prompts, responses, RUBRIC, cfg, KEY)
    assert all(0.0 < score < 5.0 for j in judgments for score in j.scores)
    assert len({score for j in judgments for score in j.scores}) == 4


def test_low_parse_rate_stops_the_method(caplog):
    silent = [judgment("p", n, None, None, 3 if n == 0 else None) for n in range(4)]
    statistics = judgment_statistics(silent, RUBRIC)
    with pytest.raises(ValueError, match=r"8.3% of the judgments have a score.*min_parse_rate = 10.0%"):
        check_judge(statistics, JudgeConfig())
    assert "alarm: only 8 % of the judge's texts have a score that can be read" in caplog.text
    assert "{" not in caplog.text
    check_judge(statistics, JudgeConfig(min_parse_rate=0.05))


def test_statistics_cover_the_range_of_the_rubric():
    statistics = judgment_statistics([judgment("p", n, n) for n in range(6, 11)], dataclasses.replace(RUBRIC, high=10))
    assert statistics["histogram"]["10"] == statistics["histogram"]["6"] == 0.2 and not statistics["alarms"]
