"""A judge is asked about what people labelled: both orders, once, and again only where it failed."""

import dataclasses
import json

import pytest

from jaxsi.cli.main import main
from jaxsi.evals import asked as asked_module
from jaxsi.evals.agreement import agreement
from jaxsi.evals.answer_cache import AnswerCache
from jaxsi.evals.asked import Group, ask_judge, plan_groups, requests_of
from jaxsi.evals.asked_agreement import groups_of_pairs, verdicts_of
from jaxsi.evals.human_labels import read_labels
from jaxsi.runs.records import Prompt, Response
from jaxsi.stages.prompts.comparison import read_rubric
from jaxsi.stages.verdicts import JudgeConfig, judged

CFG = JudgeConfig(num_samples=1, temperature=0.0, top_p=1.0, batch_size=2)
PAIRWISE = read_rubric("pairwise_judge")
ROWS = [
    {"input": "q", "output_1": "a long answer", "output_2": "short", "label": 1},
    {"input": "r", "output_1": "brief", "output_2": "a longer answer", "label": 1},
    {"input": "s", "output_1": "same", "output_2": "same", "label": 2},
]


class Speaker:
    """Writes a verdict by a function of both responses; without one for a request that is too long."""

    fingerprint = template = ""

    def __init__(self, speak):
        self.speak, self.asked = speak, []

    def write(self, requests, cfg, key, num_samples, forced=()):
        written = {}
        for request in requests:
            self.asked.append(request.text)
            first = request.text.partition("<response_a>")[2].partition("</response_a>")[0]
            second = request.text.partition("<response_b>")[2].partition("</response_b>")[0]
            if (text := self.speak(first, second)) is not None:
                written[request.id] = [Response.of(f"{request.id}#0", request.id, 0, text)]
        return written


def judging_by(speaker):
    return lambda lm, prompts, responses, rubric, cfg, key: judged(speaker, prompts, responses, rubric, cfg, key)


@pytest.fixture(autouse=True)
def _judges_have_names(monkeypatch):
    monkeypatch.setattr(asked_module, "identity", lambda judging, cfg: "judge")


@pytest.fixture
def human(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(ROWS))
    return path


def asked(tmp_path, speak, human, cfg=CFG):
    labelled, speaker = read_labels(human), Speaker(speak)
    groups = groups_of_pairs(labelled.texts)
    found = ask_judge(AnswerCache(tmp_path / "a.jsonl"), judging_by(speaker), groups, PAIRWISE, cfg)
    return labelled.pairs, found, speaker


def longer(a, b):
    return f"Verdict: {'A' if len(a) > len(b) else 'B'}"


def test_pairs_are_asked_in_both_orders_and_never_twice(tmp_path, human):
    pairs, found, speaker = asked(tmp_path, longer, human)
    assert len(speaker.asked) == 4  # equal texts are a tie without a question
    verdicts = verdicts_of(found, PAIRWISE, CFG)
    assert [v.winner for v in verdicts] == ["A", "B", "C"]
    assert [v.orders for v in verdicts[:2]] == [("A", "A"), ("B", "B")]
    figures = agreement(pairs, verdicts)
    assert (figures["with_ties"]["agree"], figures["position"]["consistent"]) == (1, 2)
    _, again, silent = asked(tmp_path, None, human)
    assert silent.asked == [] and again.values == found.values and again.asked == 0


def test_a_judge_that_likes_the_first_place_is_inconsistent(tmp_path, human):
    pairs, found, _ = asked(tmp_path, lambda a, b: "Verdict: A", human)
    position = agreement(pairs, verdicts_of(found, PAIRWISE, CFG))["position"]
    assert (position["consistent"], position["of"], position["first"]) == (0, 2, 2)


def test_what_has_no_room_is_asked_again_and_a_text_without_a_verdict_is_not(tmp_path, human):
    pairs, found, _ = asked(tmp_path, lambda a, b: None if "long answer" in a + b else "hm", human)
    assert len(found.failures) == 1
    verdicts = verdicts_of(found, PAIRWISE, CFG)
    assert [v.winner for v in verdicts].count(None) == 2
    assert agreement(pairs, verdicts)["no_verdict"] == 2
    _, found, speaker = asked(tmp_path, longer, human)
    assert len(speaker.asked) == 2 and found.failures == {}


