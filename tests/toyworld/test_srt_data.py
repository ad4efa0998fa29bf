"""The embedded world's prompts for SRT and its control arms: exact scores, and directions by a coin."""

import dataclasses

import pytest
from hypothesis import given, settings, strategies as st

import tiny
from jaxsi.runs.records import PreferencePair, Prompt
from jaxsi.toyworld import world
from jaxsi.toyworld.critic import TEMPLATE
from jaxsi.toyworld.srt_data import by_coin, exact_scores, srt_prompts

PAIRS = [dataclasses.replace(p, chosen_score=9.0 - i % 3, rejected_score=i % 4) for i, p in
         enumerate(tiny.preference_pairs(40))]  # fmt: skip


def many(n: int) -> list[PreferencePair]:
    return [dataclasses.replace(PAIRS[i % len(PAIRS)], id=f"p{i}") for i in range(n)]


def sides(pair: PreferencePair) -> list[tuple]:
    return sorted([(pair.chosen.id, pair.chosen_score), (pair.rejected.id, pair.rejected_score)])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_coin_turns_pairs_and_keeps_scores_with_responses(seed):
    turned = by_coin(PAIRS, seed)
    assert len(turned) == len(PAIRS) and turned == by_coin(PAIRS, seed)
    for before, after in zip(PAIRS, turned, strict=True):
        assert (after.id, after.messages) == (before.id, before.messages)
        assert sides(after) == sides(before)
        assert after.chosen in (before.chosen, before.rejected) and after.chosen != after.rejected


def test_coin_is_fair_and_differs_by_seed():
    pairs = many(4000)
    unturned = [[a.chosen is b.chosen for a, b in zip(pairs, by_coin(pairs, seed), strict=True)] for seed in range(3)]
    assert [sum(k) / len(k) for k in unturned] == pytest.approx([0.5] * 3, abs=0.04)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert sum(x == y for x, y in zip(unturned[a], unturned[b], strict=True)) / 4000 == pytest.approx(0.5, abs=0.04)


def test_scores_are_exact_and_ignore_the_marker():
    prompt, other = Prompt.of("p", "Reverse: cat red dog"), Prompt.of("q", "Tell me a story")
    texts = {
        "dog red cat.": 10.0,
        "dog red cat.\nJudge:": 10.0,
        "dog red cat\nJudge:": 9.0,
        "Sure thing: dog red cat\nJudge:": 8.0,
        "dog red.\nJudge:": 2 + 8 * 2 / 3,
        "\nJudge:": 0.0,
    }
    drafts = [dataclasses.replace(tiny.response(prompt, i, [5]), text=text) for i, text in enumerate(texts)]
    drafts.append(dataclasses.replace(tiny.response(other, 0, [5]), text="Once.\nJudge:"))
    scores = exact_scores([prompt, other], drafts, drafts[::-1], TEMPLATE)
    assert scores[0] == [*map(pytest.approx, texts.values()), None] == scores[1][::-1]


def test_prompts_are_training_instructions():
    prompts = srt_prompts()
    assert len({prompt.id for prompt in prompts}) == len(prompts) > 1000
    assert all(world.parse(prompt.text) and not world.is_held_out(prompt.text) for prompt in prompts)
