"""Revision: labels by whole strings, drafts that are kept byte for byte, answers that continue the label."""

import dataclasses

import jax
import numpy as np
import pytest

import tiny
from jaxsi.lm import LM
from jaxsi.runs.records import Prompt, Response, Revision
from jaxsi.sampling import scoring
from jaxsi.stages.prompts.reviser import ReviserTemplate, load_reviser_template
from jaxsi.stages.reviser import (
    ReviseConfig,
    always_revise,
    best_of_n,
    keep_share,
    label_probs,
    labelled_drafts,
    lead_ids,
    revise,
    revision_statistics,
    targets,
    usable,
)
from jaxsi.text.chat import render_prompt, render_response

TEMPLATE = ReviserTemplate(
    name="test",
    template="Task: {prompt} Answer: {response} Label:",
    warm_up="Task: {prompt} Answer: {response}",
    labels=("form bad", "form wrong", "form good"),
    separator=" ",
)
CFG = ReviseConfig(max_new_tokens=6, batch_size=8)
PROMPTS = [Prompt.of(f"p{i}", text) for i, text in enumerate(("Reverse: cat red", "Sort A to Z: pig axe", "egg"))]
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.make_lm()


def drafts(per_prompt: int = 4) -> list[Response]:
    """Drafts of ragged lengths, whose ids differ from the encoding of their texts."""
    rng = np.random.default_rng(0)
    records = []
    for prompt in PROMPTS:
        for n in range(per_prompt):
            ids = [*rng.integers(10, 600, rng.integers(1, 9)).tolist(), tiny.tokenizer().eos_id]
            records.append(tiny.response(prompt, n, ids))
    return records


def test_label_is_scored_by_all_its_tokens_and_first_ones_may_coincide(lm):
    leads = lead_ids(lm.tokenizer, TEMPLATE)
    assert len({lead[0] for lead in leads}) == 1 and len(set(leads)) == 3
    probs = label_probs(lm, PROMPTS, drafts(), TEMPLATE, CFG)
    assert len(probs) == 12 and all(row is not None and sum(row) == pytest.approx(1) for row in probs)
    for draft, row in list(zip(drafts(), probs, strict=True))[::6]:
        question = next(prompt for prompt in PROMPTS if prompt.id == draft.prompt_id)
        request = render_prompt(lm.tokenizer, TEMPLATE.ask(question.messages, draft.text))
        logps = np.asarray([scoring.score_ids(lm, [request], [lead])[0].sum() for lead in leads], np.float64)
        expected = np.exp(logps - logps.max()) / np.exp(logps - logps.max()).sum()
        assert row == pytest.approx(expected, rel=1e-4)


def test_training_target_begins_with_the_scored_label(lm):
    for template in (TEMPLATE, load_reviser_template()):
        for label, lead in zip(template.labels, lead_ids(lm.tokenizer, template), strict=True):
            for text in ("cat red.", "Sure thing: 3 4", "É", "- a list", '"quoted"'):
                taught = render_response(lm.tokenizer, template.write(label, text))
                assert tuple(taught[: len(lead)]) == lead
            assert label in lm.tokenizer.decode(lead)


def test_label_that_is_a_prefix_of_another_is_refused(lm):
    clash = dataclasses.replace(TEMPLATE, labels=("form", "form bad", "good"))
    with pytest.raises(ValueError, match="is a prefix of another"):
        lead_ids(lm.tokenizer, clash)


