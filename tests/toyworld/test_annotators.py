"""Demonstrations of mixed quality and noisy rankings."""

import itertools
import random
import statistics

import pytest
from hypothesis import given, strategies as st

from jaxsi.toyworld.annotators import (
    MAX_RANKED,
    MODE_WEIGHTS,
    MODES,
    SLIP,
    demonstrate,
    ift,
    rankings,
    respond,
)
from jaxsi.toyworld.world import FAMILIES, grade, grade_task, instruction, is_held_out, parse, sample_task, tasks

tasks_drawn = st.integers(0, 2**32).map(lambda seed: sample_task(random.Random(seed)))

WORKED = {
    "Reverse: cat red axe pie": ("cat red axe pie.", "pie red axe cat.", "pie axe red."),
    "Sort A to Z: pie axe cat": ("pie axe cat.", "pie cat axe.", "axe cat."),
    "Keep the animals: cat red dog axe": ("cat red dog axe.", "red axe.", "cat."),
    "Keep the tools: cat red axe": ("cat red axe.", "cat red.", "axe axe."),
    "Count the foods: egg red pie cow": ("4.", "3.", "1."),
    "Count the foods: egg red cow": ("3.", "2.", "0."),
    "Add 2 to each: 3 7 4": ("3 7 4.", "1 5 2.", "5 9."),
    "Add 2 to each: 1 7 4": ("1 7 4.", "4 10 7.", "3 9."),
    "Replace red with dog: cat red axe": ("cat red axe.", "cat axe.", "cat dog."),
    "Drop repeats: cat red cat": ("cat red cat.", "red.", "cat."),
    "Swap first and last: cat red axe pie": ("cat red axe pie.", "pie axe red cat.", "pie red axe."),
}


@pytest.mark.parametrize("text", WORKED)
def test_mistakes_match_hand_written_examples(text):
    task = parse(text)
    assert tuple(respond(task, mode) for mode in ("copies", "misreads", "hurried")) == WORKED[text]
    right = " ".join(task.answer)
    assert respond(task, "careful") == f"{right}."
    assert respond(task, "chatty") == f"Sure thing: {right}."
    assert respond(task, "unfinished") == right


@given(tasks_drawn)
def test_each_mode_gets_its_grade(task):
    totals = {mode: grade(instruction(task), respond(task, mode)).total for mode in MODES}
    assert totals["careful"] == 10 and totals["chatty"] == totals["unfinished"] == 9
    assert totals["hurried"] < 10
    for mode in ("copies", "misreads", "hurried"):
        result = grade_task(task, respond(task, mode))
        assert result.form  # only their content is wrong
        assert result.total == 10 or respond(task, mode) != respond(task, "careful")


@given(tasks_drawn)
def test_modes_are_distinguishable(task):
    texts = {respond(task, mode) for mode in MODES}
    assert len(texts) >= MAX_RANKED
    assert len({respond(task, mode) for mode in ("careful", "hurried", "chatty", "unfinished")}) == 4


def test_modes_are_distinct_for_most_tasks():
    drawn = tasks(2000, seed=0, held_out=False)
    assert statistics.mean(len({respond(task, mode) for mode in MODES}) == len(MODES) for task in drawn) > 0.8


def test_modes_are_drawn_by_their_weights():
    assert sum(MODE_WEIGHTS.values()) == pytest.approx(1)
    rng = random.Random(0)
    task = parse("Reverse: cat red axe pie")
    drawn = [demonstrate(task, rng) for _ in range(8000)]
    for mode, weight in MODE_WEIGHTS.items():
        assert sum(mode == other for _, other in drawn) / 8000 == pytest.approx(weight, abs=0.02)
    assert all(text == respond(task, mode) for text, mode in drawn)


def test_best_of_four_beats_the_mean_demonstration():
    """The best of four is at least two grades above the mean, which itself leaves room: what the loop can gain."""
    means, bests = [], []
    for task in tasks(2000, seed=1, held_out=False):
        totals = {mode: grade_task(task, respond(task, mode)).total for mode in MODES}
        means.append(sum(weight * totals[mode] for mode, weight in MODE_WEIGHTS.items()))
        best, below = 0.0, 0.0
        for total in sorted(set(totals.values())):
            within = sum(weight for mode, weight in MODE_WEIGHTS.items() if totals[mode] <= total)
            best, below = best + total * (within**4 - below**4), within
        bests.append(best)
    assert 6 < statistics.mean(means) < 8
    assert statistics.mean(bests) - statistics.mean(means) >= 2


def test_ift_mixes_good_and_bad_training_responses():
    examples = ift(400, seed=5)
    texts = [example.messages[0]["content"] for example in examples]
    assert len({example.id for example in examples}) == len(set(texts)) == 400
    assert not any(map(is_held_out, texts))
    assert {parse(text).family for text in texts} == set(FAMILIES)
    totals = [grade(text, example.response).total for text, example in zip(texts, examples, strict=True)]
    assert min(totals) < 5 and 0.25 < totals.count(10) / 400 < 0.55
    assert examples == ift(400, seed=5) and examples != ift(400, seed=6)


@pytest.mark.parametrize("per_prompt", [2, 4, MAX_RANKED])
def test_rankings_rank_different_responses(per_prompt):
    ranked = rankings(200, seed=2, per_prompt=per_prompt)
    assert len({record.id for record in ranked}) == 200
    for record in ranked:
        assert not is_held_out(record.messages[0]["content"])
        assert len(set(record.responses)) == per_prompt
        assert sorted(record.ranks) == list(range(per_prompt))
    assert ranked == rankings(200, seed=2, per_prompt=per_prompt)


def test_rankings_follow_the_grade_except_for_a_few_slips():
    slips = untied = 0
    for record in rankings(3000, seed=0):
        totals = [grade(record.messages[0]["content"], text).total for text in record.responses]
        best_first = [total for _, total in sorted(zip(record.ranks, totals, strict=True))]
        for better, worse in itertools.pairwise(best_first):
            untied += better != worse
            slips += better < worse
    assert untied > 5000
    # Each neighbouring pair is exchanged with probability SLIP; the response carried on may be exchanged again.
    assert slips / untied == pytest.approx(SLIP, abs=0.015)


@pytest.mark.parametrize("per_prompt", [1, MAX_RANKED + 1])
def test_rankings_refuse_more_responses_than_exist(per_prompt):
    with pytest.raises(ValueError, match=f"per_prompt={per_prompt}.*2 to {MAX_RANKED}"):
        rankings(1, seed=0, per_prompt=per_prompt)
