"""The embedded world's reviser data and control arms: coin-made ranks, and the exact grader as the reviser."""

import dataclasses
import itertools
from collections import Counter

import jax
import pytest

import tiny
from jaxsi.runs.records import Prompt, RankedResponses, Response
from jaxsi.stages.reviser import ReviseConfig
from jaxsi.toyworld import world
from jaxsi.toyworld.reviser import (
    TEMPLATE,
    by_coin,
    double_prompts,
    exact_best_of_n,
    exact_revise,
    half_prompts,
    stopping_prompts,
    unlabelled_prompts,
)

PROMPTS = [Prompt.of("p", "Reverse: cat red dog"), Prompt.of("q", "Sort A to Z: pie axe cat")]
STORY = Prompt.of("s", "Tell me a story")


def said(prompt_id: str, sample: int, text: str, finish: str = "stop") -> Response:
    response = tiny.response(Prompt.of(prompt_id, "x"), sample, [5])
    return dataclasses.replace(response, text=text, finish_reason=finish)


def revised(responses, prompts=PROMPTS, function=exact_revise):
    return function(None, prompts, responses, TEMPLATE, ReviseConfig(), jax.random.key(0))


def test_every_order_of_ranks_is_equally_likely():
    rankings = [RankedResponses(id=f"r{i}", messages=({"role": "user", "content": "x"},), responses=("a", "b", "c"),
                                ranks=(0, 1, 1)) for i in range(3000)]  # fmt: skip
    dealt = by_coin(rankings)
    assert dealt == by_coin(rankings)
    assert [dataclasses.replace(r, ranks=(0, 1, 1)) for r in dealt] == rankings, "nothing but the ranks is changed"
    shares = Counter(r.ranks for r in dealt)
    assert {ranks: n / 3000 for ranks, n in shares.items()} == pytest.approx(
        dict.fromkeys({*itertools.permutations((0, 1, 1))}, 1 / 3), abs=0.04
    )


def test_fair_coin_ranks_two_responses():
    rankings = [RankedResponses(id=f"r{i}", messages=({"role": "user", "content": "x"},), responses=("a", "b"),
                                ranks=(0, 1)) for i in range(3000)]  # fmt: skip
    assert sum(r.ranks == (0, 1) for r in by_coin(rankings)) / 3000 == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("draft", "label", "better"),
    [
        ("dog red cat.", "good", "dog red cat."),
        ("dog red cat", "bad", "dog red cat."),
        ("Sure thing: dog red cat", "bad", "dog red cat."),  # a grade of 8 is a minor revision
        ("dog red.", "wrong", "dog red cat."),
        ("", "wrong", "dog red cat."),
    ],
)
def test_exact_reviser_keeps_correct_drafts_and_rewrites_others(draft, label, better):
    response = said("p", 0, draft, "length")
    [revision] = revised([response])
    assert (revision.id, revision.prompt_id, revision.label, revision.label_probs) == ("p#0", "p", label, None)
    if label == "good":
        assert revision.response is response
    else:
        expected = {"text": better, "token_ids": (), "logps": (), "finish_reason": "stop", "fingerprint": "exact"}
        assert revision.response == dataclasses.replace(response, **expected)
    assert (TEMPLATE.major, TEMPLATE.minor, TEMPLATE.no) == ("wrong", "bad", "good")


def test_revisions_keep_the_order_of_responses():
    drafts = [said("q", 0, "cat."), said("p", 0, "dog red cat."), said("q", 1, "axe cat pie.")]
    assert [(r.id, r.response.text) for r in revised(drafts)] == [
        ("q#0", "axe cat pie."), ("p#0", "dog red cat."), ("q#1", "axe cat pie.")
    ]  # fmt: skip


def test_exact_best_of_n_takes_the_first_of_the_best():
    drafts = [
        said("q", 0, "axe cat"),
        said("p", 0, "dog red cat"),  # 9
        said("p", 1, "Sure thing: dog red cat."),  # 9 too, but later
        said("p", 2, "dog red."),
        said("q", 1, "axe cat pie."),  # 10
        said("q", 2, "axe cat pie."),
    ]
    best = revised(drafts, function=exact_best_of_n)
    assert [(r.id, r.label, r.prompt_id) for r in best] == [("p#0", "bad", "p"), ("q#1", "good", "q")]
    assert [r.response for r in best] == [drafts[1], drafts[4]]


def test_best_of_n_skips_cut_off_and_empty_drafts():
    drafts = [said("p", 0, "dog red cat.", "length"), said("p", 1, "dog."), said("q", 0, "axe cat pie.", "length"),
              said("q", 1, " ")]  # fmt: skip
    assert [r.id for r in revised(drafts, function=exact_best_of_n)] == ["p#1"]


@pytest.mark.parametrize("function", [exact_revise, exact_best_of_n])
def test_error_names_a_prompt_from_outside_the_world(function):
    with pytest.raises(ValueError, match="'s' is not an instruction of the embedded world"):
        revised([said("s", 0, "Once.")], [STORY], function)


def test_prompts_are_for_training_and_half_is_a_part_of_the_whole():
    new, half, double, stopping = unlabelled_prompts(), half_prompts(), double_prompts(), stopping_prompts()
    assert half == new[: len(new) // 2] and new == double[: len(double) // 2]
    assert not any(world.is_held_out(prompt.text) for prompt in double)
    assert all(world.is_held_out(prompt.text) for prompt in stopping)
