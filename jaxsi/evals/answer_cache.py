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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsi.runs import preemption
from jaxsi.runs.appended import AppendedLines
from jaxsi.runs.errors import InputError
from jaxsi.runs.first_process import from_first
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

        Several processes that run as one go by the file as the first one sees it. It alone writes, and all of them get
        its answers; ``ask`` is called in all of them.

        Raises: EvaluationError: if an id occurs twice, or the file cannot be written. Stopped: after SIGTERM.
        """
        _check_ids(questions)
        keys = {question.id: asker.key(question.content) for question in questions}
        answers: dict[str, Any] = from_first(lambda: self._known(keys.values()))
        todo = list({keys[q.id]: q for q in reversed(questions) if keys[q.id] not in answers}.values())[::-1]
        failures, asked = dict[str, str](), 0
        with progress(label, len(questions)) as advance, preemption.stops_itself():
            advance(len(questions) - len(todo), False)
            for start in range(0, len(todo), part_size):
                if preemption.requested():
                    raise preemption.Stopped(f"{self._lines.path} keeps {asked} new answers of {len(todo)}")
                part = {keys[question.id]: question for question in todo[start : start + part_size]}
                answers |= from_first(lambda part=part: self._known(part, anew=True))
                open_ones = {key: question for key, question in part.items() if key not in answers}
                if open_ones:
                    given = self._ask(open_ones, ask, asker, failures)
                    answers |= given
                    asked += len(given)
                advance(len(part), bool(open_ones))
        answered = Answered(
            values={id: answers[key] for id, key in keys.items() if key in answers},
            failures={id: failures.get(key, "") for id, key in keys.items() if key not in answers},
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

    def _known(self, keys: Iterable[str], *, anew: bool = False) -> dict[str, Any]:
        """The answers to these keys; ``anew``: with those that other commands have added to the file meanwhile."""
        if anew:
            self._read()
        return {key: self._answers[key] for key in keys if key in self._answers}

    def _ask(
        self,
        questions: Mapping[str, Question],
        ask: Callable[[Sequence[Question]], Sequence[Any]],
        asker: Asker,
        failures: dict[str, str],
    ) -> dict[str, Any]:
        """Asks, and stores the answers, which it gives by key; adds the failures by key."""
        given = ask(list(questions.values()))
        found = [[one.reason, None] if isinstance(one, Failure) else [None, one] for one in given]
        rows: list[dict[str, Any]] = []
        for (key, question), (reason, answer) in zip(questions.items(), from_first(lambda: found), strict=True):
            if reason is not None:
                failures[key] = reason
            else:
                rows.append({"key": key, "judge": asker.judge, "seed": asker.seed, "id": question.id, "answer": answer})
        if processes()[0] == 0:
            try:
                self._lines.append(rows)
            except OSError as error:
                raise self._error(error) from error
        answers = {row["key"]: row["answer"] for row in rows}
        self._answers |= answers
        return answers

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
