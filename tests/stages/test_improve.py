"""Improvement at inference time: what each method keeps, takes and refuses, when it ends, and what it counts."""

import dataclasses
import math

import jax
import pytest

import jaxsi
import tiny
from jaxsi.lm import LM
from jaxsi.runs.records import Critique, Improvement, Judgment, Prompt, Response, Revision, read_jsonl, write_jsonl
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages import critique as critiquelib, reviser as reviselib
from jaxsi.stages.critique import CritiqueConfig
from jaxsi.stages.improve import best_of_n as reranking, pit as improverlib, rounds as improvement
from jaxsi.stages.improve.best_of_n import best_of_n, judged, rewarded
from jaxsi.stages.improve.rounds import Method, Scored, improve, pit, round_statistics, seft, self_refine, srt
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.prompts.reviser import ReviserTemplate
from jaxsi.stages.prompts.self_refine import SelfRefineTemplate
from jaxsi.stages.reviser import ReviseConfig
from jaxsi.toyworld.corpus import RUBRIC
from jaxsi.toyworld.critic import TEMPLATE
from jaxsi.training.reward import RewardError, reward_sequence, rewards, with_scalar_head

PROMPTS = [Prompt.of(f"p{i}", f"Reverse: {word} red axe") for i, word in enumerate(("cat", "dog", "egg", "saw"))]
LONG = Prompt.of("long", "cat " * 300)
SAMPLING = SamplingConfig(
    num_samples=1, temperature=1.0, top_p=1.0, max_new_tokens=8, batch_size=1, dtype="float32"
)  # fmt: skip
REVISER = ReviserTemplate(
    name="test", template="Check each item:", warm_up="Check each item:", labels=("wrong", "bad", "good"), separator=" "
)
REFINE = SelfRefineTemplate(feedback="What is wrong?\nGood", refine="Again:", enough="Good")
TAKEN = "accepted"
GREEDY = CritiqueConfig(max_new_tokens=16, batch_size=1)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.make_lm()


def said(prompt_id: str, text: str, finish: str = "stop", sample: int = 0) -> Response:
    return Response(
        id=f"{prompt_id}#{sample}", prompt_id=prompt_id, sample=sample, text=text,
        token_ids=tuple(tiny.tokenizer().encode_text(text)), logps=(), finish_reason=finish, fingerprint="f",
        template="t",
    )  # fmt: skip


def record(prompt: Prompt, text: str, **changes) -> Improvement:
    values = {"round": 0, "outcome": "draft", "score": None, "quality": None, "feedback": None, "tokens": 1} | changes
    return Improvement(
        id=f"{prompt.id}@{values['round']}", prompt_id=prompt.id, response=said(prompt.id, text), **values
    )  # fmt: skip


