"""Rubrics that compare: how verdicts and rankings are read, and rubrics from files."""

import json

import pytest
from hypothesis import given, strategies as st

from jaxsi.stages.prompts import Rubric, load_rubric
from jaxsi.stages.prompts.comparison import PairwiseRubric, RankingRubric, RubricError, read_rubric, shipped_rubrics

PAIRWISE, RANKING = read_rubric("pairwise_judge"), read_rubric("ranking_judge")
assert isinstance(PAIRWISE, PairwiseRubric) and isinstance(RANKING, RankingRubric)

VERDICTS = [
    ("Verdict: A", "A"),
    ("Both are short.\n**Verdict:** B", "B"),
    ("Final verdict: [[C]]", "C"),
    ("verdict: tie", "C"),
    ("Verdict: Response A.", "A"),
    ("Verdict: Assistant B", "B"),
    ("Verdict: **A**", "A"),
    ("My final verdict is: [[B]]", "B"),
    ("I prefer [[A]], but only just.", "A"),
    ("Verdict: A\nOn second thought:\nVerdict: B", "B"),
    ("Verdict: A\nNote that [[B]] was longer.", "A"),
    ("Verdict: A or B", None),
    ("Verdict: A is better", None),
    ("Verdict: D", None),
    ("Verdict:\nA", None),
    ("The verdict A wins", None),
    ("A", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "winner"), VERDICTS)
def test_verdict_fills_its_line(text, winner):
    assert PAIRWISE.parse(text) == winner


def test_cut_off_verdict_is_none():
    assert PAIRWISE.parse("Verdict: A", cut_off=True) is None  # "Verdict: A and B are equal" may have been meant
    assert PAIRWISE.parse("Verdict: A\nBecause", cut_off=True) == "A"
    assert PAIRWISE.parse("I say [[A]]", cut_off=True) == "A"


RANKINGS = [
    ("Ranking: 2 > 3 > 1", [0.0, 1.0, 0.5]),
    ("So:\n**Ranking:** [2] > [1] > [3]", [0.5, 1.0, 0.0]),
    ("Ranking: 2>3=1.", [0.25, 1.0, 0.25]),
    ("Ranking: 1 = 2 = 3", [0.5, 0.5, 0.5]),
    ("Ranking: Response 2 > Response 1 > Response 3", [0.5, 1.0, 0.0]),
    ("Ranking: 2, 1, 3", [0.5, 1.0, 0.0]),
    ("Ranking: 3 > 2 > 1\nNo, sorry:\nRanking: 1 > 2 > 3", [1.0, 0.5, 0.0]),
    ("Ranking: 2 > 1", None),
    ("Ranking: 1 > 1 > 2", None),
    ("Ranking: 2 > 1 > 3 > 4", None),
    ("Ranking: 2 > 1 > 3 because it is short", None),
    ("Ranking: 2 3 1", None),
    ("2 > 3 > 1", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "scores"), RANKINGS)
def test_ranking_names_each_response_once(text, scores):
    assert RANKING.parse(text, 3) == scores


@given(st.text(alphabet="AB C[]:*\nverdictankgRV123>=,.", max_size=60), st.booleans())
def test_any_text_parses_or_is_none(text, cut_off):
    assert PAIRWISE.parse(text, cut_off=cut_off) in ("A", "B", "C", None)
    scores = RANKING.parse(text, 3)
    assert scores is None or (len(scores) == 3 and sum(scores) == pytest.approx(1.5))


def test_verdict_follows_the_forced_text():
    for text in ("A is short.", "A is short.\nVerdict: B", ""):
        for choice, winner in ((" A", "A"), (" B", "B"), (" C", "C")):
            assert PAIRWISE.parse(PAIRWISE.forced(text) + choice) == winner


def test_texts_are_inserted_unchanged():
    rubric = PairwiseRubric(name="short", template="{prompt}|{response_a}|{response_b}|{other}")
    assert rubric.render("{response_b}", "{prompt}", "b") == "{response_b}|{prompt}|b|{other}"
    assert 'number="2">{prompt}</response>' in RANKING.render("why?", ["one", "{prompt}"])


def test_slots_of_a_file_say_what_the_rubric_does(tmp_path):
    def read(text, name="mine.txt"):
        (tmp_path / name).write_text(text)
        return read_rubric(str(tmp_path / name))

    assert read("{prompt} {response} Score:\n") == Rubric(name="mine", template="{prompt} {response} Score:")
    assert read("{prompt} {response_a} {response_b}") == PairwiseRubric(
        name="mine", template="{prompt} {response_a} {response_b}"
    )
    assert read("{prompt} {responses}") == RankingRubric(name="mine", template="{prompt} {responses}")
    ten = {"template": "{prompt} {response}", "low": 1, "high": 10}
    assert read(json.dumps(ten), "ten.json") == Rubric(name="ten", **ten)
    assert read(json.dumps({"template": "{prompt} {responses}"}), "r.json").name == "r"
    for text, name, fault in [
        ("{prompt} alone", "a.txt", r"a\.txt: .*slots \['prompt'\]; it needs \{prompt\} and \{response\}"),
        ("{prompt} {response_a}", "b.txt", r"\{response_a\} and \{response_b\}"),
        ("{prompt} {prompt} {responses}", "c.txt", "exactly once each"),
        ("{", "d.json", "cannot be used"),
        ('{"low": 1}', "e.json", "needs an object with a template"),
        ('{"template": "{prompt} {response}", "hihg": 3}', "f.json", "it may have high, low, marker"),
        ('{"template": "{prompt} {response}", "high": "ten"}', "g.json", "cannot be used"),
        ('{"template": "{prompt} {response}", "low": 9}', "h.json", "low=9, high=5"),
    ]:
        with pytest.raises(RubricError, match=fault):
            read(text, name)


def test_shipped_rubrics_are_those_of_the_package():
    assert [read_rubric(name).name for name in shipped_rubrics()] == shipped_rubrics()
    assert read_rubric("self_rewarding_judge") == load_rubric()
