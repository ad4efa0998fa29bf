"""A judge's agreement with people: cases worked out by hand, published counts, and the formats of files."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from jaxsi.cli.main import main
from jaxsi.evals.agreement import Pair, Verdict, agreement, majority, orders
from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.evals.human_labels import read_labels, read_scores, read_verdicts
from jaxsi.runs.metrics import calibration, macro_scores
from jaxsi.runs.records import RecordError, to_json

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published judgments are not here")
VOTES, GPT4 = (DATA / "mt_bench" / "human_judgments" / name for name in ("human.jsonl", "gpt4_pair.jsonl"))


def pair(id, labels, group="", item=None, first="x", second="y"):
    return Pair(id=id, item=item or id, first=first, second=second, labels=tuple(labels), group=group)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_figures_worked_out_by_hand():
    pairs = [pair("1", "AAB"), pair("2", "C"), pair("3", "B"), pair("4", "A"), pair("5", "A"), pair("6", "")]
    verdicts = [
        Verdict.of_orders("1", "A", "A"),
        Verdict.of_orders("2", "A", "B"),  # the one shown first wins in both orders
        Verdict.of_orders("3", "B", "C"),
        Verdict.of_orders("4", "A", None),  # no verdict
        Verdict.of_orders("6", "B", "A"),  # nobody voted; the one shown second wins in both orders
    ]
    found = agreement(pairs, verdicts)
    assert (found["pairs"], found["votes"], found["judged"]) == (5, 7, 3)
    assert (found["no_verdict"], found["not_asked"]) == (1, 1)
    assert found["with_ties"] == {"agree": 3, "of": 5, "rate": 0.6}  # A A of three votes, C; not B against the tie
    assert found["without_ties"] == {"agree": 2, "of": 3, "rate": pytest.approx(2 / 3)}
    assert found["humans"]["with_ties"] == {"agree": 1, "of": 3, "rate": pytest.approx(1 / 3)}
    assert found["majority"]["accuracy"] == pytest.approx(2 / 3)
    position = found["position"]
    assert (position["consistent"], position["of"], position["first"], position["second"]) == (1, 5, 1, 1)
    # Majorities A, C, B, A (and of pair 6 none) against both orders.
    assert position["accuracy_first_order"] == pytest.approx(3 / 4)
    assert position["accuracy_second_order"] == pytest.approx(1 / 4)
    assert position["accuracy_both"] == pytest.approx(1 / 4)
    assert "groups" not in found


def test_groups_have_their_own_figures_and_a_pair_has_one_verdict():
    pairs = [pair("1", "A", "turn 1"), pair("2", "B", "turn 2")]
    found = agreement(pairs, [Verdict(id="1", winner="A"), Verdict(id="2", winner="A")])
    assert [found["groups"][f"turn {n}"]["with_ties"]["agree"] for n in (1, 2)] == [1, 0]
    assert found["position"]["rate"] is None
    with pytest.raises(EvaluationError, match="two different verdicts about the pair '1'; leave one of the rows out"):
        agreement(pairs, [Verdict(id="1", winner="A"), Verdict(id="1", winner="B")])


def test_majority_of_three_different_votes_is_a_tie():
    assert [majority(votes) for votes in ("A", "AAB", "ABC", "AB", "BBC", "")] == ["A", "A", "C", "C", "B", None]


def test_orders_of_three_models_by_their_mean_scores():
    names = [("x", "y"), ("x", "z"), ("y", "z")]
    pairs = [pair(f"{a}{b}", "A", item="1", first=a, second=b) for a, b in names]
    right = [Verdict(id=p.id, winner="A") for p in pairs]
    found = orders(pairs, right)
    assert (found["accuracy"], found["exact_match"], found["best"], found["kendall"]) == (1, 1, 1, 1)
    assert found["models"] == {"models": 3, "spearman": pytest.approx(1), "kendall": pytest.approx(1)}
    wrong = [Verdict(id=p.id, winner="B") for p in pairs]
    assert orders(pairs, wrong)["kendall"] == pytest.approx(-1)
    assert orders([pair("1", "A")], [Verdict(id="1", winner="A")]) is None


def test_calibration_is_zero_for_honest_probabilities_and_their_distance_for_others():
    honest = calibration([0.75] * 4 + [0.25] * 4, [1, 1, 1, 0, 1, 0, 0, 0])
    assert honest["ece"] == pytest.approx(0) and honest["brier"] == pytest.approx(0.1875)
    boasting = calibration([1.0] * 4, [1, 0, 0, 1])
    assert boasting["ece"] == pytest.approx(0.5)
    assert boasting["bins"] == [{"count": 4, "probability": 1.0, "outcome": 0.5}]
    assert calibration([], [])["ece"] is None
    with pytest.raises(ValueError, match="probabilities hold"):
        calibration([1.5], [1])


def test_macro_scores_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics", reason="the comparison needs scikit-learn")
    truths, guesses = list("AABBCCCAB"), list("ABBBCAAAB")
    expected = sklearn.precision_recall_fscore_support(truths, guesses, average="macro", zero_division=0)[:3]
    assert list(macro_scores(truths, guesses).values()) == pytest.approx(list(expected))


def test_macro_scores_worked_out_by_hand():
    found = macro_scores(list("AAB"), list("ABC"))
    assert found["precision"] == pytest.approx((1 + 0 + 0) / 3)
    assert found["recall"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert found["f1"] == pytest.approx((2 / 3) / 3)


def test_orders_are_correlated_where_the_judge_has_one():
    """The other items are counted: a mean over no item is None."""
    names = [("x", "y"), ("x", "z"), ("y", "z")]
    pairs = [pair(f"{i}{a}{b}", "A", item=i, first=a, second=b) for i in "12" for a, b in names]
    verdicts = [Verdict(id=p.id, winner="A" if p.item == "1" else "C") for p in pairs]
    found = orders(pairs, verdicts)
    assert (found["spearman"], found["kendall"], found["constant_share"]) == (1, 1, 0.5)
    found = orders(pairs, [Verdict(id=p.id, winner="C") for p in pairs])
    assert (found["spearman"], found["kendall"], found["constant_share"]) == (None, None, 1)


LEADERBOARDS = """\ufeffModel,"Elo
[of people]",ours,theirs,mode,length
a,1200,90,1,community,
b,1100,80.5,2,community,7
c,,70,3,community,8

