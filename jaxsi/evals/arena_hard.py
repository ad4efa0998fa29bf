"""Arena-Hard v0.1 and v2.0 (Li et al. 2024, arXiv 2406.11939): a model against a baseline on hard prompts, both orders.

The judge says A>>B, A>B, A=B, B>A or B>>A; a strong verdict counts three times. In the first game the baseline is
assistant A, in the second one the model. A model's score is its mean over all weighted games. Answers and judgments are
read and written in the formats of arena-hard-auto.
"""

import collections
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxsi.evals.answer_cache import AnswerCache, EvaluationError
from jaxsi.evals.judging import ask_texts
from jaxsi.runs.records import Prompt, RecordError, shown
from jaxsi.stages.rows import rows
from jaxsi.stages.verdicts import JudgeConfig, Writer

WEIGHT = 3  # of a strong verdict
_LABELS = {"A>>B": (1.0, WEIGHT), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, WEIGHT)}
_LABELS |= {"B<<A": (1.0, WEIGHT), "B<A": (1.0, 1), "B=A": (0.5, 1), "A<B": (0.0, 1), "A<<B": (0.0, WEIGHT)}
_PATTERNS = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))
SYSTEM = (
    "Judge impartially how good the answers of two AI assistants to the user's prompt below are. You get assistant A's "
    "answer and assistant B's answer, and decide whose answer is better.\n\nBegin by writing your own answer to the "
    "prompt, before you judge any. Then compare both assistants' answers with yours; point out mistakes and correct "
    "them. Consider whether the answers are helpful, relevant and concise: whether they do what was asked, whether all "
    "parts of them belong to the question, and whether they are clear without being long-winded. Then consider how "
    "creative and novel they are, where that is called for. Last, name important things that are missing from the "
    "answers and would be good to have.\n\nAfter your explanation, give exactly one of these verdicts:\n\n"
    "1. Assistant A is significantly better: [[A>>B]]\n2. Assistant A is slightly better: [[A>B]]\n"
    "3. Tie, relatively the same: [[A=B]]\n4. Assistant B is slightly better: [[B>A]]\n"
    '5. Assistant B is significantly better: [[B>>A]]\n\nExample: "My final verdict is tie: [[A=B]]".'
)
_USER = (
    "<|User Prompt|>\n{0}\n\n<|The Start of Assistant A's Answer|>\n{1}\n<|The End of Assistant A's Answer|>\n\n"
    "<|The Start of Assistant B's Answer|>\n{2}\n<|The End of Assistant B's Answer|>"
)


@dataclass(frozen=True, kw_only=True)
class Games:
    """A model's two games on one prompt, as the labels of the judge; None for a game without one."""

    uid: str
    model: str
    judge: str
    category: str
    labels: tuple[str | None, str | None]

    @property
    def weighted(self) -> tuple[float, int] | None:
        """(the model's points, the weight) of both games together; None if one of them has no label."""
        if None in self.labels:
            return None
        baseline_first, model_first = (_LABELS[label] for label in self.labels if label is not None)
        points = (1 - baseline_first[0]) * baseline_first[1] + model_first[0] * model_first[1]
        return points, baseline_first[1] + model_first[1]


def label_of(text: str) -> str | None:
    """The verdict in a judge's text, in double brackets, else in single ones; the last one. None without one."""
    for pattern in _PATTERNS:
        found = [label for label in pattern.findall(text) if label in _LABELS]
        if found:
            return found[-1]
    return None


# ------------------------------------------------------------------------------------------------------------- files


def _row_errors(path: Path | str, line: int, row: Any) -> Mapping[str, Any]:
    if isinstance(row, ValueError):
        raise RecordError(path, line, str(row))
    if not isinstance(row, Mapping):
        raise RecordError(path, line, f"a row is a JSON object, found {shown(row)}")
    return row


def read_questions(path: Path | str, max_questions: int | None = None) -> dict[str, tuple[str, str]]:
    """(prompt, category) by uid, of a `question.jsonl`. Raises: RecordError."""
    found: dict[str, tuple[str, str]] = {}
    for line, value in rows(path):
        row = _row_errors(path, line, value)
        if max_questions is not None and len(found) >= max_questions:
            break
        if not isinstance(row.get("uid"), str) or not isinstance(row.get("prompt"), str):
            raise RecordError(
                path, line, "a question has the texts uid and prompt; see arena-hard-auto's question.jsonl"
            )
        if row["uid"] in found:
            raise RecordError(path, line, f"uid {row['uid']} occurs twice; uids are unique")
        found[row["uid"]] = row["prompt"], str(row.get("category", ""))
    return found


def read_answers(path: Path | str) -> tuple[str, dict[str, str]]:
    """(the model, its answers by uid), of a file of `model_answer`. Raises: RecordError."""
    model, answers = answers_of(path)
    return model, {uid: text for uid, (text, *_) in answers.items()}


