"""SRT's evaluation: the response in a draft, and re-ranking at the price of refining."""

import dataclasses
from types import SimpleNamespace

import pytest

import tiny
from jaxsi.methods.srt import FirstStage
from jaxsi.runs.records import Critique, Prompt, Response
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.critique import CritiqueConfig, marked_response
from jaxsi.stages.improve import srt
from jaxsi.stages.improve.rounds import improve
from jaxsi.toyworld import evaluate_refinement
from jaxsi.toyworld.critic import TEMPLATE
from jaxsi.toyworld.evaluate_refinement import RefinedEvaluation

PROMPTS = [Prompt.of("p", "Reverse: cat red dog"), Prompt.of("q", "Sort A to Z: pie axe cat")]
WORDS = SimpleNamespace(tokenizer=SimpleNamespace(encode_text=str.split))
AT_ONCE = SimpleNamespace(records=lambda name, make, *args, of: make(*args))


def said(prompt: Prompt, sample: int, text: str, tokens: int = 1) -> Response:
    return dataclasses.replace(tiny.response(prompt, sample, [5] * tokens), text=text)


def read(response: Response, text: str, score: float | None = None) -> Critique:
    return Critique(
        id=response.id, prompt_id=response.prompt_id, weaknesses=None, suggestions=None, score=score, improved=None,
        text=text, finish_reason="stop", fingerprint="f", template="t",
    )  # fmt: skip


def test_evaluation_measures_the_rule_of_the_command(monkeypatch):
    """Of each draft: a better refinement, a worse one, one with an equal score, none, and a draft without a marker."""
    lm, prompts = tiny.make_lm(), [Prompt.of(f"p{i}", f"Reverse: cat red {word}") for i, word in enumerate("abcde")]
    refined = dict(zip("abcde", ("cat dog.", "red.", "red cat.", None, "axe."), strict=True))
    texts = {p.id: refined[p.text[-1]] for p in prompts}

    def drafts(lm, asked, *, num_samples=1, stop_text, **settings):
        assert stop_text == TEMPLATE.feedback
        made = [marked_response(lm.tokenizer, f"{p.id}#0", p.id, "cat red.", TEMPLATE, "f") for p in asked]
        ended = [dataclasses.replace(d, text="cat red.", token_ids=d.token_ids[:2]) for d in made]
        return [e if e.prompt_id == "p4" else d for d, e in zip(made, ended, strict=True)]

    def criticise(lm, prompts, responses, template, cfg, key, *, marker=()):
        return [dataclasses.replace(read(r, "x", 5.0), improved=texts[r.prompt_id]) for r in responses]

    measured = []

    def quality(prompts, responses):
        measured.append([r.text for r in responses])
        return {r.id: 0.0 for r in responses}, {"quality": {"mean": 0.0}, "by_prompt": [0.0] * len(prompts)}

    monkeypatch.setattr(evaluate_refinement, "generate", drafts)
    monkeypatch.setattr("jaxsi.stages.improve.rounds.generate", drafts)
    for module in (evaluate_refinement, srt):
        monkeypatch.setattr(module, "continue_critique", criticise)
    monkeypatch.setattr(evaluate_refinement, "quality", quality)
    monkeypatch.setattr(evaluate_refinement.world, "evaluation_prompts", lambda count: prompts)
    cfg = CritiqueConfig(max_new_tokens=16)
    config = SimpleNamespace(template=TEMPLATE, critique=cfg, first_stage=FirstStage())
    RefinedEvaluation(num_prompts=5, num_samples=1, reranked_prompts=5)(lm, config, AT_ONCE, refine=True)
    command = improve(prompts, srt.srt(lm, SamplingConfig(num_samples=1, max_new_tokens=8), TEMPLATE, cfg))
    assert measured[1] == [record.response.text for record in command[1]]
    assert measured[1] == ["cat dog.", "red.", "red cat.", "cat red.", "cat red."]
    assert measured[0] == ["cat red."] * 5


def reranked(drafts, critiques, many, scores, by_prompt=(50.0, 50.0)):
    """(The figures, the calls for drafts.) ``many``: the drafts to choose from; ``scores``: the model's own scores."""
    calls = []

    def draft(count, prompts, name):
        calls.append((count, [prompt.id for prompt in prompts]))
        return many

    criticise = lambda responses: [read(r, "x", scores[r.id]) for r in responses]  # noqa: E731
    evaluation = RefinedEvaluation(num_prompts=2, reranked_prompts=2)
    figures = evaluation.reranked(
        WORDS, PROMPTS, drafts, critiques, list(by_prompt), draft, criticise, AT_ONCE, TEMPLATE
    )
    return figures, calls


@pytest.mark.parametrize(
    ("tokens", "texts", "count"),
    [
        (1, ["a Answer: b c d e f", "a Answer: b c d e f"], 4),  # (1 + 7) / (1 + 1)
        (4, ["a b c Answer: d e f", "a b c Answer: d e f"], 2),  # 11 / 7 = 1.6
        (2, ["a Answer: b c d", "a b c Answer: d e f"], 2),  # (2 + 6) / (2 + 2), exactly 2
        (2, ["a Answer: b c d e", "a b c Answer: d e f"], 3),  # a little more than 2
        (5, ["a b", ""], 2),  # nothing was refined: still two, to have a choice
    ],
)
def test_price_of_refining_buys_drafts(tokens, texts, count):
    drafts = [said(p, 0, "x", tokens) for p in PROMPTS]
    critiques = [read(d, text) for d, text in zip(drafts, texts, strict=True)]
    many = [said(p, 0, "dog red cat.") for p in PROMPTS]
    figures, calls = reranked(drafts, critiques, many, dict.fromkeys((r.id for r in many), 1.0))
    assert calls == [(count, ["p", "q"])] and figures["samples"] == count


def test_reranking_grades_the_draft_with_the_best_own_score():
    drafts = [said(p, 0, "x") for p in PROMPTS]
    many = [
        said(PROMPTS[0], 0, "dog red.\nJudge:"),
        said(PROMPTS[0], 1, "dog red cat.\nJudge:"),  # the best by score: 100
        said(PROMPTS[0], 2, "cat.\nJudge:"),  # the same score, but later
        said(PROMPTS[1], 0, "cat.\nJudge:"),  # no score
        said(PROMPTS[1], 1, "axe cat pie\nJudge:"),  # 90
    ]
    scores = {"p#0": 3.0, "p#1": 8.0, "p#2": 8.0, "q#0": None, "q#1": 0.0}
    figures, _ = reranked(drafts, [read(d, "a") for d in drafts], many, scores, by_prompt=(90.0, 50.0))
    assert figures["quality"]["mean"] == pytest.approx((100 + 90) / 2)
    assert figures["refined_is_better_by"][0] == pytest.approx(((90 - 100) + (50 - 90)) / 2)
