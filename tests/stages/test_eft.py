"""EFT, the judge's own training data: whose order it follows, what it leaves out, and how its scores are thinned."""

import dataclasses
from collections import Counter

import pytest

from jaxsi.runs.records import Judgment, RankedResponses, SFTExample
from jaxsi.stages.eft import agreeing_examples, comparison_examples, eft_examples
from jaxsi.stages.prompts import Rubric
from jaxsi.stages.prompts.comparison import PairwiseRubric
from jaxsi.stages.rankings import no_reversal, whole_order

RUBRIC = Rubric(name="test", template="Q: {prompt} A: {response}")


def ranked(id, *ranks):
    messages = ({"role": "user", "content": f"question {id}"},)
    return RankedResponses(
        id=id, messages=messages, responses=tuple(f"answer {i}" for i in range(len(ranks))), ranks=ranks
    )


def judgments(id, *texts):
    """One judgment per response; each is a tuple of K texts (or one text)."""
    rows = [(row,) if isinstance(row, str) else row for row in texts]
    return [
        Judgment(
            id=f"{id}#{i}",
            prompt_id=id,
            scores=(None,) * len(row),
            score=None,
            texts=row,
            fingerprint="weights",
            template="template",
        )
        for i, row in enumerate(rows)
    ]


def eft(pairs, **arguments):
    """eft_examples of [(ranked, judgments), ...]."""
    flat = [judgment for _, group in pairs for judgment in group]
    settings = {"max_share": 1.0, "agrees": no_reversal} | arguments
    return eft_examples([record for record, _ in pairs], flat, RUBRIC, **settings)


def test_eft_keeps_responses_that_judge_and_humans_order_alike():
    examples, counts = eft(
        [
            (ranked("a", 0, 1, 2), judgments("a", "Great. Score: 5, and so on", "Fine.\nScore: 3", "Poor. Score: 1")),
            (ranked("b", 0, 1), judgments("b", "Poor. Score: 1", "Great. Score: 4")),
            (ranked("c", 0, 1), judgments("c", "Great. Score: 4", "Great. Score: 4")),
            (ranked("d", 0, 1, 2), judgments("d", "Great. Score: 4", "Great. Score: 4", "Fine. Score: 3")),
            (ranked("e", 0, 0, 1), judgments("e", "Great. Score: 4", "Poor. Score: 1", "Hm.")),
            (ranked("f", 0, 1), judgments("f", "Great. Score: 4", "cut off")),
        ]
    )
    assert [e.id for e in examples] == ["a#0", "a#1", "a#2", "d#0", "d#1", "d#2"]
    assert [e.response for e in examples[:3]] == ["Great. Score: 5", "Fine.\nScore: 3", "Poor. Score: 1"]
    assert examples[0].messages == ({"role": "user", "content": "Q: question a A: answer 0"},)
    assert (counts["prompts"], counts["agree"], counts["disagree"], counts["examples"]) == (6, 2, 4, 6)


def test_eft_takes_the_first_agreeing_judgment_whole():
    texts = judgments(
        "a", ("No. Score: 1", "Yes. Score: 4", "Oh. Score: 5"), ("Yes. Score: 2", "No. Score: 3", "Eh. Score: 0")
    )
    examples, _ = eft([(ranked("a", 0, 1), texts)])
    assert [e.response for e in examples] == ["Yes. Score: 4", "No. Score: 3"]


def test_eft_leaves_out_bare_scores():
    examples, counts = eft([(ranked("a", 0, 1), judgments("a", "**Score: 4**", "Weak. Score: 1"))])
    assert [e.id for e in examples] == ["a#1"] and counts["no_justification"] == 1


def test_order_of_all_responses_is_required_by_default():
    """People's ranks 0, 1, 2, 3 with the scores 5, 4, 4, 4 passed; so did a response without a score."""
    tied = [(ranked("a", 0, 1, 2, 3), judgments("a", *(f"Hm. Score: {score}" for score in (5, 4, 4, 4))))]
    unscored = [(ranked("b", 0, 1, 2), judgments("b", "Hm. Score: 5", "Hm.", "Hm. Score: 4"))]
    whole = [(ranked("c", 0, 1, 2), judgments("c", "Hm. Score: 5", "Hm. Score: 4", "Hm. Score: 2"))]
    for pairs, examples in ((tied, 0), (unscored, 0), (whole, 3)):
        assert len(eft(pairs, agrees=whole_order)[0]) == examples
    assert len(eft(tied)[0]) == 4 and len(eft(unscored)[0]) == 2  # the lenient rule
    flat = [judgment for _, group in tied for judgment in group]
    assert eft_examples([tied[0][0]], flat, RUBRIC)[1]["disagree"] == 1  # without being asked


