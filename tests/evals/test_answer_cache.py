"""The judge's answers on disk: nothing is asked twice, failures are asked again, processes share the file."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from jaxsi.evals.answer_cache import AnswerCache, Asker, EvaluationError, Failure, Question
from jaxsi.runs.appended import AppendedLines

ASKER = Asker("judge", "Is it good? {response}")
ROOT = Path(__file__).parents[2]


def questions(*names: str) -> list[Question]:
    return [Question(name, [{"role": "user", "content": name}]) for name in names]


def counting(asked: list[str]):
    def ask(part):
        asked.extend(question.id for question in part)
        return [len(question.id) for question in part]

    return ask


def test_an_answer_is_asked_once_for_each_judge_template_seed_and_content(tmp_path):
    asked: list[str] = []
    for _ in range(2):
        cache = AnswerCache(tmp_path / "a.jsonl")
        result = cache.answer(questions("a", "bb"), counting(asked), ASKER)
        assert result.values == {"a": 1, "bb": 2} and result.failures == {} and result.torn == 0
    assert asked == ["a", "bb"] and result.asked == 0
    for other in (ASKER._replace(judge="j"), ASKER._replace(template="t"), ASKER._replace(seed=1)):
        assert AnswerCache(tmp_path / "a.jsonl").answer(questions("a"), counting(asked), other).asked == 1
    assert asked == ["a", "bb", "a", "a", "a"]
    same = [Question("x", "text"), Question("y", "text")]
    asked = []
    assert AnswerCache(tmp_path / "b.jsonl").answer(same, counting(asked), ASKER).values == {"x": 1, "y": 1}
    assert asked == ["x"]


def test_only_failed_rows_are_asked_again(tmp_path):
    path, asked = tmp_path / "a.jsonl", list[str]()

    def fails_on_b(part):
        asked.extend(question.id for question in part)
        return [Failure("no verdict") if question.id == "b" else 1.0 for question in part]

    result = AnswerCache(path).answer(questions("a", "b", "c"), fails_on_b, ASKER)
    assert result.failures == {"b": "no verdict"} and list(result.values) == ["a", "c"] and result.asked == 2
    result = AnswerCache(path).answer(questions("a", "b", "c"), counting(asked), ASKER)
    assert asked == ["a", "b", "c", "b"] and result.values == {"a": 1.0, "b": 1, "c": 1.0} and not result.failures


def test_a_torn_line_is_ignored_counted_and_ended(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    AnswerCache(path).answer(questions("a", "b"), counting([]), ASKER)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    cache = AnswerCache(path)
    assert "1 lines were cut short by a kill" in caplog.text
    asked: list[str] = []
    result = cache.answer(questions("a", "b", "c"), counting(asked), ASKER)
    assert asked == ["b", "c"] and result.values == {"a": 1, "b": 1, "c": 1} and result.torn == 1
    assert AnswerCache(path).answer(questions("a", "b", "c"), counting([]), ASKER).asked == 0


@given(st.integers(0, 400), st.binary(max_size=20))
@settings(max_examples=50, deadline=None)
def test_any_damage_at_the_end_loses_at_most_the_lines_it_hits(tmp_path_factory, cut, dirt):
    path = tmp_path_factory.mktemp("damage") / "a.jsonl"
    lines = AppendedLines(path)
    lines.append([{"n": n, "pad": "x" * 20} for n in range(8)])
    whole = path.read_bytes()
    path.write_bytes(whole[: -cut or None] + dirt)
    kept = sum(1 for end in range(1, 9) if len(b"\n".join(whole.split(b"\n")[:end])) < len(whole[: -cut or None]))
    lines.append([{"n": 99}])
    found = [value["n"] for value in AppendedLines(path).read() if isinstance(value, dict)]
    assert found[:kept] == list(range(kept)) and found[-1] == 99


def test_lines_that_are_no_answers_are_ignored(tmp_path):
    path = tmp_path / "a.jsonl"
    AnswerCache(path).answer(questions("a"), counting([]), ASKER)
    with path.open("a") as file:
        file.write(
            '{"key": [1], "answer": 2}\n{"key": {}, "answer": 2}\n{"key": null, "answer": 2}\n[1]\n3\n{"key": "x"}\n'
        )
    result = AnswerCache(path).answer(questions("a", "bb"), counting(asked := []), ASKER)
    assert asked == ["bb"] and result.values == {"a": 1, "bb": 2} and result.torn == 0


def test_duplicate_ids_and_a_file_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="two questions have the id 'a'"):
        AnswerCache(tmp_path / "a.jsonl").answer(questions("a", "a"), counting([]), ASKER)
    (tmp_path / "folder").mkdir()
    with pytest.raises(EvaluationError, match=r"folder: the judge's answers cannot be kept there"):
        AnswerCache(tmp_path / "folder")


def _many(path: Path, names: list[str]) -> None:
    AnswerCache(path).answer(
        questions(*names), lambda part: [question.id * 3000 for question in part], ASKER, part_size=3
    )


def test_processes_append_whole_lines_to_one_file(tmp_path):
    path = tmp_path / "a.jsonl"
    context = multiprocessing.get_context("spawn")
    names = [[f"{process}-{n}" for n in range(40)] for process in range(3)]
    running = [context.Process(target=_many, args=(path, part)) for part in names]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == sorted(itertools.chain(*names))
    assert all(row["answer"] == row["id"] * 3000 for row in rows)


def test_what_another_process_answers_meanwhile_is_not_asked_again(tmp_path):
    path, asked = tmp_path / "a.jsonl", list[str]()

    def while_another_answers(part):
        asked.extend(question.id for question in part)
        if part[0].id == "a":
            AnswerCache(path).answer(questions("b", "c"), counting([]), ASKER)
        return [len(question.id) for question in part]

    result = AnswerCache(path).answer(questions("a", "b", "c", "d"), while_another_answers, ASKER, part_size=1)
    assert asked == ["a", "d"] and list(result.values) == ["a", "b", "c", "d"] and result.asked == 2


KILLED = """
import sys, time
from jaxsi.evals.answer_cache import AnswerCache, Asker, Question
def ask(part):
    with open(sys.argv[2], "a") as log:
        log.writelines(q.id + "\\n" for q in part)
    time.sleep(0.02)
    return ["y" * 50_000 for _ in part]
rows = [Question(str(n), n) for n in range(60)]
AnswerCache(sys.argv[1]).answer(rows, ask, Asker("j", "t"), part_size=2)
"""


def test_a_killed_process_loses_at_most_one_part(tmp_path):
    """Killed with SIGKILL twice, at moments that nothing chooses; every answer that was stored is never asked again."""
    cache, log = tmp_path / "a.jsonl", tmp_path / "asked.txt"
    command = [sys.executable, "-c", KILLED, str(cache), str(log)]
    for wait_for in (5, 20):
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        while process.poll() is None and (not cache.exists() or cache.read_bytes().count(b"\n") < wait_for):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    stored = {row["id"] for row in AppendedLines(cache).read()}
    before = log.read_text().split()
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    again = log.read_text().split()[len(before) :]
    assert not set(again) & stored and set(again) | stored == {str(n) for n in range(60)}
    assert len(before) - len(set(before)) <= 2  # of the two kills, at most the part in flight is asked twice
