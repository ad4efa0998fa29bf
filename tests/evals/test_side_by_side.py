"""Two texts before any judge: outcomes, what a judge's identity depends on, and rows that belong together."""

import dataclasses
from pathlib import Path

import pytest

from jaxsi.evals import side_by_side as module
from jaxsi.evals.answer_cache import AnswerCache, EvaluationError
from jaxsi.evals.judging import Plan, check_aligned, identity, unique, writer_of
from jaxsi.evals.side_by_side import Row, SideBySide
from jaxsi.runs.records import Prompt
from jaxsi.stages.judge import judge_by
from jaxsi.stages.judges import Verifier
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.verdicts import JudgeConfig


def length(prompt: str, response: str) -> float | None:
    """Longer is better; "?" has no score."""
    return None if response == "?" else float(len(response))


def other(prompt: str, response: str) -> float:
    return 0.0


def side_by_side(path: Path) -> SideBySide:
    config = JudgeConfig(num_samples=1, batch_size=2)
    return SideBySide(
        cache=AnswerCache(path), judging=judge_by(length), writer=None, rubric=load_rubric(), config=config
    )


def rows(**texts: tuple[str, str]) -> dict[str, Row]:
    return {name: Row(Prompt.of(name, f"Task {name}"), *pair) for name, pair in texts.items()}


def test_outcomes_are_wins_losses_ties_and_failures_and_equal_texts_are_not_asked(tmp_path, monkeypatch):
    asked: list[str] = []  # not a global of the judge's function: what those hold is part of its identity
    before = module.side_by_side

    def counted(judging, lm, prompts, firsts, seconds, *rest):
        asked.extend([*firsts, *seconds])
        return before(judging, lm, prompts, firsts, seconds, *rest)

    monkeypatch.setattr(module, "side_by_side", counted)
    given = rows(a=("long", "no"), b=("no", "long"), c=("one", "two"), d=("same", "same"), e=("?", "x"))
    assert side_by_side(tmp_path / "c.jsonl").plan(given, 1) == Plan(4, 0, 8, 0, 0)
    answered = side_by_side(tmp_path / "c.jsonl").ask(given)
    assert dict(answered.values) == {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.5} and answered.asked == 3
    assert answered.failures == {"e": "the judge gave one of the two responses no score"} and "same" not in asked
    asked.clear()
    again = side_by_side(tmp_path / "c.jsonl").ask(given)
    assert again.values == answered.values and again.asked == 0 and sorted(asked) == ["?", "x"]
    assert side_by_side(tmp_path / "c.jsonl").plan(given, 2) == Plan(8, 3, 10, 0, 0)
    swapped = side_by_side(tmp_path / "c.jsonl").ask(rows(a=("no", "long")))
    assert swapped.values == {"a": 0.0} and swapped.asked == 1


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
    with pytest.raises(EvaluationError, match="JudgeBy writes no text, which this evaluation needs"):
        writer_of(judge_by(length))


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
