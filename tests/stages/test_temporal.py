"""Pairs of Temporal Self-Rewarding: anchored rejection and future-guided choice, against a reading of their rules."""

import dataclasses
import random

import pytest
from hypothesis import given, strategies as st

import tiny
from jaxsi.runs.records import Judgment, Prompt, Response
from jaxsi.stages.temporal import Judged, anchored_pairs, future_guided

PROMPTS = [Prompt.of("p", "loop"), Prompt.of("q", "tree"), Prompt.of("r", "sun")]
ONE = st.tuples(st.one_of(st.none(), st.integers(1, 4)), st.booleans())  # the score, and whether the model ended it
ALL = st.lists(st.lists(ONE, max_size=4), min_size=3, max_size=3)


def model(number: int, rows: list[list[tuple[float | None, bool]]]) -> Judged:
    """A model's responses with their scores. Those of different models have the same ids, but other tokens."""
    responses: list[Response] = []
    judgments: list[Judgment] = []
    for prompt, row in zip(PROMPTS, rows, strict=True):
        for n, (score, stopped) in enumerate(row):
            responses.append(tiny.response(prompt, n, [10 + number, 20 + n], stopped=stopped))
            value = None if score is None else float(score)
            judgments.append(
                Judgment(
                    id=f"{prompt.id}#{n}", prompt_id=prompt.id, scores=(value,), score=value, texts=("",),
                    fingerprint="", template="",
                )
            )  # fmt: skip
    return Judged(responses, judgments)


def name(response: Response) -> tuple[int, int]:
    """Which model's, and which sample."""
    return response.token_ids[0] - 10, response.token_ids[1] - 20


def usable(row, number, cut_off):
    return [(score, (number, n)) for n, (score, ended) in enumerate(row) if score is not None and (ended or cut_off)]


def both_phases(present, past, future, cut_off):
    """The two rules, as the paper's notes word them, of one prompt: (chosen, rejected) after each phase, or None."""
    own, old, new = (usable(row, n, cut_off) for n, row in enumerate((present, past, future)))
    if not own:
        return None
    top, low = max(score for score, _ in own), min(score for score, _ in own)
    chosen = next(x for x in own if x[0] == top)
    rejected = next(x for x in own if x[0] == low)
    lowest_old = min((score for score, _ in old), default=low)
    if lowest_old < low:
        rejected = next(x for x in old if x[0] == lowest_old)
    if chosen[0] == rejected[0]:
        return None
    first = (chosen, rejected)
    best_new = max((score for score, _ in new), default=chosen[0])
    if best_new > chosen[0]:
        chosen = next(x for x in new if x[0] == best_new)
    return first, (chosen, rejected)


def sides(pair):
    return (pair.chosen_score, name(pair.chosen)), (pair.rejected_score, name(pair.rejected))


@given(ALL, ALL, ALL, st.booleans())
def test_pairs_follow_the_two_rules(present, past, future, cut_off):
    expected = {
        prompt.id: found
        for prompt, *rows in zip(PROMPTS, present, past, future, strict=True)
        if (found := both_phases(*rows, cut_off)) is not None
    }
    anchored, counts = anchored_pairs(PROMPTS, model(0, present), model(1, past), cut_off=cut_off)
    guided, more = future_guided(anchored, model(2, future), cut_off=cut_off)
    assert [pair.id for pair in anchored] == [pair.id for pair in guided] == list(expected)
    assert [(sides(a), sides(b)) for a, b in zip(anchored, guided, strict=True)] == list(expected.values())
    assert all(pair.chosen_score > pair.rejected_score and pair.agreement == 1 for pair in anchored + guided)
    assert counts["prompts"] == 3 == counts["pairs"] + counts["ties"] + counts["too_few"]
    assert counts["past"] == sum(first[1][1][0] == 1 for first, _ in expected.values())
    assert more == {"pairs": len(guided), "future": sum(last[0][1][0] == 2 for _, last in expected.values())}