d,1000,85
e,900,-
"""


def test_benchmarks_are_compared_with_the_order_of_people(tmp_path, capsys):
    """A short row and an empty cell are models without a score, a column of words is no benchmark."""
    path = tmp_path / "boards.csv"
    path.write_text(LEADERBOARDS, encoding="utf-8")
    words = ["eval", "agreement", "--scores", str(path)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["truth"] == "Elo [of people]" and list(found["benchmarks"]) == ["ours", "theirs", "length"]
    assert found["benchmarks"]["ours"] == {
        "models": 3, "spearman": pytest.approx(0.5), "kendall": pytest.approx(1 / 3)
    }  # fmt: skip
    assert found["benchmarks"]["theirs"] == {"models": 2, "spearman": -1.0, "kendall": -1.0}
    assert found["benchmarks"]["length"] == {"models": 1, "spearman": None, "kendall": None}
    assert main([*words, "--truth", "Elo\n[of people]"]) == 0
    assert "theirs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--truth", "mode"], "--truth 'mode' is no column with scores; they are Elo [of people], ours, theirs"),
        (["--human", "x.jsonl"], "or --scores (of models); one of them"),
        (["--judge", "model:x"], "--scores takes no --verdicts and no --judge"),
    ],
)
def test_scores_of_models_need_a_column_and_no_judge(tmp_path, capsys, more, message):
    path = tmp_path / "boards.csv"
    path.write_text(LEADERBOARDS, encoding="utf-8")
    assert main(["eval", "agreement", "--scores", str(path), *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 columns with scores"),
        ("Model,a\nx,1\n", "1 columns with scores; it needs two"),
        ("Model,a,a\nx,1,2\n", "the column 'a' occurs twice"),
        ("Model,a,b\nx,1,2\nx,2,3\n", "the model 'x' occurs twice"),
        ("Model,a,b\nx,1,2\ny,2,about 3\n", "b of y is 'about 3'; it is a number, or empty"),
        ('Model,a,b\nx,"1,2\n', "not a CSV file"),
    ],
)
def test_bad_scores_of_models_are_refused(tmp_path, text, message):
    path = tmp_path / "boards.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        read_scores(path)


# ------------------------------------------------------------------------------------------------- published figures


@needs_data
def test_gpt4_agrees_with_experts_on_mt_bench_as_often_as_published():
    """Table 5 of arXiv 2306.05685: experts' votes, and a verdict that depends on the order is a tie."""
    labelled = read_labels(VOTES, "expert")
    verdicts, others = read_verdicts(GPT4)
    known = {p.id for p in labelled.pairs}
    found = agreement([*labelled.pairs, *(p for p in others if p.id not in known)], verdicts)
    counts = {
        name: [(group[part]["agree"], group[part]["of"]) for part in ("with_ties", "without_ties")]
        for name, group in found["groups"].items()
    }
    assert counts == {"turn 1": [(886, 1343), (727, 859)], "turn 2": [(871, 1325), (731, 864)]}
    humans = {
        name: [(group["humans"][part]["agree"], group["humans"][part]["of"]) for part in ("with_ties", "without_ties")]
        for name, group in found["groups"].items()
    }
    assert humans == {"turn 1": [(454, 721), (388, 479)], "turn 2": [(471, 707), (388, 474)]}
    assert (found["position"]["of"] - found["position"]["consistent"], found["position"]["of"]) == (380, 2400)


