"""Best and worst of scored responses: ties, invalid records, joins by id, order, length control (traps 7, 9, 10)."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from jaxsi.runs.records import Judgment, Prompt, Response
from jaxsi.stages.pairs import best_and_worst, pair_statistics, permuted_within_prompt


def response(prompt_id, sample, tokens=(1, 2), finish="stop"):
    return Response(
        id=f"{prompt_id}#{sample}",
        prompt_id=prompt_id,
        sample=sample,
        text=f"text {sample}",
        token_ids=tuple(tokens),
        logps=(0.0,) * len(tokens),
        finish_reason=finish,
        fingerprint="weights",
        template="template",
    )


def judgment(response, score):
    scores = (None,) if score is None else (score,)
    return Judgment(
        id=response.id,
        prompt_id=response.prompt_id,
        scores=scores,
        score=score,
        texts=(f"of {response.id}",),
        fingerprint="weights",
        template="template",
    )


def world(table):
    """{prompt id: [(score, tokens, finish reason), ...]} -> candidates, judgments, prompts."""
    prompts = [Prompt.of(id, f"question {id}") for id in table]
    candidates = [
        response(id, sample, tokens=[sample, *range(100, 99 + length)], finish=finish)
        for id, rows in table.items()
        for sample, (_, length, finish) in enumerate(rows)
    ]
    scores = [score for rows in table.values() for score, _, _ in rows]
    return candidates, [judgment(c, s) for c, s in zip(candidates, scores, strict=True)], prompts


def picked(pairs):
    return [(pair.id, pair.chosen.sample, pair.rejected.sample) for pair in pairs]


def rows(*scores, length=4, finish="stop"):
    return [(score, length, finish) for score in scores]


def test_argmax_over_argmin_with_prompt_and_scores():
    pairs, counts = best_and_worst(*world({"a": rows(2.0, 4.5, 1.0, 3.0)}))
    (pair,) = pairs
    assert picked(pairs) == [("a", 1, 2)] and (pair.chosen_score, pair.rejected_score) == (4.5, 1.0)
    assert pair.messages == ({"role": "user", "content": "question a"},)
    assert counts["prompts"] == counts["pairs"] == 1 and counts["ties"] == 0


def test_prompt_with_equal_scores_has_no_pair_and_others_still_do():
    pairs, counts = best_and_worst(*world({"a": rows(4.0, 4.0, 4.0), "b": rows(4.0, 4.0, 3.0), "c": rows(2.0, 2.0)}))
    assert picked(pairs) == [("b", 0, 2)]
    assert counts["ties"] == 2 and counts["pairs"] == 1


def test_invalid_response_is_never_the_worst():
    pairs, counts = best_and_worst(
        *world({"a": rows(None, 3.0, None, 4.0), "b": rows(None, 3.0), "c": rows(None, None)})
    )
    assert picked(pairs) == [("a", 3, 1)]
    assert counts["unscored"] == 5 and counts["too_few"] == 2


def test_cut_off_response_is_dropped_and_may_be_rejected_only_by_option():
    table = {"a": [(5.0, 4, "length"), (3.0, 4, "stop"), (2.0, 4, "stop"), (1.0, 4, "length")]}
    pairs, counts = best_and_worst(*world(table))
    assert picked(pairs) == [("a", 1, 2)] and counts["cut_off"] == 2
    assert picked(best_and_worst(*world(table), reject_cut_off=True)[0]) == [("a", 1, 3)]
    only_cut_off = {"a": rows(5.0, 1.0, finish="length")}
    assert best_and_worst(*world(only_cut_off), reject_cut_off=True)[1]["too_few"] == 1
    assert picked(best_and_worst(*world(only_cut_off), reject_cut_off=True, choose_cut_off=True)[0]) == [("a", 0, 1)]
    assert picked(best_and_worst(*world(table), choose_cut_off=True)[0]) == [("a", 0, 2)]


def test_equal_token_ids_are_dropped():
    candidates, judgments, prompts = world({"a": rows(1.0, 5.0)})
    candidates = [dataclasses.replace(c, token_ids=(7, 8)) for c in candidates]
    pairs, counts = best_and_worst(candidates, judgments, prompts)
    assert pairs == [] and counts["identical"] == 1


def test_pairs_below_min_gap_are_dropped():
    table = {"a": rows(3.0, 3.5), "b": rows(3.0, 4.0)}
    pairs, counts = best_and_worst(*world(table), min_gap=1.0)
    assert picked(pairs) == [("b", 1, 0)] and counts["small_gap"] == 1


def test_length_decides_only_under_length_control():
    table = {"a": [(5.0, 90, "stop"), (5.0, 10, "stop"), (4.6, 5, "stop"), (1.3, 80, "stop"), (1.0, 9, "stop")]}
    assert picked(best_and_worst(*world(table))[0]) == [("a", 0, 4)]
    assert picked(best_and_worst(*world(table), length_control=0.05)[0]) == [("a", 1, 4)]
    assert picked(best_and_worst(*world(table), length_control=0.2)[0]) == [("a", 2, 3)]


@pytest.mark.parametrize("arguments", [{"length_control": 0.5}, {"length_control": -0.1}, {"min_gap": -1.0}])
def test_settings_out_of_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        best_and_worst([], [], [], **arguments)


def test_judgments_join_by_id_and_completely():
    candidates, judgments, prompts = world({"a": rows(1.0, 5.0)})
    with pytest.raises(ValueError, match="'a#1' has no judgment"):
        best_and_worst(candidates, judgments[:1], prompts)
    with pytest.raises(ValueError, match="'a#1' belongs to no candidate"):
        best_and_worst(candidates[:1], judgments, prompts)
    with pytest.raises(ValueError, match="judgment ids occur more than once"):
        best_and_worst(candidates, [*judgments, judgments[0]], prompts)
    with pytest.raises(ValueError, match="'a#0' is of prompt 'a'"):
        best_and_worst(candidates, judgments, [Prompt.of("b", "other")])
    with pytest.raises(ValueError, match=r"'a#0' is of prompt 'a'.*of 'b'"):
        best_and_worst(candidates, [dataclasses.replace(j, prompt_id="b") for j in judgments], prompts)


scored_rows = st.lists(
    st.tuples(
        st.none() | st.integers(0, 15).map(lambda thirds: thirds / 3),
        st.integers(1, 6),
        st.sampled_from(["stop", "length"]),
    ),
    max_size=6,
)
tables = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), scored_rows, max_size=4)
arguments_given = st.fixed_dictionaries(
    {
        "length_control": st.sampled_from([0.0, 0.1, 0.49]),
        "min_gap": st.sampled_from([0.0, 1.0]),
        "reject_cut_off": st.booleans(),
        "choose_cut_off": st.booleans(),
    }
)


@settings(deadline=None)
@given(tables, arguments_given)
def test_properties_of_every_pair(table, arguments):
    candidates, judgments, prompts = world(table)
    pairs, counts = best_and_worst(candidates, judgments, prompts, **arguments)
    score = {j.id: j.score for j in judgments}
    for pair in pairs:
        assert pair.chosen in candidates and pair.rejected in candidates
        assert pair.chosen.prompt_id == pair.rejected.prompt_id == pair.id
        assert pair.chosen_score == score[pair.chosen.id] and pair.rejected_score == score[pair.rejected.id]
        assert pair.chosen_score > pair.rejected_score
        assert pair.chosen_score - pair.rejected_score >= arguments["min_gap"]
        assert pair.chosen.finish_reason == "stop" or arguments["choose_cut_off"]
        assert pair.rejected.finish_reason == "stop" or arguments["reject_cut_off"]
        assert pair.chosen.token_ids != pair.rejected.token_ids
    reasons = ("pairs", "ties", "too_few", "small_gap", "identical")
    assert sum(counts[reason] for reason in reasons) == counts["prompts"] == len(prompts)


@settings(deadline=None)
@given(tables, arguments_given, st.randoms(use_true_random=False))
def test_order_of_records_changes_nothing(table, arguments, random):
    candidates, judgments, prompts = world(table)
    expected = best_and_worst(candidates, judgments, prompts, **arguments)
    random.shuffle(candidates)
    random.shuffle(judgments)
    assert best_and_worst(candidates, judgments, prompts, **arguments) == expected


def test_permuted_scores_stay_within_their_prompt_and_valid_stays_valid():
    table = {str(i): rows(0.0, 1.0, None, 2.0, 3.0) for i in range(60)}
    _, judgments, _ = world(table)
    permuted = permuted_within_prompt(judgments, seed=3)
    assert [(j.id, j.prompt_id, j.score is None) for j in permuted] == [
        (j.id, j.prompt_id, j.score is None) for j in judgments
    ]
    for id in table:
        assert Counter(j.score for j in permuted if j.prompt_id == id) == Counter([0.0, 1.0, None, 2.0, 3.0])
    assert all(j.scores == (j.score,) for j in permuted)
    # Uniform: each of the four scores comes to sample 0 of about a quarter of 60 prompts.
    first = Counter(j.score for j in permuted if j.id.endswith("#0"))
    assert set(first) == {0.0, 1.0, 2.0, 3.0} and max(first.values()) <= 30


@settings(deadline=None)
@given(st.randoms(use_true_random=False))
def test_permutation_does_not_depend_on_the_order(random):
    _, judgments, _ = world({"a": rows(0.0, 1.0, 2.0, 3.0), "b": rows(4.0, None, 5.0)})
    expected = {j.id: j for j in permuted_within_prompt(judgments, seed=1)}
    random.shuffle(judgments)
    assert {j.id: j for j in permuted_within_prompt(judgments, seed=1)} == expected


def test_permutations_differ_by_seed_and_prompt():
    _, judgments, _ = world({str(i): rows(*map(float, range(6))) for i in range(5)})
    by_prompt = [
        tuple(j.score for j in permuted_within_prompt(judgments, seed=1) if j.prompt_id == str(i)) for i in range(5)
    ]
    assert len(set(by_prompt)) == 5
    assert permuted_within_prompt(judgments, seed=1) != permuted_within_prompt(judgments, seed=2)


def test_pair_statistics():
    table = {"a": [(4.0, 10, "stop"), (1.0, 4, "stop")], "b": [(2.0, 4, "stop"), (3.0, 6, "stop")]}
    pairs, _ = best_and_worst(*world(table))
    assert pair_statistics(pairs) == {
        "gap": 2.0,
        "chosen_tokens": 8.0,
        "rejected_tokens": 4.0,
        "length_difference": 4.0,
    }
    assert set(pair_statistics([]).values()) == {None}
