"""SEFT's evaluation of a reviser: drafts, gated revisions, and revisions of everything."""

import numpy as np
import pytest

import tiny
from jaxsi.runs.records import RankedResponses
from jaxsi.toyworld import careless
from jaxsi.toyworld.evaluate_reviser import ReviserEvaluation, _changed, _compared


def test_gated_revision_is_compared_with_revising_always():
    got = _compared(np.asarray([100.0, 80.0]), np.asarray([100.0, 90.0]), np.asarray([70.0, 100.0]))
    assert (got["draft"], got["gated"], got["always"], got["gated_gain"]) == pytest.approx((90, 95, 85, 10))
    low, high = got["ci95"]
    assert -10 <= low <= 10 <= high <= 30


def test_change_of_drafts_of_a_label_matches_a_hand_count():
    before, after = np.asarray([50.0, 60.0, 70.0, 80.0]), np.asarray([90.0, 60.0, 10.0, 100.0])
    assert _changed(before, after) == {"drafts": 4, "before": 65.0, "after": 65.0, "win_rate": (1 + 0.5 + 0 + 1) / 4}
    assert _changed(before[:0], after[:0]) == {"drafts": 0, "before": None, "after": None, "win_rate": None}


def test_every_ranked_response_becomes_a_draft_with_its_grade():
    record = RankedResponses(
        id="p", messages=({"role": "user", "content": "Reverse: cat red dog"},),
        responses=("dog red cat.", "Sure thing: dog red cat", "dog red cat"), ranks=(0, 2, 1),
    )  # fmt: skip
    prompts, drafts, grades, worst = ReviserEvaluation().drafts(tiny.make_lm(), [record])
    assert [p.id for p in prompts] == ["p"] and prompts[0].messages == record.messages
    assert [(d.id, d.prompt_id, d.text) for d in drafts] == [
        (f"p#{i}", "p", text) for i, text in enumerate(record.responses)
    ]
    assert grades.tolist() == [100, 80, 90] and worst.tolist() == [False, True, False]
    assert all(d.token_ids[-1] in tiny.tokenizer().stop_ids for d in drafts)


def test_each_prompt_has_one_worst_draft():
    ranked = careless.preferences(8, 9, per_prompt=4, held_out=True, slip=0.0)
    prompts, drafts, grades, worst = ReviserEvaluation(num_prompts=8).drafts(tiny.make_lm(), ranked)
    assert worst.sum() == len(prompts) == 8 and len(drafts) == len(grades) == sum(len(r.ranks) for r in ranked)
    for prompt in prompts:
        places = [i for i, draft in enumerate(drafts) if draft.prompt_id == prompt.id]
        assert worst[min(places, key=lambda i: grades[i])]
