"""MT-Bench's figures from judgments in FastChat's formats (Zheng et al. 2023, arXiv 2306.05685).

Two things are not as FastChat's `show_result`, and both figures are given. It averages over all rows, so a model that
was judged twice counts twice; here the last judgment of a turn counts, and "by_rows" is FastChat's figure. And it drops
judgments without a score in silence; here they are counted.
"""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxsi.runs.metrics import mean_ci
from jaxsi.runs.records import RecordError, shown
from jaxsi.stages.rows import rows

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
FIRST_QUESTION, QUESTIONS_OF_CATEGORY = 81, 10
NO_SCORE = -1.0  # as FastChat writes it
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


@dataclass(frozen=True, kw_only=True)
class Grade:
    """The grade of a model's answer in one turn; None if the judge gave none."""

    question_id: int
    turn: int
    model: str
    judge: str
    score: float | None


@dataclass(frozen=True, kw_only=True)
class Match:
    """Two models' answers in one turn, compared in both orders. A winner is "model_1", "model_2", "tie", or "error" if
    the judge gave no verdict."""

    question_id: int
    turn: int
    model_1: str
    model_2: str
    judge: str
    g1_winner: str
    g2_winner: str


WINNERS = ("model_1", "model_2", "tie", "error")


def rating(text: str) -> float | None:
    """The score in a judge's text: the first "[[7]]" (or "[[7.5]]"), else the first "[7]"; None without one."""
    found = next((match for pattern in _RATINGS if (match := pattern.search(text)) is not None), None)
    return None if found is None else float(found[1])


def verdict(text: str) -> str | None:
    """A judge's verdict by the marks "[[A]]", "[[B]]" and "[[C]]" (a tie), which count in this order; None without
    one."""
    return next((letter for letter in "ABC" if f"[[{letter}]]" in text), None)


def category_of(question_id: int, questions: Mapping[int, str] | None = None) -> str | None:
    """The category of a question: that of ``questions``, else the one of MT-Bench's own 80 (81 to 160)."""
    if questions is not None:
        return questions.get(question_id)
    number = (question_id - FIRST_QUESTION) // QUESTIONS_OF_CATEGORY
    return CATEGORIES[number] if 0 <= number < len(CATEGORIES) else None


# ------------------------------------------------------------------------------------------------------------- files


def read_judgments(paths: Sequence[Path | str]) -> tuple[list[Grade], list[Match]]:
    """Single and pair judgments of files, in the order of their rows.

    Raises: RecordError: if a file cannot be read or a row is bad; it names the line.
    """
    grades, matches = [], []
    for path in paths:
        before = len(grades) + len(matches)
        for line, row in rows(path):
            if isinstance(row, ValueError):
                raise RecordError(path, line, str(row))
            if not isinstance(row, Mapping):
                raise RecordError(path, line, f"a judgment is a JSON object, found {shown(row)}; write one a line")
            try:
                (grades if "score" in row else matches).append(_grade(row) if "score" in row else _match(row))
            except KeyError as error:
                raise RecordError(path, line, f"a judgment has no column {error.args[0]!r}; see --help") from None
            except (TypeError, ValueError) as error:
                raise RecordError(path, line, str(error)) from None
        if len(grades) + len(matches) == before:
            raise RecordError(path, None, "no judgments in this file; FastChat's model_judgment folder has some")
    return grades, matches


