"""Improvement at inference time: what each method keeps, accepts and rejects, when it ends, and what it counts."""

import dataclasses
import functools
import math

import jax
import pytest

import jaxsi
import tiny
from jaxsi.lm import LM
from jaxsi.runs.records import Critique, Improvement, Judgment, Prompt, Response, Revision, read_jsonl, write_jsonl
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages import judges
from jaxsi.stages.critique import CritiqueConfig, marked_response
from jaxsi.stages.improve import best_of_n, pit, rounds, seft, self_refine, srt
from jaxsi.stages.improve.rounds import Method, Scored, improve, next_record, round_statistics
from jaxsi.stages.judge import JudgeConfig, judge
from jaxsi.stages.judges import RewardJudge
from jaxsi.stages.prompts.reviser import ReviserTemplate
from jaxsi.stages.prompts.self_refine import SelfRefineTemplate
from jaxsi.stages.reviser import ReviseConfig, label_probs
from jaxsi.toyworld.corpus import RUBRIC
from jaxsi.toyworld.critic import TEMPLATE
from jaxsi.training.reward import RewardError, reward_sequence, rewards, with_scalar_head

PROMPTS = [Prompt.of(f"p{i}", f"Reverse: {word} red axe") for i, word in enumerate(("cat", "dog", "egg", "saw"))]
LONG = Prompt.of("long", "cat " * 300)
SAMPLING = SamplingConfig(num_samples=1, temperature=1.0, top_p=1.0, max_new_tokens=8, batch_size=1, dtype="float32")
TWO_SAMPLES = dataclasses.replace(SAMPLING, num_samples=2)
REVISER = ReviserTemplate(
    name="test", template="Check each item:", warm_up="Check each item:", labels=("wrong", "bad", "good"), separator=" "
)
REFINE = SelfRefineTemplate(feedback="What is wrong?\nGood", refine="Again:", enough="Good")
GREEDY = CritiqueConfig(max_new_tokens=16, batch_size=1)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.make_lm()


def response(prompt_id: str, text: str, finish: str = "stop", sample: int = 0) -> Response:
    return Response(
        id=f"{prompt_id}#{sample}",
        prompt_id=prompt_id,
        sample=sample,
        text=text,
        token_ids=tuple(tiny.tokenizer().encode_text(text)),
        logps=(),
        finish_reason=finish,
        fingerprint="f",
        template="t",
    )


def record(prompt: Prompt, text: str, **changes) -> Improvement:
    values = {"round": 0, "outcome": "draft", "score": None, "quality": None, "feedback": None, "tokens": 1} | changes
    id = f"{prompt.id}@{values['round']}"
    return Improvement(id=id, prompt_id=prompt.id, response=response(prompt.id, text), **values)