def given(texts: list[str]):
    """Round 0 with these texts in place of samples."""
    return lambda prompts, key: [record(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def outcomes(records: list[Improvement]) -> list[str]:
    return [record.outcome for record in records]


def planted(monkeypatch, module, answers: dict[str, list[Response | str]]) -> list[Prompt]:
    """``generate`` gives the answers of each prompt, one after the other; what was asked is in the list returned."""
    asked: list[Prompt] = []

    def generate(lm, prompts, *, num_samples=1, **settings):
        asked.extend(prompts)
        drawn = [(p, answers[p.id].pop(0), n) for p in prompts for n in range(num_samples)]
        return [
            dataclasses.replace(a, id=f"{p.id}#{n}", sample=n) if isinstance(a, Response) else said(p.id, a, sample=n)
            for p, a, n in drawn
        ]

    monkeypatch.setattr(module, "generate", generate)
    return asked


# ------------------------------------------------------------------------------------------------------------- the loop


def test_records_come_back_as_they_were(tmp_path):
    made = [
        record(PROMPTS[0], "cat.", score=math.pi, quality=1e-300, feedback="\u2028 “é”", tokens=0),
        record(PROMPTS[1], "", round=2, outcome="no response", score=None),
    ]
    write_jsonl(tmp_path / "made.jsonl", made)
    assert read_jsonl(tmp_path / "made.jsonl", Improvement) == made
    assert not made[0].accepted and dataclasses.replace(made[0], outcome="accepted").accepted


def test_a_prompt_that_did_not_improve_has_ended(lm):
    turns = {"p0": ["accepted", "kept"], "p1": ["rejected"], "p2": ["accepted", "accepted"]}
    asked = []

    def round(items, key):
        asked.append([prompt.id for prompt, _ in items])
        left = [(past, turns[prompt.id].pop(0)) for prompt, past in items]
        return [
            improvement.step(
                past, outcome, 1.0, response=said(past[-1].prompt_id, "new.") if outcome == TAKEN else None
            )
            for past, outcome in left
        ]

    qualities = []

    def grade(prompts, responses, key):
        qualities.append([response.text for response in responses])
        return [Scored(float(len(response.text)), 0) for response in responses]

    rounds = improve(PROMPTS[:3], Method(given(["a.", "b.", "c."]), round), rounds=2, grade=grade)
    assert asked == [["p0", "p1", "p2"], ["p0", "p2"]]
    assert [outcomes(r) for r in rounds] == [
        ["draft"] * 3, ["accepted", "rejected", "accepted"], ["kept", "ended", "accepted"]
    ]  # fmt: skip
    assert [r.response.text for r in rounds[2]] == ["new.", "b.", "new."]
    assert [r.quality for r in rounds[2]] == [4.0, 2.0, 4.0], "that of the response there is"
    assert qualities == [["a.", "b.", "c."], ["new.", "new."], ["new."]], "and measured once"
    assert [r.id for r in rounds[2]] == ["p0@2", "p1@2", "p2@2"]


def test_over_long_prompts_are_counted_and_go_no_further(lm):
    asked = []

    def round(items, key):
        asked.extend(prompt.id for prompt, _ in items)
        return [improvement.step(past, "kept", None) for _, past in items]

    method = Method(improvement.drafter(lm, SAMPLING), round)
    rounds = improve([PROMPTS[0], LONG], method, rounds=1)
    assert outcomes(rounds[0]) == ["draft", "too long"] and outcomes(rounds[1]) == ["kept", "ended"]
    assert asked == ["p0"] and rounds[0][1].response.text == "" and rounds[0][1].tokens == 0
    figures = round_statistics(rounds[0])
    assert figures["outcomes"] == {"draft": 1, "too long": 1} and figures["prompts"] == 2
    assert figures["mean_length"] == len(rounds[0][0].response.token_ids) == figures["tokens"]
    assert figures["quality"] is None and figures["mean_score"] is None
    assert outcomes(improve([LONG], best_of_n(lm, dataclasses.replace(SAMPLING, num_samples=2), longest))[1]) == [
        "ended"
    ]


def test_plain_texts_are_prompts_too(lm):
    (drafts,) = jaxsi.improve(
        ["Reverse: cat red"], Method(improvement.drafter(lm, SAMPLING), lambda items, key: []), rounds=0
    )
    assert [(record.id, record.outcome) for record in drafts] == [("0@0", "draft")]


def test_doubled_prompts_are_refused(lm):
    with pytest.raises(ValueError, match="one id"):
        improve([PROMPTS[0], PROMPTS[0]], Method(given([]), lambda items, key: []))


def test_parts_give_what_the_whole_gives(lm):
    def halves(number, items, stage):
        return [*stage(items[:2]), *stage(items[2:])]

    method = best_of_n(lm, dataclasses.replace(SAMPLING, num_samples=2), longest)
    whole, parts = (improve(PROMPTS, method, rounds=1, seed=3, keep=k) for k in (improvement.at_once, halves))
    assert [outcomes(r) for r in whole] == [outcomes(r) for r in parts]
    assert [[r.response.token_ids for r in made] for made in whole] == [
        [r.response.token_ids for r in made] for made in parts
    ]
    assert [r.response for r in whole[0]] != [r.response for r in improve(PROMPTS, method, rounds=0, seed=4)[0]]


# ----------------------------------------------------------------------------------------------------------------- SRT


def criticised(monkeypatch, first: dict[str, tuple], checks: dict[str, float | None]) -> list[list[str]]:
    """``continue_critique`` gives (score, improved, finish) and, of improved responses, their own scores."""
    read: list[list[str]] = []

    def continue_critique(lm, prompts, drafts, template, cfg, key, *, score_only=False):
        read.append([draft.text for draft in drafts])
        made = []
        for draft in drafts:
            prompt = draft.prompt_id
            score, improved, finish = (checks[prompt], None, "stop") if score_only else first[prompt]
            heading = "" if improved is None else f"\nAnswer: {improved}"
            made.append(
                Critique(
                    id=draft.id, prompt_id=prompt, weaknesses="talk", suggestions="good", score=score,
                    improved=improved, text=f"Check: talk{heading}", finish_reason=finish, fingerprint="f",
                    template="t",
                )
            )  # fmt: skip
        return made

    monkeypatch.setattr(improvement, "continue_critique", continue_critique)
    return read


def test_srt_accepts_what_scores_strictly_higher(lm, monkeypatch):
    drafts = [critiquelib.marked_response(lm.tokenizer, f"{p.id}#0", p.id, "cat.", TEMPLATE, "f") for p in PROMPTS]
    drafts = [dataclasses.replace(draft, text="cat.") for draft in drafts]
    first = {
        "p0": (5.0, "axe.", "stop"),
        "p1": (5.0, "axe.", "stop"),
        "p2": (5.0, "cat.", "stop"),
        "p3": (5.0, None, "length"),
    }
    read = criticised(monkeypatch, first, {"p0": 6.0, "p1": 5.0})  # fmt: skip
    items = [(p, (dataclasses.replace(record(p, "cat."), response=d),)) for p, d in zip(PROMPTS, drafts, strict=True)]
    made = improvement.srt_round(lm, items, jax.random.key(0), template=TEMPLATE, cfg=GREEDY)
    assert outcomes(made) == ["accepted", "rejected", "kept", "cut off"]
    assert [r.score for r in made] == [6.0, 5.0, 5.0, 5.0]
    assert [r.response.text for r in made] == ["axe.", "cat.", "cat.", "cat."]
    assert made[1].response is items[1][1][0].response
    assert read == [["cat.\nJudge:"] * 4, ["axe.\nJudge:"] * 2], (
        "in calls of their own, each up to where feedback begins"
    )
    assert made[0].feedback == "Check: talk" and made[0].tokens > made[3].tokens > 0
    again = improvement.srt_round(
        lm, [(PROMPTS[0], (*items[0][1], made[0]))], jax.random.key(0), template=TEMPLATE, cfg=GREEDY
    )
    assert read[2] == ["axe.\nJudge:"], "a refined response goes on as the model wrote it"
    assert outcomes(again) == ["kept"]


@pytest.mark.parametrize(
    ("first", "check", "outcome"),
    [((None, "axe.", "stop"), 9.0, "no response"), ((5.0, "axe.", "stop"), None, "no response"),
     ((5.0, None, "stop"), None, "no response")],
)  # fmt: skip
def test_srt_needs_every_part(lm, monkeypatch, first, check, outcome):
    draft = critiquelib.marked_response(lm.tokenizer, "p0#0", "p0", "cat.", TEMPLATE, "f")
    criticised(monkeypatch, {"p0": first}, {"p0": check})
    items = [(PROMPTS[0], (dataclasses.replace(record(PROMPTS[0], "cat."), response=draft),))]
    assert outcomes(improvement.srt_round(lm, items, jax.random.key(0), template=TEMPLATE, cfg=GREEDY)) == [outcome]


def test_srt_without_feedback_and_without_room(lm):
    rounds = improve(PROMPTS, srt(lm, SAMPLING, TEMPLATE, GREEDY), rounds=1)
    assert set(outcomes(rounds[1])) == {"no response"}, "a random model begins no feedback"
    draft = critiquelib.marked_response(lm.tokenizer, "p0#0", "p0", "cat.", TEMPLATE, "f")
    items = [(PROMPTS[0], (dataclasses.replace(record(PROMPTS[0], "cat."), response=draft),))]
    no_room = CritiqueConfig(max_new_tokens=250)
    made = improvement.srt_round(lm, items, jax.random.key(0), template=TEMPLATE, cfg=no_room)
    assert outcomes(made) == ["too long"]
    made = improvement.srt_round(lm, items, jax.random.key(0), template=TEMPLATE, cfg=GREEDY)
    assert made[0].outcome in ("no response", "cut off") and made[0].tokens > 0


# ---------------------------------------------------------------------------------------------------------------- SEFT


def test_on_no_a_response_is_kept_byte_for_byte(lm):
    odd = [said(p.id, " cat  \u00a0dog.\n") for p in PROMPTS]  # ids and text that no sampler would write
    items = [(p, (dataclasses.replace(record(p, ""), response=r),)) for p, r in zip(PROMPTS, odd, strict=True)]
    cfg = ReviseConfig(max_new_tokens=8)
    probs = reviselib.label_probs(lm, PROMPTS, odd, REVISER, cfg)
    likeliest = max(range(3), key=lambda i: probs[0][i])
    others = [label for i, label in enumerate(REVISER.labels) if i != likeliest]
    keeping = dataclasses.replace(REVISER, labels=(*others, REVISER.labels[likeliest]))
    made = improvement.seft_round(lm, items[:1], jax.random.key(0), template=keeping, cfg=cfg)
    assert outcomes(made) == ["kept"] and made[0].response is odd[0] and made[0].tokens == 0
    assert made[0].score == pytest.approx(max(probs[0])) and made[0].feedback == keeping.no
    no_room = improvement.seft_round(
        lm, items[:1], jax.random.key(0), template=REVISER, cfg=ReviseConfig(max_new_tokens=250)
    )
    assert outcomes(no_room) == ["too long"]  # fmt: skip


def test_a_revision_is_taken_where_it_can_be_used(lm, monkeypatch):
    revised = {
        "p0": ("bad", said("p0", "axe.")),
        "p1": ("bad", said("p1", "axe", "length")),
        "p2": ("bad", said("p2", " ")),
    }

    def revise(lm, prompts, responses, template, cfg, key):
        return [
            Revision(id=r.id, prompt_id=r.prompt_id, label=revised[r.prompt_id][0], label_probs=(0.1, 0.6, 0.3),
                     response=revised[r.prompt_id][1])
            for r in responses
        ]  # fmt: skip

    monkeypatch.setattr(reviselib, "revise", revise)
    method = seft(lm, SAMPLING, lm, REVISER, ReviseConfig(max_new_tokens=8))
    made = improve(PROMPTS[:3], method._replace(draft=given(["a.", "b.", "c."])))[1]
    assert outcomes(made) == ["accepted", "cut off", "empty"]
    assert [r.response.text for r in made] == ["axe.", "b.", "c."]
    assert [r.score for r in made][1:] == [0.3, 0.3] and made[0].score != 0.3, "of the response there is"


# ----------------------------------------------------------------------------------------------------------------- PIT


def improving(monkeypatch, texts: dict[str, tuple[str, str]], gains: dict[str, float]) -> None:
    def made(lm, prompts, drafts, request, key, **sampling):
        return [
            Revision(id=d.id, prompt_id=d.prompt_id, label=None, label_probs=None,
                     response=dataclasses.replace(said(d.id, *texts[d.prompt_id]), id=f"{d.id}#0"))
            for d in drafts
        ]  # fmt: skip

    monkeypatch.setattr(improverlib, "improve", made)
    known = lambda gap_lm, improver, triples, *rest: {p.id: gains[p.id] for p, _, _ in triples if p.id in gains}  # noqa: E731
    monkeypatch.setattr(improvement, "_gains", known)


def test_a_gain_must_be_above_delta(lm, monkeypatch):
    texts = {"p0": ("axe.", "stop"), "p1": ("axe.", "stop"), "p2": ("axe", "length"), "p3": ("axe.", "stop")}
    improving(monkeypatch, texts, {"p0": 0.75, "p1": 0.5, "p2": 9.0})
    method = pit(lm, SAMPLING, lm, "{prompt}", gap_lm=with_scalar_head(lm), delta=0.5)
    made = improve(PROMPTS, method._replace(draft=given(["a.", "b.", "c.", "d."])))[1]
    assert outcomes(made) == ["accepted", "rejected", "cut off", "too long"]
    assert [r.score for r in made] == [0.75, 0.5, None, None]
    assert [(r.response.text, r.response.id) for r in made[:2]] == [("axe.", "p0#0"), ("b.", "p1#0")]
    assert made[0].response.prompt_id == "p0"
    always = pit(lm, SAMPLING, lm, "{prompt}")
    assert outcomes(improve(PROMPTS, always._replace(draft=given(["a."] * 4)))[1]).count("accepted") == 3


def test_the_gain_is_that_of_the_gap_reward_model(lm):
    gap_lm = tiny.make_lm(seed=1)
    gap_lm = with_scalar_head(gap_lm)
    gap_lm = dataclasses.replace(gap_lm, weights=gap_lm.weights | {"score": gap_lm.weights["score"] + 0.1})
    new, old = said("p0", "axe red."), said("p0", "cat.")
    found = improvement._gains(gap_lm, lm, [(PROMPTS[0], new, old)], "{prompt}", 8)
    taken = improverlib.accepted(gap_lm, PROMPTS, [old], [new], "{prompt}")
    assert taken == [found["p0"] > 0] and found["p0"] != 0
    long = said("p1", "cat " * 120)
    assert improvement._gains(gap_lm, lm, [(PROMPTS[1], new, long)], "{prompt}", 8) == {}
    no_room = pit(lm, dataclasses.replace(SAMPLING, max_new_tokens=200), lm, "again " * 60)
    assert outcomes(improve(PROMPTS[:1], no_room._replace(draft=given(["a."])))[1]) == ["too long"]
    with pytest.raises(RewardError, match="scalar head"):
        pit(lm, SAMPLING, lm, "{prompt}", gap_lm=lm)


# --------------------------------------------------------------------------------------------------------- Self-Refine


def test_self_refine_ends_where_feedback_says_enough(lm, monkeypatch):
    answers = {
        "p0": ["too long", "axe.", "Good."],
        "p1": ["no\n GOOD!"],
        "p2": [said("p2", "wro", "length")],
        "p3": ["why", " "],
    }
    asked = planted(monkeypatch, improvement, answers)  # fmt: skip
    method = self_refine(lm, SAMPLING, REFINE, lm, SAMPLING)
    rounds = improve(PROMPTS, method._replace(draft=given(["a.", "b.", "c.", "d."])), rounds=2)
    assert outcomes(rounds[1]) == ["accepted", "kept", "cut off", "empty"]
    assert outcomes(rounds[2]) == ["kept", "ended", "ended", "ended"]
    assert [r.response.text for r in rounds[2]] == ["axe.", "b.", "c.", "d."]
    assert [r.feedback for r in rounds[1]] == ["too long", "no\n GOOD!", "wro", "why"]
    refining = next(p for p in asked if p.messages[-1]["content"] == REFINE.refine)
    assert [m["content"] for m in refining.messages[1:]] == ["a.", REFINE.feedback, "too long", REFINE.refine]
    assert all(not left for left in answers.values())


def test_self_refine_sees_all_that_it_wrote(lm, monkeypatch):
    asked = planted(monkeypatch, improvement, {"p0": ["f0", "y1.", "f1", "y2."]})
    improve(PROMPTS[:1], self_refine(lm, SAMPLING, REFINE, lm, SAMPLING)._replace(draft=given(["y0."])), rounds=2)
    said_so_far = [m["content"] for m in asked[-1].messages if m["role"] == "assistant"]
    assert said_so_far == ["y0.", "f0", "y1.", "f1"]


# ----------------------------------------------------------------------------------------------------------- best of N


def longest(prompts, responses, key):
    return [Scored(float(len(response.text)), 3) for response in responses]


def test_best_of_n_takes_the_greatest_score(lm, monkeypatch):
    answers = {
        "p0": ["aa.", "aaaa.", "aaaa!", "a.", "bbbbbbbb.", "b."],
        "p1": ["a.", "a!", "aa.", "b.", "bb.", "bbb."],
        "p2": [said("p2", "a" * 30, "length")] * 3 + ["ccccc.", "c.", "c."],
    }
    planted(monkeypatch, reranking, answers)
    method = best_of_n(lm, dataclasses.replace(SAMPLING, num_samples=4), longest)
    for texts in answers.values():
        texts += ["z."] * (7 - len(texts))
    rounds = improve(PROMPTS[:3], method._replace(draft=given(["aaa.", "aaaa.", "cc."])), rounds=2)
    assert outcomes(rounds[1]) == ["accepted", "rejected", "cut off"]
    assert [(r.response.text, r.response.id, r.score) for r in rounds[1]] == [
        ("aaaa.", "p0#2", 5.0), ("aaaa.", "p1#0", 5.0), ("cc.", "p2#0", 3.0)
    ]  # fmt: skip
    assert outcomes(rounds[2]) == ["accepted", "rejected", "accepted"], "a prompt without a gain goes on"
    assert [(r.response.text, r.response.sample) for r in rounds[2]][::2] == [("bbbbbbbb.", 5), ("ccccc.", 4)]
    with pytest.raises(ValueError, match="at least 2"):
        best_of_n(lm, SAMPLING, longest)


def test_a_response_without_a_score_is_no_rival(lm, monkeypatch):
    planted(monkeypatch, reranking, {"p0": ["aaaa."], "p1": ["aaaa."]})

    def score(prompts, responses, key):
        known = {"p0#0": None, "p0#1": 1.0, "p1#0": 1.0, "p1#1": None}
        return [Scored(known[response.id], 0) for response in responses]

    method = best_of_n(lm, dataclasses.replace(SAMPLING, num_samples=2), score)
    made = improve(PROMPTS[:2], method._replace(draft=given(["a.", "b."])))[1]
    assert outcomes(made) == ["accepted", "no response"] and [r.score for r in made] == [1.0, 1.0]


def test_scores_of_judges_and_reward_models(lm, monkeypatch):
    responses = [said("p0", "cat."), said("p1", "axe red.")]
    judge = judged(lm, RUBRIC, JudgeConfig(num_samples=2, max_new_tokens=4, expected=True))
    found = judge(PROMPTS, responses, jax.random.key(0))
    assert all(0 <= made.score <= 5 and made.tokens > 0 for made in found)
    reward_lm = with_scalar_head(tiny.make_lm(seed=1))
    reward_lm = dataclasses.replace(reward_lm, weights=reward_lm.weights | {"score": reward_lm.weights["score"] + 0.1})
    long = said("p2", "cat " * 300)
    found = rewarded(reward_lm, lm)(PROMPTS, [*responses, long], jax.random.key(0))
    texts = [reward_sequence(lm.tokenizer, p.messages, r) for p, r in zip(PROMPTS, responses, strict=False)]
    assert [made.score for made in found[:2]] == pytest.approx(rewards(reward_lm, texts).tolist())
    assert found[2] == Scored(None, 0)
    with pytest.raises(RewardError, match="scalar head"):
        rewarded(lm, lm)
    none = Judgment(id="p0#0", prompt_id="p0", scores=(None,), score=None, texts=(), fingerprint="f", template="t")
    monkeypatch.setattr(reranking.feedback, "judge", lambda *args: [none])
    assert judge(PROMPTS, responses[:1], jax.random.key(0)) == [Scored(None, 0)]