def _grade(row: Mapping[str, Any]) -> Grade:
    score = row["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not np.isfinite(score):
        raise ValueError(f"score is {shown(score)}; it is a number, -1 for a judgment without one")
    return Grade(
        question_id=_number(row, "question_id"), turn=_turn(row), model=_name(row, "model"), judge=_judge(row),
        score=None if score == NO_SCORE else float(score),
    )  # fmt: skip


def _match(row: Mapping[str, Any]) -> Match:
    winners = [str(row[name]) for name in ("g1_winner", "g2_winner")]
    if wrong := [winner for winner in winners if winner not in WINNERS]:
        raise ValueError(f"the winner of a game is {wrong[0]!r}; it is one of {', '.join(WINNERS)}")
    model_1, model_2 = _name(row, "model_1"), _name(row, "model_2")
    if model_1 == model_2:
        raise ValueError(f"model_1 and model_2 are both {model_1!r}; a match is between two models")
    return Match(
        question_id=_number(row, "question_id"), turn=_turn(row), model_1=model_1, model_2=model_2, judge=_judge(row),
        g1_winner=winners[0], g2_winner=winners[1],
    )  # fmt: skip


def _name(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str) or not row[key]:
        raise ValueError(f"{key} is {shown(row[key])}; it is the name of a model")
    return row[key]


def _number(row: Mapping[str, Any], key: str) -> int:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | str) or not re.fullmatch(r"\d{1,9}", str(value)):
        raise ValueError(f"{key} is {shown(value)}; it is a whole number")
    return int(value)


def _turn(row: Mapping[str, Any]) -> int:
    turn = _number(row, "turn")
    if turn not in (1, 2):
        raise ValueError(f"turn is {turn}; it is 1 or 2")
    return turn


def _judge(row: Mapping[str, Any]) -> str:
    """The judge without its prompt, which follows from question and turn: FastChat writes [name, prompt], some files
    as a text."""
    judge = row.get("judge")
    return str(judge[0]) if isinstance(judge, list) and judge else str(judge or "")


# ------------------------------------------------------------------------------------------------------------- figures


def single_scores(grades: Sequence[Grade], questions: Mapping[int, str] | None = None) -> dict[str, dict[str, Any]]:
    """The figures of each model, best first.

    "turn_1", "turn_2": mean scores of the turns; "score": of all judgments, with "ci95", a bootstrap over questions;
    "categories": of each category. "judgments": how many have a score and count; "errors": the last judgments of a turn
    that have none; "duplicates": earlier judgments of a turn, which do not count. "by_rows": the three means over all
    rows with a score. "judges": their names. A judge's name is part of what is judged, so two judges are no duplicates
    of each other: the scores are means over both.
    """
    by_model: dict[str, list[Grade]] = collections.defaultdict(list)
    for grade in grades:
        by_model[grade.model].append(grade)
    figures = {model: _single(rows, questions) for model, rows in by_model.items()}
    return dict(sorted(figures.items(), key=lambda item: -(item[1]["score"] or 0.0)))


def _single(grades: Sequence[Grade], questions: Mapping[int, str] | None) -> dict[str, Any]:
    last = {(grade.judge, grade.question_id, grade.turn): grade for grade in grades}
    counted = [grade for grade in last.values() if grade.score is not None]
    by_question: dict[int, list[float]] = collections.defaultdict(list)
    categories: dict[str, list[float]] = collections.defaultdict(list)
    for grade in counted:
        by_question[grade.question_id].append(float(grade.score or 0.0))
        categories[category_of(grade.question_id, questions) or "other"].append(float(grade.score or 0.0))
    ordered = [*CATEGORIES, *sorted(categories.keys() - set(CATEGORIES))]
    return {
        **_means(counted),
        "ci95": _interval(list(by_question.values())),
        "categories": {name: float(np.mean(categories[name])) for name in ordered if name in categories},
        "judgments": len(counted),
        "errors": len(last) - len(counted),
        "duplicates": len(grades) - len(last),
        "judges": sorted({grade.judge for grade in grades}),
        "by_rows": _means(grades),
    }


def _means(grades: Iterable[Grade]) -> dict[str, float | None]:
    scored = [(grade.turn, grade.score) for grade in grades if grade.score is not None]
    columns = {"turn_1": (1,), "turn_2": (2,), "score": (1, 2)}
    values = {name: [score for turn, score in scored if turn in turns] for name, turns in columns.items()}
    return {name: float(np.mean(column)) if column else None for name, column in values.items()}