def test_pairs_of_ift_are_left_out_and_not_their_prompts():
    """The whole prompt was left out, with all responses that IFT does not have."""
    question = ({"role": "user", "content": " Question  A "},)
    ift = [
        SFTExample(id="x", messages=question, response=" ANSWER 0"),
        SFTExample(id="y", messages=question, response="z"),
    ]
    scores = [("Yes. Score: 5", "Fair. Score: 4", "No. Score: 1")] * 2
    pairs = [(ranked(id, 0, 1, 2), judgments(id, *texts)) for id, texts in zip("ab", scores, strict=True)]
    examples, counts = eft(pairs, ift=ift)
    assert [e.id for e in examples] == ["a#1", "a#2", "b#0", "b#1", "b#2"]
    assert counts["in_ift"] == 1 and counts["agree"] == 2


def test_prompts_that_measure_the_judge_are_left_out_whole():
    pairs = [(ranked(id, 0, 1), judgments(id, "Yes. Score: 4", "No. Score: 1")) for id in "ab"]
    test = [
        RankedResponses(
            id="t", messages=({"role": "user", "content": "question  A"},), responses=("x", "y"), ranks=(0, 1)
        )
    ]
    examples, counts = eft(pairs, test=test)
    assert {e.id[0] for e in examples} == {"b"}
    assert (counts["in_test"], counts["agree"], counts["disagree"]) == (1, 1, 0)


def test_no_agreeing_judgment_is_an_error():
    with pytest.raises(ValueError, match=r"so there is no EFT; train the judge of M_0 first, take the lenient"):
        agreeing_examples([], [], RUBRIC)


def many():
    """120 examples: 60 of score 4, 40 of 3, 12 of 2 and 8 of 5."""
    scores = [(4, 3)] * 40 + [(4, 2)] * 12 + [(5, 4)] * 8
    return [
        (ranked(str(i), 0, 1), judgments(str(i), f"x{i}. Score: {a}", f"y{i}. Score: {b}"))
        for i, (a, b) in enumerate(scores)
    ]


def shares(examples):
    counts = Counter(e.response[-1] for e in examples)
    return {score: count / len(examples) for score, count in counts.items()}


def test_resampling_lets_no_score_dominate():
    raw, _ = eft(many())
    assert shares(raw)["4"] == 0.5
    thinned, counts = eft(many(), max_share=0.4)
    assert max(shares(thinned).values()) <= 0.4
    sizes = Counter(e.response[-1] for e in thinned)
    assert sizes == {"4": 40, "3": 40, "2": 12, "5": 8}  # the rare scores stay whole
    assert counts["thinned"] == 20 and counts["examples"] == 100


def test_resampling_depends_on_the_seed_and_not_on_the_order():
    first, _ = eft(many(), max_share=0.4, seed=1)
    again, _ = eft(many()[::-1], max_share=0.4, seed=1)
    other, _ = eft(many(), max_share=0.4, seed=2)
    assert sorted(e.id for e in first) == sorted(e.id for e in again) != sorted(e.id for e in other)


def test_share_that_cannot_be_met_is_raised_to_the_least_possible():
    pairs = [(ranked("a", 0, 1), judgments("a", "Yes. Score: 4", "No. Score: 1"))]
    examples, counts = eft(pairs, max_share=0.4)
    assert len(examples) == 2 and counts["thinned"] == 0 and counts["max_share_raised_to"] == 0.5
    assert "max_share_raised_to" not in eft(many(), max_share=0.4)[1]
    with pytest.raises(ValueError, match="max_share is 0"):
        eft(pairs, max_share=0.0)
    assert eft([], max_share=0.4)[0] == []


def test_judgments_that_do_not_fit_are_errors():
    pair = (ranked("a", 0, 1), judgments("a", "Yes. Score: 4"))
    with pytest.raises(ValueError, match="a#1 has no judgment"):
        eft([pair])
    with pytest.raises(ValueError, match="repeat an id"):
        eft([(pair[0], pair[1] * 2)])


# ------------------------------------------------------------------------------------------------ a judge that compares