@needs_data
def test_gpt4_orders_models_on_mt_bench_as_the_reference_says():
    """A scipy computation: means of correlations over the 159 groups on which the judge has an order."""
    labelled, (verdicts, others) = read_labels(VOTES), read_verdicts(GPT4)
    known = {p.id for p in labelled.pairs}
    found = orders([*labelled.pairs, *(p for p in others if p.id not in known)], verdicts)
    assert (found["prompts"], found["pairs"]) == (160, 2302)
    assert found["accuracy"] == pytest.approx(0.7363, abs=5e-5)
    assert found["best"] == pytest.approx(0.475, abs=5e-5)
    assert found["spearman"] == pytest.approx(0.7340, abs=5e-5)
    assert found["kendall"] == pytest.approx(0.6428, abs=5e-5)
    assert found["constant_share"] == pytest.approx(1 / 160)
    assert found["models"]["spearman"] == pytest.approx(0.943, abs=5e-4)
    assert found["models"]["kendall"] == pytest.approx(0.867, abs=5e-4)


@needs_data
@pytest.mark.parametrize(("part", "count", "first"), [("Natural", 100, 42), ("Adversarial/GPTInst", 92, 45)])
def test_llmbar_is_read_with_its_texts(part, count, first):
    labelled = read_labels(DATA / "llmbar" / "LLMBar" / part / "dataset.json.gz")
    assert len(labelled.pairs) == len(labelled.texts) == count
    assert sum(p.labels == ("A",) for p in labelled.pairs) == first
    assert all(texts.first and texts.second and texts.prompt.text for texts in labelled.texts.values())


# ------------------------------------------------------------------------------------------------------------ formats


def test_votes_are_the_same_whichever_model_stands_first(tmp_path):
    vote = {"question_id": 81, "turn": 2, "judge": "expert_1", "model_a": "b", "model_b": "a", "winner": "model_a"}
    swapped = vote | {"model_a": "a", "model_b": "b", "winner": "model_b", "question_id": "81"}
    other = vote | {"judge": "author_1", "winner": "tie"}
    path = written(tmp_path / "votes.jsonl", [vote, swapped, other])
    (found,) = read_labels(path).pairs
    assert (found.first, found.second, found.labels, found.group) == ("a", "b", ("B", "B", "C"), "turn 2")
    assert read_labels(path, "expert").pairs[0].labels == ("B", "B")
    with pytest.raises(RecordError, match="begins with 'nobody'"):
        read_labels(path, "nobody")


def test_fastchats_pair_judgments_have_both_orders(tmp_path):
    row = {"question_id": 81, "turn": 1, "model_1": "b", "model_2": "a", "g1_winner": "model_1", "g2_winner": "tie"}
    path = written(tmp_path / "pair.jsonl", [row, row | {"turn": 2, "g2_winner": "error"}])
    (first, second), pairs = read_verdicts(path)
    # Model b, which is the second one by name, is shown first in game 1: that is the second order.
    assert (first.orders, first.winner, first.is_inconsistent) == (("C", "B"), "C", True)
    assert (second.orders, second.winner, second.is_inconsistent) == ((None, "B"), None, True)
    assert [p.id for p in pairs] == [first.id, second.id]


def test_fastchats_grades_are_verdicts_about_every_two_models(tmp_path):
    rows = [
        {"question_id": 81, "turn": 1, "model": model, "score": score}
        for model, score in (("a", 7), ("b", 9), ("c", -1), ("a", 9.5))
    ]
    verdicts, pairs = read_verdicts(written(tmp_path / "single.jsonl", rows))
    assert {v.id.partition(", ")[2].partition(", ")[2]: v.winner for v in verdicts} == {
        "a | b": "A",  # the later of two grades counts
        "a | c": None,
        "b | c": None,
    }
    assert len(pairs) == 3


def test_llmbars_results_have_both_orders(tmp_path):
    rows = [{"input": "q", "output_1": "x", "output_2": "y", "label": label} for label in (1, "2")]
    results = [{"swap = False": {"winner": "1"}, "swap = True": {"winner": None}}]
    human = tmp_path / "dataset.json"
    human.write_text(json.dumps(rows))
    path = tmp_path / "result.json"
    both = [{"swap = False": {"winner": "2"}, "swap = True": {"winner": "2"}}]
    path.write_text(json.dumps([row | {"results": r} for row, r in zip(rows, (results, both), strict=True)]))
    verdicts, _ = read_verdicts(path)
    found = agreement(read_labels(human).pairs, verdicts)
    assert found["with_ties"] == {"agree": 1, "of": 1, "rate": 1.0}
    position = found["position"]
    assert (position["accuracy_first_order"], position["accuracy_second_order"]) == (1.0, 0.5)
    assert (position["consistent"], position["of"]) == (1, 2)  # an order without a winner is no equal answer


