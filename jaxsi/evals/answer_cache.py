"""What a judge said, on disk: asked once, kept for good, shared by all evaluations and by processes that run at once.

A line of the file is one answer. Its key is a hash of everything that it depends on: the judge, the hash of its
template, the seed, and the content of the question. So a changed response, template, judge or seed asks anew, and
nothing else does.

A run directory (`runs.run`) does not serve here. It belongs to one process at a time, cuts its items by position, and
has no failed rows that could be asked again alone.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsi.runs import preemption
from jaxsi.runs.appended import AppendedLines
from jaxsi.runs.errors import InputError
from jaxsi.runs.progress import processes, progress

_log = logging.getLogger(__name__)


class EvaluationError(InputError, ValueError):
    """An evaluation that cannot be done with what it is given; the message says what to do."""


class Question(NamedTuple):
    """``id`` names the row in messages and results; ``content`` is a JSON value, everything the judge is told."""

    id: str
    content: Any


class Failure(NamedTuple):
    """In place of an answer: the judge has none, for a reason. The next run asks again."""

    reason: str


class Asker(NamedTuple):
    """Who answers, and how: the identity of the judge and its sampling settings, the text of its template, the seed."""

    judge: str
    template: str
    seed: int = 0

    def key(self, content: Any) -> str:
        """The name of an answer in the cache, 32 hex digits."""
        template = hashlib.sha256(self.template.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        text = json.dumps([self.judge, template, self.seed, content], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answered:
    """``values``: the answer to each question that has one, by the question's id. ``failures``: why the others have
    none. ``asked`` of the answers are new. ``torn`` lines of the cache were cut short by a kill and ignored."""

    values: Mapping[str, Any]
    failures: Mapping[str, str]
    asked: int
    torn: int


class AnswerCache:
    """The answers in the file ``path``. Raises: EvaluationError: if it cannot be read or written."""

    def __init__(self, path: Path | str):
        self._lines = AppendedLines(path)
        self._answers: dict[str, Any] = {}
        self._judged = self._reused = self._failed = 0
        self._reasons = set[str]()
        self._read()
        if self._lines.torn:
            _log.warning("%s: %d lines were cut short by a kill and are ignored", path, self._lines.torn)

    def missing(self, questions: Sequence[Question], asker: Asker) -> list[Question]:
        """The questions without an answer, each content once. Raises: EvaluationError: if an id occurs twice."""
        _check_ids(questions)
        keyed = {asker.key(question.content): question for question in reversed(questions)}
        return [question for key, question in reversed(keyed.items()) if key not in self._answers]

    def answer(
        self,
        questions: Sequence[Question],
        ask: Callable[[Sequence[Question]], Sequence[Any]],
        asker: Asker,
        *,
        part_size: int = 64,
        label: str = "judging",
    ) -> Answered:
        """The answers to the questions. ``ask`` is called with those that have none, ``part_size`` at a time; it gives
        a JSON value for each, or a `Failure`. A part is on disk before the next one begins, so a kill loses at most one
        part. What another process has answered meanwhile is not asked again.

        Raises: EvaluationError: if an id occurs twice, the file cannot be written, or several processes run as one.
          Stopped: after SIGTERM.
        """
        if processes()[1] > 1:  # they would see the file at different moments and ask different questions
            raise EvaluationError(
                f"{processes()[1]} processes run as one; judge with one process, which may use all of its devices"
            )
        todo, failures, asked = self.missing(questions, asker), dict[str, str](), 0
        with progress(label, len(questions)) as advance, preemption.stops_itself():
            advance(len(questions) - len(todo), False)
            for start in range(0, len(todo), part_size):
                if preemption.requested():
                    raise preemption.Stopped(f"{self._lines.path} keeps {asked} new answers of {len(todo)}")
                self._read()
                part = todo[start : start + part_size]
                open_ones = [question for question in part if asker.key(question.content) not in self._answers]
                asked += self._ask(open_ones, ask, asker, failures)
                advance(len(part), bool(open_ones))
        keys = {question.id: asker.key(question.content) for question in questions}
        answered = Answered(
            values={id: self._answers[key] for id, key in keys.items() if key in self._answers},
            failures={id: failures.get(key, "") for id, key in keys.items() if key not in self._answers},
            asked=asked,
            torn=self._lines.torn,
        )
        self._judged += asked
        self._reused += len(answered.values) - asked
        self._failed += len(answered.failures)
        self._reasons |= {reason for reason in answered.failures.values() if reason}
        return answered

    def counts(self) -> dict[str, Any]:
        """Of all questions so far: how many were "judged" now, "reused" and "failed", some reasons of the latter, and
        the lines that a kill cut short."""
        counts = {"judged": self._judged, "reused": self._reused, "failed": self._failed}
        return counts | {"torn_lines": self._lines.torn, "failures": sorted(self._reasons)[:5]}

    def _ask(
        self,
        questions: Sequence[Question],
        ask: Callable[[Sequence[Question]], Sequence[Any]],
        asker: Asker,
        failures: dict[str, str],
    ) -> int:
        """Asks, and stores the answers; adds the failures by key. Gives the number of answers."""
        if not questions:
            return 0
        rows: list[dict[str, Any]] = []
        for question, answer in zip(questions, ask(questions), strict=True):
            key = asker.key(question.content)
            if isinstance(answer, Failure):
                failures[key] = answer.reason
            else:
                rows.append({"key": key, "judge": asker.judge, "seed": asker.seed, "id": question.id, "answer": answer})
        try:
            self._lines.append(rows)
        except OSError as error:
            raise self._error(error) from error
        self._answers |= {row["key"]: row["answer"] for row in rows}
        return len(rows)

    def _read(self) -> None:
        try:
            for row in self._lines.read():
                if isinstance(row, dict) and isinstance(row.get("key"), str) and "answer" in row:
                    self._answers.setdefault(row["key"], row["answer"])
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> EvaluationError:
        return EvaluationError(
            f"{self._lines.path}: the judge's answers cannot be kept there ({error.strerror}); those so far are kept. "
            "Name a file on a disk with free space, and run the same command again"
        )


def _check_ids(questions: Sequence[Question]) -> None:
    seen = set[str]()
    for question in questions:
        if question.id in seen:
            raise EvaluationError(f"two questions have the id {question.id!r}; ids are unique")
        seen.add(question.id)