def test_what_is_missing_is_what_would_be_asked(tmp_path, human):
    groups, cache = groups_of_pairs(read_labels(human).texts), AnswerCache(tmp_path / "a.jsonl")
    judging = judging_by(Speaker(lambda first, second: None if "brief" in (first, second) else "[[A]]"))
    assert plan_groups(cache, judging, groups, PAIRWISE, CFG)[:3] == (3, 0, 6)
    found = ask_judge(cache, judging, groups, PAIRWISE, CFG)
    assert list(found.failures) == ["1"]
    assert plan_groups(cache, judging, groups, PAIRWISE, CFG)[:3] == (3, 2, 2)
    assert plan_groups(cache, judging, groups, PAIRWISE, CFG, seeds=2)[:3] == (6, 2, 8)


def test_an_estimate_counts_what_is_sent(human):
    groups = groups_of_pairs(read_labels(human).texts)
    assert len(requests_of(groups, PAIRWISE, CFG)) == 4
    assert len(requests_of(groups, PAIRWISE, dataclasses.replace(CFG, num_samples=3))) == 12
    assert len(requests_of(groups, read_rubric("self_rewarding_judge"), CFG)) == 6
    three = [Group("1", Prompt.of("1", "q"), ("a", "b", "c"))]
    assert len(requests_of(three, PAIRWISE, CFG)) == 6
    assert len(requests_of(three, read_rubric("ranking_judge"), CFG)) == 1


def test_command_asks_a_function_about_pairs_and_rankings(tmp_path, human, capsys):
    judge = tmp_path / "judges.py"
    judge.write_text("def length(prompt, response):\n    return float(len(response))\n")
    words = ["eval", "agreement", "--human", str(human), "--judge", f"function:{judge}:length"]
    words += ["--out", str(tmp_path / "out"), "--json"]
    found = []
    for _ in range(2):
        assert main(words) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [(run["judged"], run["reused"], run["failed"], run["unreadable"]) for run in found] == [
        (3, 0, 0, 0),
        (0, 3, 0, 0),
    ]
    assert (tmp_path / "out" / "judge_answers.jsonl").is_file()
    assert found[0]["with_ties"] == found[1]["with_ties"] == {"agree": 1, "of": 3, "rate": pytest.approx(1 / 3)}
    verdicts = tmp_path / "out" / "verdicts.jsonl"
    assert main(["eval", "agreement", "--human", str(human), "--verdicts", str(verdicts), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["with_ties"] == found[0]["with_ties"]
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text(json.dumps({"prompt": "q", "responses": ["aaa", "a", "aa"], "ranks": [0, 2, 1]}) + "\n")
    words = ["eval", "agreement", "--rankings", str(ranked), "--judge", f"function:{judge}:length"]
    assert main([*words, "--out", str(tmp_path / "other"), "--judge-seeds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["accuracy"], found["exact_match"], found["best"], found["kendall"]) == (1, 1, 1, 1)
    assert found["seeds"]["accuracy"] == {"values": [1, 1], "mean": 1, "sd": 0, "low": 1, "high": 1}
    assert main([*words, "--out", str(tmp_path / "other"), "--judge-seeds", "3", "--dry-run", "--json"]) == 0
    plan = {"questions": 3, "cached": 2, "calls": 3, "prompt_tokens": 0, "completion_tokens": 0}
    assert json.loads(capsys.readouterr().out) == {"dry_run": True, "judge": plan, "total": plan}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --human (pairs) or --rankings"),
        (["--human", "x.json"], "give --verdicts (a file) or --judge"),
        (["--human", "x.json", "--verdicts", "y.json"], "x.json: no such file"),
    ],
)
def test_command_says_what_is_missing(words, message, capsys):
    assert main(["eval", "agreement", *words]) == 2
    assert message in capsys.readouterr().err
