"""PIT's evaluation of the gap reward: does it order responses as the exact grader does?"""

import dataclasses

import numpy as np
import pytest

import tiny
from jaxsi.runs.records import Prompt, Response
from jaxsi.toyworld import evaluate_improver
from jaxsi.toyworld.evaluate_improver import ImprovedEvaluation
from jaxsi.training.reward import with_scalar_head

PROMPTS = [Prompt.of(f"p{i}", f"Reverse: {word} red dog") for i, word in enumerate(("cat", "axe", "pie"))]


def said(prompt: Prompt, sample: int, text: str) -> Response:
    return dataclasses.replace(tiny.response(prompt, sample, [5]), text=text)


def test_responses_are_compared_over_the_first_draft_of_their_prompt(monkeypatch):
    drafts = [said(p, i, f"draft {i} of {p.id}") for p in PROMPTS for i in range(3)]
    improved = [said(p, i, f"new {i}") for p in PROMPTS for i in range(3)]
    calls = []

    def gains(lm, items, request, *, batch_size):
        calls.append((lm, items, request))
        return np.asarray([0.3, 0.1, 0.2, 0.0, 0.5, 0.5], np.float32)

    monkeypatch.setattr(evaluate_improver, "gains", gains)
    graded = {f"p0#{i}": grade for i, grade in enumerate((90.0, 50.0, 70.0))}
    graded |= {f"p1#{i}": grade for i, grade in enumerate((80.0, 40.0, 40.0))} | {f"p2#{i}": 1.0 for i in range(3)}
    evaluation = ImprovedEvaluation(judged_prompts=2)
    agreement = evaluation.agreement(PROMPTS, drafts, improved, graded, "reward", "again")
    # p0: all three pairs as the grader has them. p1: both pairs that the grader tells apart are the wrong way round.
    assert agreement.accuracy == pytest.approx(3 / 5)
    items = [(p.messages, improved[3 * n + i], f"draft 0 of {p.id}") for n, p in enumerate(PROMPTS[:2])
             for i in range(3)]  # fmt: skip
    assert calls == [("reward", items, "again")]


def test_reward_without_signal_satisfies_half_of_each_inequality():
    shares = ImprovedEvaluation(preferences=4).orders(with_scalar_head(tiny.make_lm()), "{prompt}")
    assert shares == dict.fromkeys(["wl>ww", "wl>ll", "wl>lw", "ww>lw", "ll>lw", "mean"], 0.5)