def test_the_last_of_llmbars_results_has_the_winners(tmp_path):
    """Before it stand texts (a reference, metrics), or the two verdicts that a second question resolved. Two orders
    without a winner are the same answer in LLMBar's own statistics."""
    neither, disagreeing, both = (
        {"swap = False": {"winner": a}, "swap = True": {"winner": b}} for a, b in ((None, None), ("1", "2"), ("2", "2"))
    )
    rows = [[disagreeing, both], [["What matters", "stop"], ["A reference", "stop"], both], [neither]]
    path = tmp_path / "result.json"
    path.write_text(json.dumps([{"label": 2, "results": results} for results in rows]))
    verdicts, _ = read_verdicts(path)
    assert [v.winner for v in verdicts] == ["B", "B", None]
    assert [v.is_inconsistent for v in verdicts] == [False, False, False]
    path.write_text(json.dumps([{"label": 2, "results": [both, ["A reference", "stop"]]}]))
    with pytest.raises(RecordError, match="results end in no winners"):
        read_verdicts(path)


def test_pandalms_results_that_cannot_be_read_are_ties(tmp_path):
    rows = [
        {"idx": i, "instruction": "q", "input": "", "response1": "x", "response2": "y"}
        | {f"annotator{k}": vote for k, vote in enumerate(votes, start=1)}
        for i, votes in enumerate(([1, 1, 2], [0, 1, 2], [2, 2, 2]))
    ]
    human = tmp_path / "testset.json"
    human.write_text(json.dumps(rows))
    path = tmp_path / "result.json"
    path.write_text(json.dumps([{"idx": i, "gpt_result": r} for i, r in enumerate(("1", "garbage", "Tie"))]))
    labelled = read_labels(human)
    assert [p.labels for p in labelled.pairs] == [("A", "A", "B"), ("C", "A", "B"), ("B", "B", "B")]
    verdicts, _ = read_verdicts(path)
    assert [v.winner for v in verdicts] == ["A", "C", "C"]
    found = agreement(labelled.pairs, verdicts)
    assert found["majority"]["accuracy"] == pytest.approx(2 / 3) and found["unread"] == 1
    human.write_text(json.dumps([*rows, rows[1]]))
    with pytest.raises(RecordError, match=":4: idx 1 occurs twice"):
        read_labels(human)


def test_own_verdicts_are_read_as_they_were_written(tmp_path):
    verdicts = [
        Verdict.of_orders("1", "A", "B"),
        Verdict(id="2", winner=None),
        Verdict(id="3", winner="B", probability=0.2),
    ]
    path = written(tmp_path / "verdicts.jsonl", [to_json(verdict) for verdict in verdicts])
    assert read_verdicts(path) == (verdicts, [])


@pytest.mark.parametrize(
    ("reader", "rows", "message"),
    [
        (read_labels, [], "no rows"),
        (read_labels, [{"a": 1}], ":1: no format of human labels has the columns a"),
        (read_verdicts, [{"a": 1}], ":1: no format of verdicts has the columns a"),
        (read_labels, [[1]], ":1: a row is a JSON object"),
        (read_labels, [{"output_1": "x", "output_2": "y", "label": 3, "input": "q"}], ":1: label is 3; it is 1 or 2"),
        (
            read_verdicts,
            [{"question_id": 1, "turn": 1, "model_a": "a", "model_b": "b", "winner": "tie"}, {"question_id": 1}],
            ":2: no column 'model_a'",
        ),
        (
            read_verdicts,
            [{"question_id": 1.5, "turn": 1, "model_a": "a", "model_b": "b", "winner": "tie"}],
            ":1: question_id is 1.5; it is a whole number",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_line(reader, rows, message, tmp_path):
    with pytest.raises(RecordError, match=message):
        reader(written(tmp_path / "rows.jsonl", rows))


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-3, 90), st.floats(), st.text(max_size=4), st.just([{}]))
KEYS = ["question_id", "turn", "model_a", "model_b", "winner", "g1_winner", "g2_winner", "model_1", "model_2", "score"]
KEYS += ["model", "output_1", "output_2", "label", "results", "idx", "x_result", "response1", "response2", "annotator1"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from([*KEYS, "id", "input"]), VALUES, max_size=12), max_size=3))
def test_any_rows_are_read_or_refused_as_a_record_error(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for reader in (read_labels, read_verdicts):
        with contextlib.suppress(RecordError):
            reader(path)