def _interval(questions: Sequence[Sequence[float]]) -> list[float] | None:
    if not questions:
        return None
    return list(mean_ci([float(np.mean(scores)) for scores in questions])[1:])


def pair_scores(
    matches: Sequence[Match], baseline: str | None = None, questions: Mapping[int, str] | None = None
) -> dict[str, dict[str, Any]]:
    """The figures of each model, best first: "win", "loss" and "tie" counts (a win needs the same winner in both
    orders), "win_rate", "loss_rate" and "win_rate_adjusted" = (win + tie/2) / n, with "ci95", a bootstrap over
    questions; "consistent": share of the matches in which both orders say the same; "categories": the adjusted win rate
    of each. "errors", "duplicates" and "by_rows" as in `single_scores`; an error is a match with an order without a
    verdict.

    Args:
      baseline: only matches with this model, and without a row for it.
    """
    errors, duplicates = collections.Counter[str](), collections.Counter[str]()
    given = [match for match in matches if baseline is None or baseline in (match.model_1, match.model_2)]
    last: dict[Any, Match] = {}
    for match in given:
        key = match.judge, match.question_id, match.turn, *sorted((match.model_1, match.model_2))
        duplicates.update((match.model_1, match.model_2) if key in last else ())
        last[key] = match
    for match in last.values():
        errors.update((match.model_1, match.model_2) if "error" in (match.g1_winner, match.g2_winner) else ())
    rows, all_rows = _scored(last.values()), _scored(given)
    names = [name for name in dict.fromkeys([*rows, *errors]) if name != baseline]
    figures = {
        name: _pairwise(rows.get(name, []), questions)
        | {
            "errors": errors[name],
            "duplicates": duplicates[name],
            "by_rows": _rates([score for _, score in all_rows.get(name, [])]),
        }
        for name in names
    }
    return dict(sorted(figures.items(), key=lambda item: -(item[1]["win_rate_adjusted"] or 0.0)))


def _scored(matches: Iterable[Match]) -> dict[str, list[tuple[Match, float]]]:
    """Each model's matches without an error, with its score in them."""
    rows: dict[str, list[tuple[Match, float]]] = collections.defaultdict(list)
    for match in matches:
        if "error" not in (match.g1_winner, match.g2_winner):
            won = match.g1_winner if match.g1_winner == match.g2_winner else "tie"
            score = {"model_1": 1.0, "model_2": 0.0, "tie": 0.5}[won]
            rows[match.model_1].append((match, score))
            rows[match.model_2].append((match, 1.0 - score))
    return rows


def _rates(scores: Sequence[float]) -> dict[str, Any]:
    n, win, loss = len(scores), scores.count(1.0), scores.count(0.0)
    return {
        "win": win,
        "loss": loss,
        "tie": n - win - loss,
        "win_rate": win / n if n else None,
        "loss_rate": loss / n if n else None,
        "win_rate_adjusted": sum(scores) / n if n else None,
    }


def _pairwise(rows: Sequence[tuple[Match, float]], questions: Mapping[int, str] | None) -> dict[str, Any]:
    scores = [score for _, score in rows]
    by_question: dict[int, list[float]] = collections.defaultdict(list)
    categories: dict[str, list[float]] = collections.defaultdict(list)
    for match, score in rows:
        by_question[match.question_id].append(score)
        categories[category_of(match.question_id, questions) or "other"].append(score)
    ordered = [*CATEGORIES, *sorted(categories.keys() - set(CATEGORIES))]
    return {
        **_rates(scores),
        "ci95": _interval(list(by_question.values())),
        "consistent": sum(m.g1_winner == m.g2_winner for m, _ in rows) / len(rows) if rows else None,
        "categories": {name: float(np.mean(categories[name])) for name in ordered if name in categories},
    }