def answers_of(path: Path | str) -> tuple[str, dict[str, tuple[str, Any, int]]]:
    """(the model, (answer, its "metadata", its line) by uid), of a file of `model_answer`. Raises: RecordError."""
    model, answers = None, {}
    for line, value in rows(path):
        row = _row_errors(path, line, value)
        messages = row.get("messages")
        content = messages[-1].get("content") if isinstance(messages, list) and messages else None
        text = content.get("answer") if isinstance(content, Mapping) else content
        if not isinstance(row.get("uid"), str) or not isinstance(text, str):
            raise RecordError(path, line, "an answer has a uid, and messages of which the last one holds the answer")
        if row["uid"] in answers:
            raise RecordError(path, line, f"uid {row['uid']} is answered twice; leave one of the rows out")
        if model not in (None, row.get("model")):
            raise RecordError(path, line, f"answers of {model!r} and of {row.get('model')!r}; give one model a file")
        model, answers[row["uid"]] = row.get("model"), (text, row.get("metadata"), line)
    if not isinstance(model, str):
        raise RecordError(path, None, "no answers with a model in this file; give a file of model_answer")
    return model, answers


def answer_rows(
    model: str, questions: Mapping[str, tuple[str, str]], answers: Mapping[str, str], now: float | None = None
) -> list[dict[str, Any]]:
    """Answers in the format of arena-hard-auto."""
    return [
        {
            "uid": uid,
            "ans_id": hashlib.sha256(repr((model, uid, text)).encode("utf-8", "replace")).hexdigest()[:22],
            "model": model,
            "messages": [
                {"role": "user", "content": questions[uid][0]},
                {"role": "assistant", "content": {"answer": text}},
            ],
            "tstamp": time.time() if now is None else now,
        }
        for uid, text in answers.items()
    ]


def read_judgments(paths: Sequence[Path | str]) -> list[Games]:
    """The judgments of files of `model_judgment`. A label that is none of the ten counts as none.

    Raises: RecordError: if a file cannot be read or a row is bad; it names the line.
    """
    found = []
    for path in paths:
        for line, value in rows(path):
            row = _row_errors(path, line, value)
            games = row.get("games")
            uid = row.get("uid", row.get("question_id"))
            if not isinstance(games, list) or len(games) != 2 or not isinstance(row.get("model"), str) or uid is None:
                raise RecordError(path, line, "a judgment has a uid, a model and two games; see arena-hard-auto")
            labels = tuple(game.get("score") if isinstance(game, Mapping) else None for game in games)
            first, second = (label if isinstance(label, str) and label in _LABELS else None for label in labels)
            found.append(
                Games(
                    uid=str(uid), model=row["model"], judge=str(row.get("judge", "")),
                    category=str(row.get("category", "")), labels=(first, second),
                )
            )  # fmt: skip
    if not found:
        raise RecordError(", ".join(map(str, paths)), None, "no judgments in these files; see model_judgment")
    return found


# ------------------------------------------------------------------------------------------------------------- judging


def judge_games(
    cache: AnswerCache,
    writer: Writer,
    questions: Mapping[str, tuple[str, str]],
    answers: Mapping[str, str],
    baseline: Mapping[str, str],
    cfg: JudgeConfig,
    *,
    model: str,
    judge: str,
    seed: int = 0,
    now: float | None = None,
) -> list[dict[str, Any]]:
    """Judgments in the format of arena-hard-auto, of both orders. What has no room in the judge's context is asked
    again by the next run."""
    requests = game_requests(questions, answers, baseline)
    found = ask_texts(cache, writer, requests, cfg, seed=seed)
    judgments = []
    for uid, (_, category) in questions.items():
        games = []
        for request in (r for r in requests if r.id.rpartition(", ")[0] == uid):
            text = found.values[request.id]["text"] if request.id in found.values else ""
            prompt = request.messages[-1]["content"]
            games.append({"score": label_of(text), "judgment": {"answer": text}, "prompt": prompt})
        judgments.append(
            {
                "uid": uid, "category": category, "judge": judge, "model": model, "games": games,
                "tstamp": time.time() if now is None else now,
            }
        )  # fmt: skip
    return judgments


def game_requests(
    questions: Mapping[str, tuple[str, str]], answers: Mapping[str, str], baseline: Mapping[str, str]
) -> list[Prompt]:
    """What the judge is sent: two requests a prompt, the baseline first in the first one.

    Raises: EvaluationError: if a prompt has no answer of the model or of the baseline; before a token is spent.
    """
    requests = []
    for uid, (text, _) in questions.items():
        for side, given in (("the model", answers), ("the baseline", baseline)):
            if uid not in given:
                raise EvaluationError(f"{side} has no answer to the prompt {uid}; answer all prompts")
        for game, (a, b) in enumerate(((baseline[uid], answers[uid]), (answers[uid], baseline[uid])), start=1):
            user = "".join(_filled(text, a, b))
            messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": user})
            requests.append(Prompt(id=f"{uid}, {game}", messages=messages))
    return requests


