"""Two texts before any judge: outcomes, what a judge's identity depends on, and rows that belong together."""

import dataclasses
from pathlib import Path

import pytest

import tiny
from jaxsi.evals import asked as asked_module
from jaxsi.evals.answer_cache import AnswerCache, EvaluationError
from jaxsi.evals.asked import NO_SCORE
from jaxsi.evals.judging import Plan, check_aligned, estimate, identity, unique, unsampled
from jaxsi.evals.side_by_side import UNREADABLE, Row, SideBySide
from jaxsi.runs.records import Prompt, Response
from jaxsi.stages.judge import JudgeBy, judge_by
from jaxsi.stages.judges import Verifier
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.prompts.comparison import read_rubric
from jaxsi.stages.verdicts import JudgeConfig, judged


def length(prompt: str, response: str) -> float | None:
    """Longer is better; "?" has no score."""
    return None if response == "?" else float(len(response))


def other(prompt: str, response: str) -> float:
    return 0.0


def side_by_side(path: Path) -> SideBySide:
    config = JudgeConfig(num_samples=1, batch_size=2)
    return SideBySide(cache=AnswerCache(path), judge=judge_by(length), rubric=load_rubric(), config=config)


def rows(**texts: tuple[str, str]) -> dict[str, Row]:
    return {name: Row(Prompt.of(name, f"Task {name}"), *pair) for name, pair in texts.items()}


def test_outcomes_are_wins_losses_ties_and_failures_and_equal_texts_are_not_asked(tmp_path, monkeypatch):
    asked: list[str] = []  # not a global of the judge's function: what those hold is part of its identity
    before = JudgeBy.__call__

    def counted(self, lm, prompts, responses, *rest):
        asked.extend(response.text for response in responses)
        return before(self, lm, prompts, responses, *rest)

    monkeypatch.setattr(JudgeBy, "__call__", counted)
    given = rows(a=("long", "no"), b=("no", "long"), c=("one", "two"), d=("same", "same"), e=("?", "x"))
    assert side_by_side(tmp_path / "c.jsonl").plan(given, 1) == Plan(4, 0, 8, 0, 0)
    answered = side_by_side(tmp_path / "c.jsonl").ask(given)
    assert dict(answered.values) == {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.5} and answered.asked == 3
    assert answered.failures == {"e": NO_SCORE} and "same" not in asked
    asked.clear()
    again = side_by_side(tmp_path / "c.jsonl").ask(given)
    assert again.values == answered.values and again.asked == 0 and sorted(asked) == ["?", "x"]
    assert side_by_side(tmp_path / "c.jsonl").plan(given, 2) == Plan(8, 3, 10, 0, 0)
    swapped = side_by_side(tmp_path / "c.jsonl").ask(rows(a=("no", "long")))
    assert swapped.values == {"a": 0.0} and swapped.asked == 1


class Speaker:
    """Writes a verdict for responses that are not "?", of which it only hums."""

    fingerprint = template = ""

    def __init__(self):
        self.asked: list[str] = []

    def write(self, requests, cfg, key, num_samples, forced=()):
        self.asked += [request.text for request in requests]
        texts = {r.id: "hm" if ">?<" in r.text else "Verdict: A" for r in requests}
        return {id: [Response.of(f"{id}#0", id, 0, text)] for id, text in texts.items()}


def test_a_text_without_a_verdict_is_told_and_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(asked_module, "identity", lambda judging, cfg: "judge")
    given = rows(a=("x", "y"), e=("?", "x"))
    for asked in (4, 0):
        speaker = Speaker()
        judge = dataclasses.replace(
            side_by_side(tmp_path / "c.jsonl"),
            judge=lambda lm, *rest, by=speaker: judged(by, *rest),
            rubric=read_rubric("pairwise_judge"),
        )
        answered = judge.ask(given)
        assert dict(answered.values) == {"a": 0.5} and answered.failures == {"e": UNREADABLE}
        assert len(speaker.asked) == asked
        assert judge.cache.counts() == {
            "judged": asked // 2, "reused": 2 - asked // 2, "failed": 0, "torn_lines": 0, "failures": [],
        }  # fmt: skip


def test_identity_changes_with_the_function_the_known_answers_and_the_settings(tmp_path):
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "a", "answer": "1"}\n')
    verifier = Verifier(str(answers))
    before = identity(verifier)
    answers.write_text('{"prompt": "a", "answer": "2"}\n')
    assert identity(verifier) == identity(dataclasses.replace(verifier)) != before
    assert identity(judge_by(length)) == identity(judge_by(length)) != identity(judge_by(other))
    assert len({identity(judge_by(length), JudgeConfig(temperature=t)) for t in (0.0, 0.5)}) == 2
    assert identity(judge_by(length), JudgeConfig(batch_size=1)) == identity(judge_by(length), JudgeConfig())


def test_rows_that_do_not_belong_together_are_named():
    assert unique([("a", 1), ("b", 2)], "f.json") == {"a": 1, "b": 2}
    with pytest.raises(EvaluationError, match=r"f\.json: 'a' occurs twice"):
        unique([("a", 1), ("a", 2)], "f.json")
    check_aligned({"a": 1}, "x", {"a": 2}, "y")
    with pytest.raises(
        EvaluationError, match="x and y do not belong together: 1 and 2 prompts, of which 1 are the same"
    ):
        check_aligned({"a": 1}, "x", {"a": 2, "b": 3}, "y")


def test_plans_are_added_up():
    assert sum([Plan(2, 1, 1, 10, 5), Plan(1, 0, 1, 3, 2)], Plan()) == Plan(3, 1, 2, 13, 7)


def test_a_response_that_is_not_there_counts_as_many_tokens_as_it_may_get():
    lm = tiny.make_lm()
    for text in (unsampled(50), unsampled(50, "response-a")):
        assert len(lm.tokenizer.encode_text(text)) >= 50
        assert estimate(None, [Prompt.of("x", text)], 7)["prompt_tokens"] >= 50
