"""The embedded world's preferences for PIT and its control arms: exact gaps, and shuffled gaps."""

import dataclasses

import numpy as np
import pytest

import tiny
from jaxsi.runs.records import Prompt, Response
from jaxsi.stages import gap
from jaxsi.toyworld import world
from jaxsi.toyworld.pit_data import exact_gaps, permuted_gaps, pit_preferences

X = ({"role": "user", "content": "Reverse: cat red dog"},)
STORY = ({"role": "user", "content": "Tell me a story"},)
ITEMS = [(X, f"dog red cat {i}.", "dog red.") for i in range(24)]


def said(text: str) -> Response:
    return dataclasses.replace(tiny.response(Prompt.of("p", "x"), 0, [5]), text=text)


@pytest.fixture
def known(monkeypatch):
    """Gaps 0 .. N-1 over a zero point of ten; gives the list of calls."""
    calls = []

    def gaps(lm, items, request, *, batch_size=64):
        calls.append((lm, items, request, batch_size))
        return np.arange(len(items), dtype=np.float32), np.full(len(items), 10, np.float32)

    monkeypatch.setattr(gap, "gaps", gaps)
    return calls


def test_permuted_gaps_are_the_gains_in_another_order(known):
    gap, zero = permuted_gaps("model", ITEMS, "again", batch_size=7)
    assert known == [("model", ITEMS, "again", 7)]
    assert sorted(gap.tolist()) == [i - 10 for i in range(24)] and not zero.any() and zero.shape == (24,)
    moved = sum(g != i - 10 for i, g in enumerate(gap))
    assert moved > 12  # a shuffle leaves one in place on average


def test_permutation_depends_only_on_the_batch(known):
    first, again = (permuted_gaps("model", ITEMS, "again")[0].tolist() for _ in range(2))
    assert first == again == permuted_gaps("other", ITEMS, "another", batch_size=3)[0].tolist()
    as_responses = [(x, said(text), reference) for x, text, reference in ITEMS]
    assert permuted_gaps("model", as_responses, "again")[0].tolist() == first
    other = [(X, "dog red cat.", "dog red."), *ITEMS[1:]]
    assert permuted_gaps("model", other, "again")[0].tolist() != first


def test_permuted_gaps_carry_no_signal(known):
    """Over many batches every place has the same mean gap."""
    batches = [[(X, f"{i} {j}", "") for i in range(10)] for j in range(400)]
    mean = np.mean([permuted_gaps("model", batch, "")[0] for batch in batches], axis=0)
    np.testing.assert_allclose(mean, -5.5, atol=5 * 2.87 / 20)


def test_exact_gaps_match_a_hand_count():
    items = [
        (X, said("dog red cat."), "dog red."),  # 10 against 1 + 1 + 8 * 2/3
        (X, "Sure thing: dog red cat", "dog red cat."),  # 8 against 10
        (X, "cat.", "cat."),
        (STORY, "Once.", "Never."),
        (X, "", "dog red cat"),  # 0 against 9
    ]
    gap, zero = exact_gaps(None, items, "again", batch_size=2)
    np.testing.assert_allclose(gap, [8 / 3, -2, 0, np.nan, -9], rtol=1e-6)
    assert not zero.any() and gap.dtype == zero.dtype == np.float32 and gap.shape == zero.shape == (5,)


def test_exact_gaps_grade_the_last_message_of_a_conversation():
    talk = ({"role": "user", "content": "Reverse: cat red axe"}, {"role": "assistant", "content": "axe red cat."}, *X)
    np.testing.assert_allclose(exact_gaps(None, [(talk, "dog red cat.", "axe red cat.")], "")[0], [8 / 3], rtol=1e-6)


def test_preferences_have_two_responses_to_each_instruction():
    rankings = pit_preferences()
    assert len({r.id for r in rankings}) == len(rankings) > 1000
    totals = [[world.grade(r.messages[-1]["content"], text).total for text in r.responses] for r in rankings]
    assert all(len(t) == 2 and t[0] > t[1] for t in totals)
    assert sum(t[0] < 10 for t in totals) > 0.9 * len(rankings)
    assert sum(r.ranks == (1, 0) for r in rankings) / len(rankings) == pytest.approx(0.04, abs=0.015)
    assert not any(world.is_held_out(r.messages[-1]["content"]) for r in rankings)