def drafting(texts: list[str]):
    """Round 0 with these texts in place of samples."""
    return lambda prompts, key: [record(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def outcomes(records: list[Improvement]) -> list[str]:
    return [record.outcome for record in records]


def plant(monkeypatch, module, answers: dict[str, list[Response | str]]) -> list[Prompt]:
    """Replaces ``generate`` by one that returns the answers of each prompt, one after the other. The list returned
    fills with the prompts it gets."""
    seen: list[Prompt] = []

    def generate(lm, prompts, *, num_samples=1, **settings):
        seen.extend(prompts)
        samples = [(p.id, answers[p.id].pop(0), n) for p in prompts for n in range(num_samples)]
        return [
            dataclasses.replace(answer, id=f"{id}#{n}", sample=n)
            if isinstance(answer, Response)
            else response(id, answer, sample=n)
            for id, answer, n in samples
        ]

    monkeypatch.setattr(module, "generate", generate)
    return seen


# ------------------------------------------------------------------------------------------------------------- the loop


def test_improvement_records_survive_a_round_trip(tmp_path):
    records = [
        record(PROMPTS[0], "cat.", score=math.pi, quality=1e-300, feedback="\u2028 “é”", tokens=0),
        record(PROMPTS[1], "", round=2, outcome="no response", score=None),
    ]
    write_jsonl(tmp_path / "records.jsonl", records)
    assert read_jsonl(tmp_path / "records.jsonl", Improvement) == records


def test_prompt_ends_after_a_round_that_does_not_improve_it():
    turns = {"p0": ["accepted", "kept"], "p1": ["rejected"], "p2": ["accepted", "accepted"]}
    active = []

    def one_round(items, key):
        active.append([prompt.id for prompt, _ in items])
        records = []
        for prompt, past in items:
            outcome = turns[prompt.id].pop(0)
            new = response(prompt.id, "new.") if outcome == "accepted" else None
            records.append(next_record(past, outcome, 1.0, response=new))
        return records

    graded = []

    def grade(prompts, responses, key):
        graded.append([r.text for r in responses])
        return [Scored(float(len(r.text)), 0) for r in responses]

    results = improve(PROMPTS[:3], Method(drafting(["a.", "b.", "c."]), one_round), rounds=2, grade=grade)
    assert active == [["p0", "p1", "p2"], ["p0", "p2"]]
    assert outcomes(results[0]) == ["draft"] * 3
    assert outcomes(results[1]) == ["accepted", "rejected", "accepted"]
    assert outcomes(results[2]) == ["kept", "ended", "accepted"]
    assert [r.response.text for r in results[2]] == ["new.", "b.", "new."]
    assert [r.quality for r in results[2]] == [4.0, 2.0, 4.0], "the quality of the current response"
    assert graded == [["a.", "b.", "c."], ["new.", "new."], ["new."]], "each response is graded once"
    assert [r.id for r in results[2]] == ["p0@2", "p1@2", "p2@2"]


def test_prompt_longer_than_the_context_is_counted_and_ends(lm):
    active = []

    def one_round(items, key):
        active.extend(prompt.id for prompt, _ in items)
        return [next_record(past, "kept", None) for _, past in items]

    drafts, results = improve([PROMPTS[0], LONG], Method(rounds.drafter(lm, SAMPLING), one_round), rounds=1)
    assert outcomes(drafts) == ["draft", "too long"] and outcomes(results) == ["kept", "ended"]
    assert active == ["p0"] and drafts[1].response.text == "" and drafts[1].tokens == 0
    figures = round_statistics(drafts)
    assert figures["outcomes"] == {"draft": 1, "too long": 1} and figures["prompts"] == 2
    assert figures["mean_length"] == len(drafts[0].response.token_ids) == figures["tokens"]
    assert figures["quality"] is None and figures["mean_score"] is None
    assert outcomes(improve([LONG], best_of_n.best_of_n(lm, TWO_SAMPLES, by_length))[1]) == ["ended"]


def test_improve_takes_plain_texts(lm):
    method = Method(rounds.drafter(lm, SAMPLING), lambda items, key: [])
    (drafts,) = jaxsi.improve(["Reverse: cat red"], method, rounds=0)
    assert [(draft.id, draft.outcome) for draft in drafts] == [("0@0", "draft")]


def test_improve_rejects_duplicate_prompts():
    with pytest.raises(ValueError, match="same id"):
        improve([PROMPTS[0], PROMPTS[0]], Method(drafting([]), lambda items, key: []))


def test_stage_cut_in_parts_has_the_result_of_the_whole(lm):
    def halves(number, items, stage):
        return [*stage(items[:2]), *stage(items[2:])]

    method = best_of_n.best_of_n(lm, TWO_SAMPLES, by_length)
    whole, parts = (improve(PROMPTS, method, rounds=1, seed=3, keep=k) for k in (rounds.call_stage, halves))
    assert [outcomes(r) for r in whole] == [outcomes(r) for r in parts]
    assert [[r.response.token_ids for r in records] for records in whole] == [
        [r.response.token_ids for r in records] for records in parts
    ]
    assert [r.response for r in whole[0]] != [r.response for r in improve(PROMPTS, method, rounds=0, seed=4)[0]]


# ----------------------------------------------------------------------------------------------------------------- SRT


def plant_critiques(monkeypatch, first: dict[str, tuple], checks: dict[str, float | None]) -> list[list[str]]:
    """Replaces the critic by one that returns (score, improved, finish) by prompt, or the score alone for a check. The
    list returned fills with the texts it reads."""
    seen: list[list[str]] = []

    def planted(score_only, lm, prompts, drafts, template, cfg, key):
        seen.append([draft.text for draft in drafts])
        critiques = []
        for draft in drafts:
            prompt = draft.prompt_id
            score, improved, finish = (checks[prompt], None, "stop") if score_only else first[prompt]
            heading = "" if improved is None else f"\nAnswer: {improved}"
            critiques.append(
                Critique(
                    id=draft.id,
                    prompt_id=prompt,
                    weaknesses="talk",
                    suggestions="good",
                    score=score,
                    improved=improved,
                    text=f"Check: talk{heading}",
                    finish_reason=finish,
                    fingerprint="f",
                    template="t",
                )
            )
        return critiques

    monkeypatch.setattr(srt, "continue_critique", functools.partial(planted, False))
    monkeypatch.setattr(srt, "continue_score", functools.partial(planted, True))
    return seen


def marked_item(lm: LM, prompt: Prompt, text: str | None = None):
    """A prompt whose draft "cat." ends in the marker that begins feedback; ``text`` replaces the draft's text."""
    draft = marked_response(lm.tokenizer, f"{prompt.id}#0", prompt.id, "cat.", TEMPLATE, "f")
    draft = draft if text is None else dataclasses.replace(draft, text=text)
    return prompt, (dataclasses.replace(record(prompt, "cat."), response=draft),)


def srt_round(lm: LM, items, cfg: CritiqueConfig = GREEDY, gate: bool = False) -> list[Improvement]:
    return srt.srt_round(lm, items, jax.random.key(0), template=TEMPLATE, cfg=cfg, gate=gate)


OWN = {
    "p0": (5.0, "axe.", "stop"),
    "p1": (5.0, "axe.", "stop"),
    "p2": (5.0, "cat.", "stop"),
    "p3": (5.0, None, "length"),
}


def test_srt_answers_with_the_first_refinement_whatever_its_score(lm, monkeypatch):
    seen = plant_critiques(monkeypatch, OWN | {"p1": (None, "axe.", "stop")}, {})
    items = [marked_item(lm, prompt, "cat.") for prompt in PROMPTS]
    results = srt_round(lm, items)
    assert outcomes(results) == ["accepted", "accepted", "kept", "cut off"]
    assert [r.response.text for r in results] == ["axe.", "axe.", "cat.", "cat."]
    assert [r.score for r in results] == [None, None, 5.0, 5.0], "the score of the response, where there is one"
    assert seen == [["cat.\nJudge:"] * 4, []], "y, f and r are one decode: there is no call for a score"
    assert results[0].feedback == "Check: talk" and results[0].tokens > results[3].tokens > 0


@pytest.mark.parametrize(("check", "outcome"), [(6.0, "accepted"), (5.0, "rejected"), (None, "no response")])
def test_srt_keeps_the_best_scored_of_several_refinements(lm, monkeypatch, check, outcome):
    plant_critiques(monkeypatch, OWN, {})
    prompt, past = marked_item(lm, PROMPTS[0], "cat.")
    (first,) = srt_round(lm, [(prompt, past)])
    plant_critiques(monkeypatch, {"p0": (5.0, "egg.", "stop")}, {"p0": check})
    (second,) = srt_round(lm, [(prompt, (*past, first))])
    assert (second.outcome, second.score) == (outcome, 6.0 if outcome == "accepted" else 5.0)
    assert second.response.text == ("egg." if outcome == "accepted" else "axe.")


def test_srt_with_a_gate_accepts_only_a_strictly_higher_score(lm, monkeypatch):
    seen = plant_critiques(monkeypatch, OWN, {"p0": 6.0, "p1": 5.0})
    items = [marked_item(lm, prompt, "cat.") for prompt in PROMPTS]
    results = srt_round(lm, items, gate=True)
    assert outcomes(results) == ["accepted", "rejected", "kept", "cut off"]
    assert [r.score for r in results] == [6.0, 5.0, 5.0, 5.0]
    assert [r.response.text for r in results] == ["axe.", "cat.", "cat.", "cat."]
    assert results[1].response is items[1][1][0].response
    assert seen == [["cat.\nJudge:"] * 4, ["axe.\nJudge:"] * 2], "two calls, each text up to where feedback begins"
    again = srt_round(lm, [(PROMPTS[0], (*items[0][1], results[0]))])
    assert seen[2] == ["axe.\nJudge:"], "a refined response gets its marker back"
    assert outcomes(again) == ["kept"]


@pytest.mark.parametrize(
    ("first", "check"),
    [((None, "axe.", "stop"), 9.0), ((5.0, "axe.", "stop"), None), ((5.0, None, "stop"), None)],
    ids=["no first score", "no second score", "no refined response"],
)
def test_srt_with_a_gate_needs_every_part_of_the_feedback(lm, monkeypatch, first, check):
    plant_critiques(monkeypatch, {"p0": first}, {"p0": check})
    assert outcomes(srt_round(lm, [marked_item(lm, PROMPTS[0])], gate=True)) == ["no response"]


def test_srt_without_feedback_or_without_room(lm):
    results = improve(PROMPTS, srt.srt(lm, SAMPLING, TEMPLATE, GREEDY), rounds=1)
    assert set(outcomes(results[1])) == {"no response"}, "a random model begins no feedback"
    items = [marked_item(lm, PROMPTS[0])]
    assert outcomes(srt_round(lm, items, CritiqueConfig(max_new_tokens=250))) == ["too long"]
    (result,) = srt_round(lm, items)
    assert result.outcome in ("no response", "cut off") and result.tokens > 0


# ---------------------------------------------------------------------------------------------------------------- SEFT


def test_seft_keeps_a_response_byte_for_byte_on_no(lm):
    odd = [response(p.id, " cat  \u00a0dog.\n") for p in PROMPTS]  # ids and text that no sampler would write
    items = [(p, (dataclasses.replace(record(p, ""), response=r),)) for p, r in zip(PROMPTS, odd, strict=True)]
    cfg = ReviseConfig(max_new_tokens=8)
    probs = label_probs(lm, PROMPTS, odd, REVISER, cfg)
    likeliest = max(range(3), key=lambda i: probs[0][i])
    others = [label for i, label in enumerate(REVISER.labels) if i != likeliest]
    keeping = dataclasses.replace(REVISER, labels=(*others, REVISER.labels[likeliest]))
    (result,) = seft.seft_round(lm, items[:1], jax.random.key(0), template=keeping, cfg=cfg)
    assert result.outcome == "kept" and result.response is odd[0] and result.tokens == 0
    assert result.score == pytest.approx(max(probs[0])) and result.feedback == keeping.no
    no_room = ReviseConfig(max_new_tokens=250)
    assert outcomes(seft.seft_round(lm, items[:1], jax.random.key(0), template=REVISER, cfg=no_room)) == ["too long"]


def test_seft_accepts_a_revision_that_can_be_used(lm, monkeypatch):
    revised = {
        "p0": response("p0", "axe."),
        "p1": response("p1", "axe", "length"),
        "p2": response("p2", " "),
    }

    def revise(lm, prompts, responses, template, cfg, key):
        probs = (0.1, 0.6, 0.3)
        return [
            Revision(id=r.id, prompt_id=r.prompt_id, label="bad", label_probs=probs, response=revised[r.prompt_id])
            for r in responses
        ]

    monkeypatch.setattr(seft, "revise", revise)
    method = seft.seft(lm, SAMPLING, lm, REVISER, ReviseConfig(max_new_tokens=8))
    results = improve(PROMPTS[:3], method._replace(draft=drafting(["a.", "b.", "c."])))[1]
    assert outcomes(results) == ["accepted", "cut off", "empty"]
    assert [r.response.text for r in results] == ["axe.", "b.", "c."]
    scores = [r.score for r in results]
    assert scores[1:] == [0.3, 0.3] and scores[0] != 0.3, "the score of the current response"


# ----------------------------------------------------------------------------------------------------------------- PIT


def plant_improver(monkeypatch, texts: dict[str, tuple[str, str]], gains: dict[str, float]) -> None:
    def improve_once(lm, prompts, drafts, request, key, **sampling):
        return [
            Revision(
                id=draft.id,
                prompt_id=draft.prompt_id,
                label=None,
                label_probs=None,
                response=dataclasses.replace(response(draft.id, *texts[draft.prompt_id]), id=f"{draft.id}#0"),
            )
            for draft in drafts
        ]

    def planted_gains(gap_lm, improver, triples, request, batch_size):
        return {prompt.id: gains[prompt.id] for prompt, _, _ in triples if prompt.id in gains}

    monkeypatch.setattr(pit, "improve_once", improve_once)
    monkeypatch.setattr(pit, "_gains", planted_gains)


def test_pit_accepts_only_a_gain_above_delta(lm, monkeypatch):
    texts = {"p0": ("axe.", "stop"), "p1": ("axe.", "stop"), "p2": ("axe", "length"), "p3": ("axe.", "stop")}
    plant_improver(monkeypatch, texts, {"p0": 0.75, "p1": 0.5, "p2": 9.0})
    method = pit.pit(lm, SAMPLING, lm, "{prompt}", gap_lm=with_scalar_head(lm), delta=0.5)
    results = improve(PROMPTS, method._replace(draft=drafting(["a.", "b.", "c.", "d."])))[1]
    assert outcomes(results) == ["accepted", "rejected", "cut off", "too long"]
    assert [r.score for r in results] == [0.75, 0.5, None, None]
    assert [(r.response.text, r.response.id) for r in results[:2]] == [("axe.", "p0#0"), ("b.", "p1#0")]
    assert results[0].response.prompt_id == "p0"
    ungated = pit.pit(lm, SAMPLING, lm, "{prompt}")
    assert outcomes(improve(PROMPTS, ungated._replace(draft=drafting(["a."] * 4)))[1]).count("accepted") == 3


def test_pit_skips_texts_without_room_and_rejects_a_model_without_a_head(lm):
    gap_lm = with_scalar_head(tiny.make_lm(seed=1))
    long = response("p1", "cat " * 120)
    assert pit._gains(gap_lm, lm, [(PROMPTS[1], response("p0", "axe red."), long)], "{prompt}", 8) == {}
    no_room = pit.pit(lm, dataclasses.replace(SAMPLING, max_new_tokens=200), lm, "again " * 60)
    assert outcomes(improve(PROMPTS[:1], no_room._replace(draft=drafting(["a."])))[1]) == ["too long"]
    with pytest.raises(RewardError, match="scalar head"):
        pit.pit(lm, SAMPLING, lm, "{prompt}", gap_lm=lm)


# --------------------------------------------------------------------------------------------------------- Self-Refine


def test_self_refine_ends_when_the_feedback_says_enough(lm, monkeypatch):
    answers = {
        "p0": ["too long", "axe.", "Good."],
        "p1": ["no\n GOOD!"],
        "p2": [response("p2", "wro", "length")],
        "p3": ["why", " "],
    }
    seen = plant(monkeypatch, rounds, answers)
    method = self_refine.self_refine(lm, SAMPLING, REFINE, lm, SAMPLING)
    results = improve(PROMPTS, method._replace(draft=drafting(["a.", "b.", "c.", "d."])), rounds=2)
    assert outcomes(results[1]) == ["accepted", "kept", "cut off", "empty"]
    assert outcomes(results[2]) == ["kept", "ended", "ended", "ended"]
    assert [r.response.text for r in results[2]] == ["axe.", "b.", "c.", "d."]
    assert [r.feedback for r in results[1]] == ["too long", "no\n GOOD!", "wro", "why"]
    refining = next(p for p in seen if p.messages[-1]["content"] == REFINE.refine)
    assert [m["content"] for m in refining.messages[1:]] == ["a.", REFINE.feedback, "too long", REFINE.refine]
    assert not any(answers.values()), "every planted answer was used"


def test_self_refine_shows_all_earlier_responses_and_feedback(lm, monkeypatch):
    seen = plant(monkeypatch, rounds, {"p0": ["f0", "y1.", "f1", "y2."]})
    method = self_refine.self_refine(lm, SAMPLING, REFINE, lm, SAMPLING)
    improve(PROMPTS[:1], method._replace(draft=drafting(["y0."])), rounds=2)
    history = [m["content"] for m in seen[-1].messages if m["role"] == "assistant"]
    assert history == ["y0.", "f0", "y1.", "f1"]


# ----------------------------------------------------------------------------------------------------------- best of N


def by_length(prompts, responses, key):
    return [Scored(float(len(r.text)), 3) for r in responses]


def test_best_of_n_takes_the_highest_score(lm, monkeypatch):
    answers = {
        "p0": ["aa.", "aaaa.", "aaaa!", "a.", "bbbbbbbb.", "b."],
        "p1": ["a.", "a!", "aa.", "b.", "bb.", "bbb."],
        "p2": [response("p2", "a" * 30, "length")] * 3 + ["ccccc.", "c.", "c."],
    }
    plant(monkeypatch, best_of_n, answers)
    method = best_of_n.best_of_n(lm, dataclasses.replace(SAMPLING, num_samples=4), by_length)
    for texts in answers.values():
        texts += ["z."] * (7 - len(texts))
    results = improve(PROMPTS[:3], method._replace(draft=drafting(["aaa.", "aaaa.", "cc."])), rounds=2)
    assert outcomes(results[1]) == ["accepted", "rejected", "cut off"]
    first = [(r.response.text, r.response.id, r.score) for r in results[1]]
    assert first == [("aaaa.", "p0#2", 5.0), ("aaaa.", "p1#0", 5.0), ("cc.", "p2#0", 3.0)]
    assert outcomes(results[2]) == ["accepted", "rejected", "accepted"], "a prompt without a gain goes on"
    assert [(r.response.text, r.response.sample) for r in results[2]][::2] == [("bbbbbbbb.", 5), ("ccccc.", 4)]
    with pytest.raises(ValueError, match="at least 2"):
        best_of_n.best_of_n(lm, SAMPLING, by_length)


def test_best_of_n_ignores_responses_without_a_score(lm, monkeypatch):
    plant(monkeypatch, best_of_n, {"p0": ["aaaa."], "p1": ["aaaa."]})

    def score(prompts, responses, key):
        scores = {"p0#0": None, "p0#1": 1.0, "p1#0": 1.0, "p1#1": None}
        return [Scored(scores[r.id], 0) for r in responses]

    method = best_of_n.best_of_n(lm, TWO_SAMPLES, score)
    results = improve(PROMPTS[:2], method._replace(draft=drafting(["a.", "b."])))[1]
    assert outcomes(results) == ["accepted", "no response"] and [r.score for r in results] == [1.0, 1.0]


def test_scores_of_a_judge_and_of_a_reward_model(lm, monkeypatch):
    responses = [response("p0", "cat."), response("p1", "axe red.")]
    cfg = JudgeConfig(num_samples=2, max_new_tokens=4, expected=True)
    by_model = best_of_n.scored_by(judge, lm, RUBRIC, cfg)
    scores = by_model(PROMPTS, responses, jax.random.key(0))
    assert all(0 <= scored.score <= 5 and scored.tokens > 0 for scored in scores)
    reward_lm = with_scalar_head(tiny.make_lm(seed=1))
    reward_lm = dataclasses.replace(reward_lm, weights=reward_lm.weights | {"score": reward_lm.weights["score"] + 0.1})
    long = response("p2", "cat " * 300)
    monkeypatch.setattr(judges, "placed", lambda model, lm: {"reward": reward_lm, "writer": lm}[model])
    by_reward = best_of_n.scored_by(RewardJudge("reward"), lm, RUBRIC, cfg)
    scores = by_reward(PROMPTS, [*responses, long], jax.random.key(0))
    texts = [reward_sequence(lm.tokenizer, p.messages, r) for p, r in zip(PROMPTS, responses, strict=False)]
    assert [scored.score for scored in scores[:2]] == pytest.approx(rewards(reward_lm, texts).tolist())
    assert scores[2] == Scored(None, 0)
    with pytest.raises(RewardError, match="scalar head"):
        best_of_n.scored_by(RewardJudge("writer"), lm, RUBRIC, cfg)(PROMPTS, responses, jax.random.key(0))
    invalid = Judgment(id="p0#0", prompt_id="p0", scores=(None,), score=None, texts=(), fingerprint="f", template="t")
    by_nothing = best_of_n.scored_by(lambda *args: [invalid], lm, RUBRIC, cfg)
    assert by_nothing(PROMPTS, responses[:1], jax.random.key(0)) == [Scored(None, 0)]