@given(ALL, ALL, ALL, st.integers(0, 99))
def test_order_of_the_records_does_not_matter(present, past, future, seed):
    def mixed(judged: Judged) -> Judged:
        rng = random.Random(seed)
        return Judged(*(rng.sample(list(part), len(part)) for part in judged))

    models = [model(n, rows) for n, rows in enumerate((present, past, future))]
    straight, counts = anchored_pairs(PROMPTS, *models[:2])
    again, counts_again = anchored_pairs(PROMPTS, *map(mixed, models[:2]))
    assert again == straight and counts_again == counts
    assert future_guided(again, mixed(models[2])) == future_guided(straight, models[2])


@pytest.mark.parametrize(
    ("present", "past", "chosen", "rejected", "counts"),
    [
        ([3, 1, 2], [2, 2], (0, 0), (0, 1), {"past": 0}),  # the past is not below the present's worst
        ([3, 1, 2], [1, 1], (0, 0), (0, 1), {"past": 0}),  # equal: the present's
        ([3, 2, 2], [1, 4], (0, 0), (1, 0), {"past": 1}),
        ([2, 2], [1], (0, 0), (1, 0), {"past": 1}),  # the present ties, the past does not
        ([2], [1], (0, 0), (1, 0), {"past": 1}),  # one response is enough
        ([1, 3, 3, 1], [], (0, 1), (0, 0), {"past": 0}),  # equal scores: the first sample
    ],
)
def test_anchored_rejection_by_hand(present, past, chosen, rejected, counts):
    rows = [[[(score, True) for score in scores], [], []] for scores in (present, past)]
    [pair], found = anchored_pairs(PROMPTS[:1], model(0, rows[0]), model(1, rows[1]))
    assert (name(pair.chosen), name(pair.rejected)) == (chosen, rejected)
    assert pair.messages == PROMPTS[0].messages
    assert found == {"prompts": 1, "pairs": 1, "ties": 0, "too_few": 0} | counts


def test_prompts_without_a_pair_are_counted():
    present = model(0, [[(2, True), (2, True)], [(None, True), (4, False)], [(5, True), (1, True)]])
    past = model(1, [[(2, True), (3, True)], [(1, True)], [(None, True), (0, False)]])
    [pair], counts = anchored_pairs(PROMPTS, present, past)
    assert pair.id == "r" and counts == {"prompts": 3, "pairs": 1, "past": 0, "ties": 1, "too_few": 1}
    pairs, counts = anchored_pairs(PROMPTS, present, past, cut_off=True)
    assert [pair.id for pair in pairs] == ["q", "r"] and counts["past"] == 2


def test_response_cut_off_within_its_thought_is_in_no_pair():
    present = model(0, [[(5, True), (1, False), (2, True)], [], []])
    thinking = dataclasses.replace(present.responses[1], text="", reasoning="Well")
    present = Judged([present.responses[0], thinking, present.responses[2]], present.judgments)
    [pair], _ = anchored_pairs(PROMPTS[:1], present, model(1, [[], [], []]), cut_off=True)
    assert name(pair.rejected) == (0, 2)


def test_future_takes_the_place_of_the_chosen_response_only_if_it_is_better():
    pairs, _ = anchored_pairs(PROMPTS, model(0, [[(3, True), (1, True)]] * 3), model(1, [[], [], []]))
    future = model(2, [[(3, True)], [(4, False), (2, True)], [(1, True), (4, True), (4, True)]])
    guided, counts = future_guided(pairs, future)
    assert [name(pair.chosen) for pair in guided] == [(0, 0), (0, 0), (2, 1)]
    assert [pair.chosen_score for pair in guided] == [3, 3, 4] and counts == {"pairs": 3, "future": 1}
    assert [name(pair.rejected) for pair in guided] == [(0, 1)] * 3
    assert future_guided(pairs, Judged([], []))[0] == pairs
