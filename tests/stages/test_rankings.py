"""Ranked responses: a file of one's own, two rules of agreement, and prompts that may not be trained on."""

import json

import pytest

from jaxsi.runs.config_snapshot import describe_config
from jaxsi.runs.records import RankedResponses, RecordError, SFTExample
from jaxsi.stages.rankings import (
    RankingFile,
    as_responses,
    judged_by_id,
    no_reversal,
    whole_order,
    without_prompts,
)

USER = {"role": "user", "content": "Why?"}


def test_as_responses_have_the_ids_that_judgments_join():
    record = RankedResponses(id="a", messages=(USER,), responses=("x", "y"), ranks=(0, 1))
    prompts, responses = as_responses([record])
    assert [p.id for p in prompts] == ["a"] and prompts[0].text == "Why?"
    assert [(r.id, r.prompt_id, r.sample, r.text) for r in responses] == [("a#0", "a", 0, "x"), ("a#1", "a", 1, "y")]
    with pytest.raises(ValueError, match="a#0 has no judgment"):
        judged_by_id([record], [])


@pytest.mark.parametrize(
    ("scores", "ranks", "whole", "lenient"),
    [
        ([5, 4, 2], [0, 1, 2], True, True),
        ([5, 4, 4, 4], [0, 1, 2, 3], False, True),
        ([4, 4], [0, 1], False, False),
        ([5, 3, 4], [0, 1, 2], False, False),
        ([3, 5, 4], [2, 0, 1], True, True),  # in any order
        ([5, 4, 2], [0, 0, 1], True, True),  # people's ties may have any scores
        ([5, None, 4], [0, 1, 2], False, True),
        ([5, 4], [0, 0], False, False),
        ([], [], False, False),
    ],
)
def test_rules_of_agreement(scores, ranks, whole, lenient):
    assert (whole_order(scores, ranks), no_reversal(scores, ranks)) == (whole, lenient)


def write(folder, *rows):
    path = folder / "rankings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_file_of_rankings_is_read(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "Why?", "responses": ["best", "worse", "worst"]},
        {"id": "x", "messages": [USER], "responses": ["b", "a", "c"], "ranks": [2, 1, 2]},
    )
    assert RankingFile(path)() == [
        RankedResponses(id="1", messages=(USER,), responses=("best", "worse", "worst"), ranks=(0, 1, 2)),
        RankedResponses(id="x", messages=(USER,), responses=("b", "a", "c"), ranks=(1, 0, 1)),
    ]
    other = write(tmp_path, {"ask": "Why?", "answers": ["a", "b"]})
    assert RankingFile(other, columns=("prompt=ask", "responses=answers"))()[0].responses == ("a", "b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Why?"}, r"rankings\.jsonl:1: no responses; name the column"),
        ({"prompt": "Why?", "responses": ["only"]}, "it must be a list of two or more texts"),
        ({"prompt": "Why?", "responses": ["a", ""]}, r'"responses" is .*; it must be a non-empty text'),
        ({"prompt": "Why?", "responses": ["a", "b"], "ranks": [0]}, "it must hold 2 whole numbers"),
        ({"prompt": "Why?", "responses": ["a", "b"], "ranks": [0, 0.5]}, "it must hold 2 whole numbers"),
        ({"responses": ["a", "b"]}, "no prompt: the columns are responses"),
    ],
)
def test_bad_rows_are_errors(tmp_path, row, message):
    with pytest.raises(RecordError, match=message):
        RankingFile(write(tmp_path, row))()


def test_config_keeps_the_path_of_a_file():
    described = {"__type__": "rankings.RankingFile", "path": "x.jsonl", "columns": [], "split": "train"}
    assert describe_config(RankingFile("x.jsonl")) == described


def test_columns_are_checked_in_the_config():
    with pytest.raises(ValueError, match="'answers' is not of the form COLUMN=NAME"):
        RankingFile("x.jsonl", columns=("answers",))


def test_demonstrations_of_the_test_prompts_are_left_out(caplog):
    test = [RankedResponses(id="t", messages=(USER,), responses=("x", "y"), ranks=(0, 1))]
    asked = SFTExample(id="1", messages=({"role": "user", "content": "why? "},), response="So.")
    other = SFTExample(id="2", messages=({"role": "user", "content": "How?"},), response="So.")
    assert without_prompts([asked, other], test) == [other]
    assert "1 of 2 demonstrations are left out" in caplog.text