def test_kept_draft_is_copied_byte_for_byte(lm):
    all_drafts = drafts()
    revisions = revise(lm, PROMPTS, all_drafts, TEMPLATE, CFG, KEY)
    assert [r.id for r in revisions] == [d.id for d in all_drafts]
    labels = {r.label for r in revisions}
    assert TEMPLATE.no in labels and len(labels) > 1, "the seeds of this test shall give both kinds"
    for draft, revision in zip(all_drafts, revisions, strict=True):
        assert revision.label == TEMPLATE.labels[int(np.argmax(revision.label_probs))]
        if revision.label == TEMPLATE.no:
            assert revision.response == draft  # text, token ids, logps, fingerprint: the very record
        else:
            assert revision.response.fingerprint == lm.fingerprint != draft.fingerprint
            assert revision.response.text == lm.tokenizer.decode(revision.response.token_ids).strip()
            assert (revision.response.id, revision.response.prompt_id) == (draft.id, draft.prompt_id)


def test_answer_depends_on_its_own_draft_and_key_only(lm):
    all_drafts = drafts()
    """Token for token; probabilities to the rounding of products of other shapes."""
    whole = {r.id: r for r in revise(lm, PROMPTS, all_drafts, TEMPLATE, CFG, KEY)}
    for revision in revise(lm, PROMPTS, all_drafts[9:2:-1], TEMPLATE, CFG, KEY):
        expected = whole[revision.id]
        np.testing.assert_allclose(revision.response.logps, expected.response.logps, atol=1e-5)
        np.testing.assert_allclose(revision.label_probs, expected.label_probs, atol=1e-6)
        response = dataclasses.replace(revision.response, logps=expected.response.logps)
        assert dataclasses.replace(revision, response=response, label_probs=expected.label_probs) == expected


def test_answer_continues_its_label(lm):
    all_drafts, greedy = drafts(2), dataclasses.replace(CFG, temperature=0.0)
    leads = dict(zip(TEMPLATE.labels, lead_ids(lm.tokenizer, TEMPLATE), strict=True))
    questions = {prompt.id: prompt.messages for prompt in PROMPTS}
    revisions = always_revise(lm, PROMPTS, all_drafts, TEMPLATE, greedy, KEY)
    starts, rows = [], np.zeros((len(all_drafts), 96), np.int32)
    for i, (draft, revision) in enumerate(zip(all_drafts, revisions, strict=True)):
        head = [
            *render_prompt(lm.tokenizer, TEMPLATE.ask(questions[draft.prompt_id], draft.text)),
            *leads[revision.label],
        ]
        row = [*head, *revision.response.token_ids]
        rows[i, : len(row)] = row
        starts.append(len(head))
    likeliest_BT = np.argmax(np.asarray(lm.logits(rows)), axis=-1)
    for revision, start, likeliest_T in zip(revisions, starts, likeliest_BT, strict=True):
        written = revision.response.token_ids
        assert written and written == tuple(likeliest_T[start - 1 : start - 1 + len(written)])


def test_always_revise_never_keeps_a_draft(lm):
    gated = revise(lm, PROMPTS, drafts(), TEMPLATE, CFG, KEY)
    always = always_revise(lm, PROMPTS, drafts(), TEMPLATE, CFG, KEY)
    assert {r.label for r in always} <= {TEMPLATE.major, TEMPLATE.minor}
    for a, b in zip(gated, always, strict=True):
        assert a.label_probs == pytest.approx(b.label_probs)
        if a.label != TEMPLATE.no:
            assert a.response.token_ids == b.response.token_ids


def test_best_draft_is_the_one_most_probably_kept(lm):
    all_drafts = drafts()
    probs = dict(zip([d.id for d in all_drafts], label_probs(lm, PROMPTS, all_drafts, TEMPLATE, CFG), strict=True))
    best = best_of_n(lm, PROMPTS, all_drafts, TEMPLATE, CFG, KEY)
    assert [r.prompt_id for r in best] == [prompt.id for prompt in PROMPTS]
    for revision in best:
        group = {d.id: probs[d.id][2] for d in all_drafts if d.prompt_id == revision.prompt_id}
        assert revision.id == max(group, key=group.__getitem__)
        assert revision.response in all_drafts
    best_ids = {r.id for r in best}
    cut = [dataclasses.replace(d, finish_reason="length") if d.id in best_ids else d for d in all_drafts]
    cut = [d for d in cut if d.prompt_id != "p2"] + [tiny.response(PROMPTS[2], 0, [tiny.tokenizer().eos_id])]
    others = best_of_n(lm, PROMPTS, cut, TEMPLATE, CFG, KEY)
    assert [r.prompt_id for r in others] == ["p0", "p1"] and not best_ids & {r.id for r in others}


