"""Alarms of a judge are sentences with the cause and what to do."""

import pytest

from jaxsi.stages.alarms import sentence

STATISTICS = {"parse_rate": 0.43, "tie_rate": 0.615, "histogram": {"0": 0.1, "5": 0.724, "4": 0.176, "3": None}}


@pytest.mark.parametrize(
    ("alarm", "words"),
    [
        ("one_score", ["72 % of its verdicts the score 5", "use harder prompts"]),
        ("ties", ["the same score on 62 % of the prompts", "sample more responses"]),
        ("parse_rate", ["only 43 % of the judge's texts", "set judge.expected"]),
        ("new", ["the alarm 'new'"]),
    ],
)
def test_alarm_says_its_cause_and_what_to_do(alarm, words):
    text = sentence(alarm, STATISTICS)
    assert all(word in text for word in words) and "{" not in text and "\n" not in text


@pytest.mark.parametrize("alarm", ["one_score", "ties", "parse_rate"])
def test_alarm_of_a_run_without_statistics_is_still_a_sentence(alarm):
    assert "None" not in sentence(alarm, {})