PAIRWISE = PairwiseRubric(name="pair", template="Q: {prompt}\nA: {response_a}\nB: {response_b}")


def compared(id, *texts, samples=1):
    """Judgments whose texts compare response i with each other one; `texts[i]` holds them, by the other's number."""
    rows = judgments(id, *texts)
    return [dataclasses.replace(row, scores=(None,) * (samples * (len(texts) - 1))) for row in rows]


def comparisons(pairs, **arguments):
    flat = [judgment for _, group in pairs for judgment in group]
    return comparison_examples([record for record, _ in pairs], flat, PAIRWISE, **arguments)


def test_comparison_is_learnt_if_both_orders_name_the_better_response():
    examples, counts = comparisons(
        [
            (ranked("a", 0, 1), compared("a", "Clear. Verdict: A", "Short, so\nVerdict: B\nDone.")),
            (ranked("b", 1, 0), compared("b", "It is vague.\nVerdict: B", "Good.\nVerdict: A")),
            (ranked("c", 0, 1), compared("c", "First is best.\nVerdict: A", "First is best.\nVerdict: A")),
            (ranked("d", 0, 0), compared("d", "Good.\nVerdict: A", "Good.\nVerdict: B")),
            (ranked("e", 0, 1), compared("e", "Verdict: A", "Good.\nVerdict: B")),
            (ranked("f", 0, 1), compared("f", "Good.\n[[A]] I say", "Good. [[B]]")),
            (ranked("g", 0, 1), compared("g", (), "Good.\nVerdict: B")),
        ]
    )
    assert [example.id for example in examples] == ["b#0#1", "b#1#0", "f#0#1", "f#1#0"]
    assert [example.response for example in examples] == [
        "It is vague.\nVerdict: B", "Good.\nVerdict: A", "Good.\n[[A]]", "Good. [[B]]",
    ]  # fmt: skip
    assert examples[1].messages[0]["content"] == "Q: question b\nA: answer 1\nB: answer 0"
    expected = {"prompts": 7, "pairs": 6, "agree": 2, "disagree": 2, "no_justification": 1, "unread": 1, "examples": 4}
    assert {name: counts[name] for name in expected} == expected
    verdicts = Counter(PAIRWISE.parse(example.response) for example in examples)
    assert verdicts["A"] == verdicts["B"], "no place is right more often"


def test_first_right_text_of_each_order_is_taken_and_all_pairs_are_compared():
    texts = (
        ("no", "x\nVerdict: B", "y\nVerdict: A", "z\nVerdict: A"),  # 0 against 1: two texts; then against 2
        ("x\nVerdict: B", "u\nVerdict: A", "p\nVerdict: A", "q\nVerdict: C"),
        ("r\nVerdict: B", "s\nVerdict: B", "t\nVerdict: B", "Verdict: B"),
    )
    examples, counts = comparisons([(ranked("a", 0, 1, 2), compared("a", *texts, samples=2))])
    assert {example.id: example.response[0] for example in examples} == {
        "a#0#2": "y", "a#2#0": "r", "a#1#2": "p", "a#2#1": "t",
    }  # fmt: skip
    assert (counts["pairs"], counts["agree"], counts["disagree"]) == (3, 2, 1)


def test_comparisons_leave_out_demonstrations_and_the_prompts_of_the_test():
    pairs = [(ranked(id, 0, 1), compared(id, "Clear.\nVerdict: A", "Clear.\nVerdict: B")) for id in ("a", "b", "c")]
    shown = SFTExample(id="x", messages=({"role": "user", "content": "Question  A"},), response="answer 1")
    examples, counts = comparisons(pairs, ift=[shown], test=[ranked("b", 1, 0)])
    assert {example.id[0] for example in examples} == {"c"}
    assert (counts["in_ift"], counts["in_test"], counts["examples"]) == (1, 1, 2)


def test_rubric_decides_which_data_a_judge_learns():
    record, rows = ranked("a", 0, 1), compared("a", "Clear.\nVerdict: A", "Clear.\nVerdict: B")
    settings = {"agrees": whole_order, "max_share": 0.5, "seed": 1, "ift": [], "test": []}
    examples, _ = agreeing_examples([record], rows, PAIRWISE, **settings)
    assert [example.id for example in examples] == ["a#0#1", "a#1#0"]
    with pytest.raises(ValueError, match="no judgment of the 1 ranked prompts agrees"):
        agreeing_examples([ranked("a", 1, 0)], rows, PAIRWISE, **settings)