def test_draft_without_room_is_returned_unchanged_and_not_a_target(lm):
    long = tiny.response(PROMPTS[0], 9, [20] * 240)
    all_drafts = [*drafts(1), long]
    revisions = revise(lm, PROMPTS, all_drafts, TEMPLATE, CFG, KEY)
    assert revisions[-1].label is None and revisions[-1].label_probs is None and revisions[-1].response == long
    assert label_probs(lm, PROMPTS, [long], TEMPLATE, CFG) == [None]
    counts = revision_statistics(all_drafts, revisions, TEMPLATE)
    assert counts["too_long"] == 1 and counts["drafts"] == 4
    assert long.id not in {example.id for example in targets(PROMPTS, revisions)}
    assert best_of_n(lm, PROMPTS, [long], TEMPLATE, CFG, KEY) == []


def test_drafts_must_match_their_prompts(lm):
    with pytest.raises(ValueError, match="not among the 1 prompts"):
        revise(lm, PROMPTS[:1], drafts(), TEMPLATE, CFG, KEY)
    with pytest.raises(ValueError, match="two responses have the id"):
        revise(lm, PROMPTS, drafts(1) * 2, TEMPLATE, CFG, KEY)


def revision(i: int, label: str | None, **of_response) -> Revision:
    response = dataclasses.replace(tiny.response(PROMPTS[i % 3], i, [30, 31, tiny.tokenizer().eos_id]), **of_response)
    return Revision(id=response.id, prompt_id=response.prompt_id, label=label, label_probs=None, response=response)


def test_targets_are_the_answers_that_were_not_cut_off():
    revisions = [
        revision(0, TEMPLATE.no, text="kept as it is"),
        revision(1, TEMPLATE.major, text=" "),
        revision(2, TEMPLATE.minor, finish_reason="length"),
        revision(3, None),
        revision(4, TEMPLATE.minor, text="better"),
    ]
    assert [usable(r) for r in revisions] == [True, False, False, False, True]
    examples = targets(PROMPTS, revisions)
    assert [(e.response, e.messages) for e in examples] == [
        ("kept as it is", PROMPTS[0].messages),
        ("better", PROMPTS[1].messages),
    ]
    counts = revision_statistics([r.response for r in revisions], revisions, TEMPLATE)
    assert (counts["empty"], counts["cut_off"], counts["too_long"], counts["unchanged"]) == (1, 1, 1, 1.0)
    assert counts["keep_share"] == keep_share(revisions, TEMPLATE) == 0.25
    assert keep_share([revision(0, None)], TEMPLATE) is None


def test_reviser_without_drafts_writes_nothing(lm):
    assert revise(lm, PROMPTS, [], TEMPLATE, CFG, KEY) == []
    assert labelled_drafts(lm, PROMPTS, [], TEMPLATE, CFG) == []


def test_settings_out_of_range_are_refused():
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=r"is|hold"):
            ReviseConfig(**wrong)
    assert ReviseConfig().temperature == 1.0


@pytest.mark.parametrize("name", ["2x2x2", "1x8x1"])
def test_revisions_are_the_same_on_every_mesh(lm, name):
    here = revise(lm, PROMPTS, drafts(2), TEMPLATE, CFG, KEY)
    there = revise(tiny.make_lm(name), PROMPTS, drafts(2), TEMPLATE, CFG, KEY)
    assert [(r.label, r.response.token_ids) for r in here] == [(r.label, r.response.token_ids) for r in there]