def _filled(question: str, a: str, b: str) -> list[str]:
    """The pieces of the user's message: texts are inserted unchanged."""
    texts = {"{0}": question, "{1}": a, "{2}": b}
    return [texts.get(piece, piece) for piece in re.split(r"(\{[012]\})", _USER)]


# ------------------------------------------------------------------------------------------------------------- figures


def scores(judgments: Sequence[Games], *, samples: int = 1000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The figures of each model, best first.

    "score": mean over the weighted games, 0 to 1. "interval": its 5 to 95 % bootstrap range over weighted games, as
    arena-hard-auto gives it; "interval_by_prompt": over prompts, whose games and copies are not independent, and so
    wider. "games": weighted ones; "judged": prompts that count; "errors": prompts of which a game has no label, which
    do not count; "duplicates": earlier judgments of a prompt by the same judge, which do not count either.
    "consistent": share of the prompts with the same winner in both games. "categories": the score of each, if several.
    """
    by_model: dict[str, list[Games]] = collections.defaultdict(list)
    for games in judgments:
        by_model[games.model].append(games)
    figures = {model: _figures(games, samples, seed) for model, games in by_model.items()}
    return dict(sorted(figures.items(), key=lambda item: -(item[1]["score"] or 0.0)))


def _figures(judgments: Sequence[Games], samples: int, seed: int) -> dict[str, Any]:
    last = {(games.judge, games.uid): games for games in judgments}
    counted = [(games, games.weighted) for games in last.values()]
    known = [(games, weighted) for games, weighted in counted if weighted is not None]
    points, weights = np.asarray([weighted for _, weighted in known], np.float64).reshape(-1, 2).T
    categories = list(dict.fromkeys(games.category for games, _ in known))
    copies = np.asarray([point for games, _ in known for point in points_of(games)], np.float64)
    return {
        "score": float(points.sum() / weights.sum()) if known else None,
        "interval": _interval(copies, np.ones_like(copies), samples, seed),
        "interval_by_prompt": _interval(points, weights, samples, seed),
        "games": len(copies),
        "judged": len(known),
        "errors": len(last) - len(known),
        "duplicates": len(judgments) - len(last),
        "consistent": sum(_winner(g.labels[0], swapped=True) == _winner(g.labels[1]) for g, _ in known) / len(known)
        if known
        else None,
        "categories": {
            name: float(
                sum(w[0] for g, w in known if g.category == name) / sum(w[1] for g, w in known if g.category == name)
            )
            for name in categories
        }
        if len(categories) > 1
        else {},
    }


def battle_scores(path: Path | str, *, samples: int = 1000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The "score" of model_a against model_b, its "interval" as in `scores`, and the number of "games", by "A vs B", of
    a file of battles: rows with "model_a", "model_b" and "winner", strong verdicts three times.

    Raises: RecordError: if the file cannot be read or a row is bad; it names the line.
    """
    games: dict[str, list[float]] = collections.defaultdict(list)
    points = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}
    for line, value in rows(path):
        row = _row_errors(path, line, value)
        winner = row.get("winner")
        if not isinstance(winner, str) or winner not in points or not {"model_a", "model_b"} <= row.keys():
            raise RecordError(path, line, "a battle has model_a, model_b, and the winner model_a, model_b or tie")
        games[f"{row['model_a']} vs {row['model_b']}"].append(points[winner])
    figures = {}
    for name, values in games.items():
        copies = np.asarray(values, np.float64)
        interval = _interval(copies, np.ones_like(copies), samples, seed)
        figures[name] = {"score": float(copies.mean()), "interval": interval, "games": len(copies)}
    return figures


def counted(judgments: Sequence[Games]) -> list[Games]:
    """The last judgment of each prompt by each judge, if both games have a label."""
    last = {(games.model, games.judge, games.uid): games for games in judgments}
    return [games for games in last.values() if None not in games.labels]


def points_of(games: Games) -> list[float]:
    """The model's points in each weighted game of a prompt. Both games have a label."""
    first, second = (_LABELS[label] for label in games.labels if label is not None)
    return [1 - first[0]] * first[1] + [second[0]] * second[1]


def _winner(label: str | None, *, swapped: bool = False) -> float | None:
    points = None if label is None else _LABELS[label][0]
    return None if points is None else 1 - points if swapped else points


def _interval(points: np.ndarray, weights: np.ndarray, samples: int, seed: int) -> list[float] | None:
    if not len(points):
        return None
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(points), np.full(len(points), 1 / len(points)), size=samples).astype(np.float64)
    means = (draws @ points) / (draws @ weights)
    low, high = np.quantile(means, [0.05, 0.95])
    return [float(low), float(high)]
