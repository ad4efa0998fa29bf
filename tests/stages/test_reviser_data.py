"""What a reviser learns from: pairs, prices, labels, examples."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import tiny
from jaxsi.runs.records import Prompt, RankedResponses
from jaxsi.sampling import scoring
from jaxsi.stages.prompts.reviser import ReviserTemplate
from jaxsi.stages.reviser_data import (
    LabelConfig,
    RevisionPair,
    by_gap,
    by_price,
    label_pairs,
    label_statistics,
    longest_text,
    perplexities,
    relative_perplexities,
    reviser_examples,
    revision_pairs,
    warm_up_examples,
)
from jaxsi.text.chat import render_prompt, render_response

TEMPLATE = ReviserTemplate(
    name="test",
    template="Task: {prompt} Answer: {response} Label:",
    warm_up="Task: {prompt} Answer: {response}",
    labels=("wrong", "bad", "good"),
    separator=" ",
)


def ranking(id: str, responses: list[str], ranks: list[int]) -> RankedResponses:
    prompt = Prompt.of(id, f"Reverse: {id}")
    return RankedResponses(id=id, messages=prompt.messages, responses=tuple(responses), ranks=tuple(ranks))


def pair(i: int, gap: int, price: float | None = None) -> RevisionPair:
    text = f"draft {i}"
    target = f"better {i}" if gap else text
    messages = Prompt.of(str(i), "question").messages
    return RevisionPair(id=str(i), messages=messages, response=text, target=target, gap=gap, price=price)


def test_every_response_becomes_a_pair_with_the_best_one_as_its_target():
    pairs, counts = revision_pairs([ranking("a", ["bad", "best", "worse"], [1, 0, 3])])
    assert [(p.id, p.response, p.target, p.gap) for p in pairs] == [
        ("a#0", "bad", "best", 1),
        ("a#1", "best", "best", 0),
        ("a#2", "worse", "best", 3),
    ]
    assert counts == {"prompts": 1, "pairs": 3, "keep": 1, "ties": 0, "empty": 0, "equal": 0, "too_long": 0}


def test_equal_empty_and_tied_responses_are_left_out_and_counted():
    ranked = [
        ranking("equal", ["same", "same", "other"], [0, 1, 2]),
        ranking("empty", [" \n", "good", "poor"], [0, 1, 2]),  # the best that says something is the target
        ranking("ties", ["one", "two"], [0, 0]),
        ranking("alone", ["", "two"], [1, 0]),
        ranking("two best", ["one", "two", "three"], [0, 0, 1]),
    ]
    pairs, counts = revision_pairs(ranked)
    assert [(p.id, p.target, p.gap) for p in pairs] == [
        ("equal#0", "same", 0),
        ("equal#2", "same", 2),
        ("empty#1", "good", 0),
        ("empty#2", "good", 1),
        ("two best#0", "one", 0),
        ("two best#1", "two", 0),
        ("two best#2", "one", 1),
    ]
    assert counts == {"prompts": 5, "pairs": 7, "keep": 4, "ties": 2, "empty": 2, "equal": 1, "too_long": 0}


def test_long_texts_are_left_out_and_counted():
    tokenizer = tiny.tokenizer()
    short, long = ranking("a", ["cat.", "dog."], [0, 1]), ranking("b", ["cat. " * 200, "dog."], [0, 1])
    pairs, counts = revision_pairs([short, long], lambda pair: longest_text(tokenizer, pair, TEMPLATE) <= 128)
    assert [p.id for p in pairs] == ["a#0", "a#1"] and counts["too_long"] == 2
    for p in pairs:  # the bound holds for every text that training makes of the pair
        requests = [TEMPLATE.ask(p.messages, p.response), TEMPLATE.ask_warm_up(p.messages, p.response)]
        answers = [p.target, *(TEMPLATE.write(label, p.target) for label in TEMPLATE.labels)]
        longest = max(len(render_prompt(tokenizer, m)) for m in requests) + max(
            len(render_response(tokenizer, a)) for a in answers
        )
        assert longest == longest_text(tokenizer, p, TEMPLATE)


def test_rankings_that_do_not_match_their_responses_are_refused():
    with pytest.raises(ValueError, match="'a': 2 responses, 1 ranks"):
        revision_pairs([ranking("a", ["x", "y"], [0])])
    with pytest.raises(ValueError, match="a unique id"):
        revision_pairs([ranking("a", ["x", "y"], [0, 1])] * 2)


def test_price_is_the_perplexity_of_the_target():
    lm = tiny.make_lm()
    pairs, _ = revision_pairs(
        [ranking("cat dog", ["dog cat.", "cat dog."], [0, 1]), ranking("pig", ["a.", "b."], [0, 2])]
    )
    changed = [p for p in pairs if p.gap]
    prices = perplexities(lm, changed, TEMPLATE, batch_size=4)
    relative = relative_perplexities(lm, changed, TEMPLATE, batch_size=4)
    for p, price, ratio in zip(changed, prices, relative, strict=True):
        target = render_response(lm.tokenizer, p.target)
        request = render_prompt(lm.tokenizer, TEMPLATE.ask_warm_up(p.messages, p.response))
        revising, alone = (
            scoring.score_ids(lm, [prefix], [target])[0].mean()
            for prefix in (request, render_prompt(lm.tokenizer, p.messages))
        )
        assert price == pytest.approx(np.exp(-revising), rel=1e-4)
        assert ratio == pytest.approx(np.exp(alone - revising), rel=1e-4)
    labelled = label_pairs(lm, pairs, TEMPLATE, LabelConfig(batch_size=4))
    assert [p.price for p in labelled if p.gap] == pytest.approx(prices)
    assert all(p.price is None and p.label == "good" for p in labelled if not p.gap)
    assert sorted(p.label for p in labelled if p.gap) == ["bad", "wrong"]  # above and below the median


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 6), st.floats(1, 100)), min_size=1, max_size=30))
def test_labels_follow_the_price_or_the_gap(drawn):
    pairs = [pair(i, gap, price if gap else None) for i, (gap, price) in enumerate(drawn)]
    prices = [p.price for p in pairs if p.gap]
    for labelled, value, limit in (
        (by_price(pairs, TEMPLATE, None), "price", np.median(prices) if prices else None),
        (by_price(pairs, TEMPLATE, 10.0), "price", 10.0),
        (by_gap(pairs, TEMPLATE, None), "gap", 2),
        (by_gap(pairs, TEMPLATE, 4), "gap", 4),
    ):
        for before, after in zip(pairs, labelled, strict=True):
            expected = "good" if not before.gap else "wrong" if getattr(before, value) > limit else "bad"
            assert after == dataclasses.replace(before, label=expected)


def test_labels_of_nectars_ranks():
    ranked = ranking("n", [str(i) for i in range(7)], list(range(7)))
    labels = [p.label for p in by_gap(revision_pairs([ranked])[0], TEMPLATE, None)]
    assert labels == ["good", "bad", "bad", "wrong", "wrong", "wrong", "wrong"]


def test_pair_without_a_price_is_not_labelled_by_price():
    with pytest.raises(ValueError, match="no price"):
        by_price([pair(0, 1)], TEMPLATE, 2.0)


def test_statistics_report_whether_both_labellings_agree():
    def statistics(prices):
        pairs = [pair(i, i + 1, price) for i, price in enumerate(prices)]
        return label_statistics(by_price(pairs, TEMPLATE, None), TEMPLATE)

    agree, disagree = statistics([1.0, 2.0, 3.0, 4.0]), statistics([4.0, 3.0, 2.0, 1.0])
    assert agree["rank_agreement"] == pytest.approx(1) and disagree["rank_agreement"] == pytest.approx(-1)
    assert agree["same_label"] == 1.0 and disagree["same_label"] == 0.0
    assert (agree["wrong"], agree["bad"], agree["good"]) == (2, 2, 0) and agree["median_price"] == 2.5
    assert statistics([1.0])["rank_agreement"] is None


def labelled_pairs(counts: dict[str, int]) -> list[RevisionPair]:
    records = []
    for label, count in counts.items():
        for i in range(count):
            records.append(dataclasses.replace(pair(len(records), int(label != "good")), id=f"{label}{i}", label=label))
    return records


@pytest.mark.parametrize(
    ("mix", "expected"),
    [((1, 1, 1), (6, 6, 6)), ((1, 1, 0), (12, 12, 0)), ((2, 1, 1), (12, 6, 6)), ((0, 1, 2), (0, 3, 6))],
)
def test_selection_is_the_largest_in_the_proportions_of_the_mix(mix, expected):
    examples = reviser_examples(labelled_pairs({"wrong": 20, "bad": 12, "good": 6}), TEMPLATE, mix, seed=0)
    assert tuple(sum(e.response.startswith(f"{label} ") for e in examples) for label in TEMPLATE.labels) == expected


def test_draw_depends_on_seed_and_ids_only():
    pairs = labelled_pairs({"wrong": 20, "bad": 12, "good": 6})
    drawn = [
        {e.id for e in reviser_examples(order, TEMPLATE, (1, 1, 1), s)}
        for order, s in ((pairs, 0), (pairs[::-1], 0), (pairs, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_label_comes_first_and_targets_differ_from_inputs():
    pairs = labelled_pairs({"wrong": 2, "bad": 2, "good": 2})
    by_id = {p.id: p for p in pairs}
    for example in reviser_examples(pairs, TEMPLATE, (1, 1, 1), seed=0):
        p = by_id[example.id]
        assert example.messages == TEMPLATE.ask(p.messages, p.response)
        assert TEMPLATE.parse(example.response) == (p.label, p.response if p.label == "good" else p.target)
    warm = warm_up_examples(pairs, TEMPLATE)
    assert {e.id for e in warm} == {p.id for p in pairs if p.gap}
    assert all(e.response == by_id[e.id].target != by_id[e.id].response for e in warm)


def test_settings_out_of_range_are_refused():
    for wrong in ({"mix": (0, 0, 0)}, {"mix": (1, -1, 1)}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="mix is"):
            LabelConfig(**wrong)
