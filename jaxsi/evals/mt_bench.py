"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): 80 questions of two turns, answered by a model and graded by a judge.

A folder of data is laid out as FastChat's `data/mt_bench`: `question.jsonl`, `reference_answer/gpt-4.jsonl`,
`model_answer/MODEL.jsonl`, `model_judgment/JUDGE_single.jsonl` and `JUDGE_pair.jsonl`. Answers and judgments are read
and written in its formats. The figures are in `mt_bench_scores`.
"""

import collections
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxsi.evals.answer_cache import AnswerCache, EvaluationError
from jaxsi.evals.judging import ask_texts
from jaxsi.evals.mt_bench_prompts import Template, needs_reference, template_name, turn_values
from jaxsi.evals.mt_bench_scores import NO_SCORE, rating, verdict
from jaxsi.runs.records import Message, Prompt, RecordError, shown
from jaxsi.stages.rows import rows
from jaxsi.stages.verdicts import JudgeConfig, Writer

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # 0 for the other categories
REFERENCE_MODEL = "gpt-4"
NO_JUDGMENT = "$ERROR$"  # as FastChat writes it
WINNERS = ({"A": "model_1", "B": "model_2", "C": "tie"}, {"A": "model_2", "B": "model_1", "C": "tie"})  # of each game
SOURCE = "https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge/data/mt_bench"

Turns = tuple[str, ...]
Respond = Callable[[str, Sequence[Prompt], float], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of one or two turns; `references` are the reference answers to them, if the judge is to see some."""

    question_id: int
    category: str
    turns: Turns
    references: Turns | None

    @property
    def temperature(self) -> float:
        """The temperature at which it is answered."""
        return TEMPERATURES.get(self.category, 0.0)


# ------------------------------------------------------------------------------------------------------------- files


def read_questions(folder: Path | str, max_questions: int | None = None) -> list[Question]:
    """The questions of a folder of data, with the reference answers that their categories need.

    Raises: RecordError: if a file cannot be read, a row is bad, or a reference answer is missing.
    """
    path = Path(folder) / "question.jsonl"
    if not path.is_file():
        raise RecordError(path, None, f"no such file; give a folder with the files of {SOURCE}")
    found: dict[int, tuple[str, Turns]] = {}
    for line, row in rows(path):
        id, turns, category = _id(path, line, row), _turns(path, line, row.get("turns")), row.get("category")
        if not isinstance(category, str):
            raise RecordError(path, line, f"category is {shown(category)}; it is a text, such as writing")
        if id in found:
            raise RecordError(path, line, f"question_id {id} occurs twice; ids are unique")
        found[id] = category, turns
    chosen = list(found.items())[:max_questions]
    references: Mapping[int, Turns] = {}
    if any(needs_reference(category) for _, (category, _) in chosen):
        _, references = read_answers(Path(folder) / "reference_answer" / f"{REFERENCE_MODEL}.jsonl")
    questions = []
    for id, (category, turns) in chosen:
        reference = references.get(id) if needs_reference(category) else None
        if needs_reference(category) and (reference is None or len(reference) != len(turns)):
            needed = f"question {id} ({category}) needs {len(turns)} reference answers"
            raise RecordError(path, None, f"{needed}; see {SOURCE}")
        questions.append(Question(question_id=id, category=category, turns=turns, references=reference))
    return questions


def read_answers(path: Path | str) -> tuple[str, dict[int, Turns]]:
    """(the model's name, its answers by question) of a file in FastChat's format; the first of several choices.

    Raises: RecordError: if the file cannot be read, a row is bad, or a question is answered twice or by two models.
    """
    answers: dict[int, Turns] = {}
    model = None
    for line, row in rows(path):
        id = _id(path, line, row)
        choices = row.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise RecordError(path, line, f"choices is {shown(choices)}; it is a list of objects with turns")
        if id in answers:
            raise RecordError(path, line, f"question {id} is answered twice; leave one of the rows out")
        if model not in (None, row.get("model_id")):
            raise RecordError(path, line, f"answers of {model!r} and of {row.get('model_id')!r}; give one model a file")
        model = row.get("model_id")
        answers[id] = _turns(path, line, choices[0].get("turns"))
    if not isinstance(model, str):
        raise RecordError(path, None, "no answers with a model_id in this file; give a file of model_answer")
    return model, answers


def answer_rows(model: str, answers: Mapping[int, Turns], now: float | None = None) -> list[dict[str, Any]]:
    """Answers in FastChat's format."""
    return [
        {
            "question_id": id,
            "answer_id": hashlib.sha256(repr((model, id, turns)).encode("utf-8", "replace")).hexdigest()[:22],
            "model_id": model,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": time.time() if now is None else now,
        }
        for id, turns in answers.items()
    ]


def _id(path: Path | str, line: int, row: Any) -> int:
    if isinstance(row, ValueError):
        raise RecordError(path, line, str(row))
    value = row.get("question_id") if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, int):
        raise RecordError(path, line, f"question_id is {shown(value)}; it is a whole number")
    return value


def _turns(path: Path | str, line: int, turns: Any) -> Turns:
    if not isinstance(turns, list) or not 1 <= len(turns) <= 2 or not all(isinstance(turn, str) for turn in turns):
        raise RecordError(path, line, f"turns is {shown(turns)}; it is a list of one or two texts")
    return tuple(turns)


def complete(questions: Sequence[Question], answers: Mapping[int, Turns], where: str) -> None:
    """Raises: EvaluationError: if a question, or one of its turns, has no answer; before a token is spent."""
    for question in questions:
        given = len(answers.get(question.question_id, ()))
        if given != len(question.turns):
            raise EvaluationError(
                f"{where}: {given} of {len(question.turns)} turns of question {question.question_id} are answered; "
                "answer all of them, or lower --max-prompts"
            )


# ----------------------------------------------------------------------------------------------------------- answering


def answer(respond: Respond, questions: Sequence[Question], temperature: float | None = None) -> dict[int, Turns]:
    """The answers to all questions, each at the temperature of its category, or at ``temperature``. The second turn
    sees the first one and its answer. ``respond`` gives the texts to (name of the part, prompts, temperature)."""
    answers: dict[int, Turns] = {question.question_id: () for question in questions}
    for turn in (1, 2):
        by_temperature = collections.defaultdict(list)
        for question in questions:
            if len(question.turns) >= turn:
                at = question.temperature if temperature is None else temperature
                by_temperature[at].append(question)
        for at, group in by_temperature.items():
            prompts = [
                Prompt(id=f"{question.question_id}, turn {turn}", messages=conversation(question, answers))
                for question in group
            ]
            for question, text in zip(group, respond(f"turn_{turn}_at_{at:g}", prompts, at), strict=True):
                answers[question.question_id] += (text,)
    return answers


def conversation(question: Question, answers: Mapping[int, Turns]) -> tuple[Message, ...]:
    """The messages before the next answer to a question."""
    given = answers[question.question_id]
    messages: list[Message] = []
    for text, reply in zip(question.turns, given, strict=False):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    return (*messages, {"role": "user", "content": question.turns[len(given)]})


# ------------------------------------------------------------------------------------------------------------- judging


class Task(NamedTuple):
    """A request to the judge, and which row it belongs to: a turn of a question, and for pairs the game (1 or 2)."""

    question: Question
    turn: int
    game: int
    template: str
    request: Prompt


def single_tasks(
    questions: Sequence[Question], answers: Mapping[int, Turns], templates: Mapping[str, Template]
) -> list[Task]:
    """The requests for a grade of every turn."""
    return [
        _task(question, turn, 1, {"": answers[question.question_id]}, templates)
        for turn in (1, 2)
        for question in questions
        if len(question.turns) >= turn
    ]


def pair_tasks(
    questions: Sequence[Question],
    first: Mapping[int, Turns],
    second: Mapping[int, Turns],
    templates: Mapping[str, Template],
) -> list[Task]:
    """The requests for a verdict on every turn, in both orders: in game 1 ``first`` is assistant A, in game 2 B."""
    tasks = []
    for turn in (1, 2):
        for question in questions:
            if len(question.turns) >= turn:
                a, b = first[question.question_id], second[question.question_id]
                tasks.append(_task(question, turn, 1, {"a": a, "b": b}, templates))
                tasks.append(_task(question, turn, 2, {"a": b, "b": a}, templates))
    return tasks


def _task(
    question: Question, turn: int, game: int, answers: Mapping[str, Turns], templates: Mapping[str, Template]
) -> Task:
    name = template_name(pair="" not in answers, turn=turn, reference=question.references is not None)
    shown_turns = {who: turns[:turn] for who, turns in answers.items()}
    values = turn_values(question.turns[:turn], shown_turns, question.references)
    request = Prompt(id=f"{question.question_id}, turn {turn}, game {game}", messages=templates[name].messages(values))
    return Task(question, turn, game, name, request)


def grade(
    cache: AnswerCache,
    writer: Writer,
    tasks: Sequence[Task],
    cfg: JudgeConfig,
    *,
    model: str,
    judge: str,
    seed: int = 0,
    now: float | None = None,
) -> list[dict[str, Any]]:
    """Single judgments in FastChat's format. A text without a grade, and a request that has no room in the judge's
    context, has the score -1; the latter is asked again by the next run."""
    texts = _texts(cache, writer, tasks, cfg, seed)
    return [
        {
            "question_id": task.question.question_id,
            "model": model,
            "judge": [judge, task.template],
            "user_prompt": task.request.messages[-1]["content"],
            "judgment": text,
            "score": NO_SCORE if (score := rating(text)) is None else score,
            "turn": task.turn,
            "tstamp": time.time() if now is None else now,
        }
        for task, text in zip(tasks, texts, strict=True)
    ]


def compare(
    cache: AnswerCache,
    writer: Writer,
    tasks: Sequence[Task],
    cfg: JudgeConfig,
    *,
    models: tuple[str, str],
    judge: str,
    seed: int = 0,
    now: float | None = None,
) -> list[dict[str, Any]]:
    """Pair judgments in FastChat's format. A game without a verdict has the winner "error"."""
    texts = dict(zip([task.request.id for task in tasks], _texts(cache, writer, tasks, cfg, seed), strict=True))
    judgments = []
    for first, second in zip(tasks[::2], tasks[1::2], strict=True):
        row: dict[str, Any] = {"question_id": first.question.question_id, "model_1": models[0], "model_2": models[1]}
        games = {}
        for task in (first, second):
            text = texts[task.request.id]
            letter = verdict(text)
            row[f"g{task.game}_winner"] = "error" if letter is None else WINNERS[task.game - 1][letter]
            games |= {f"g{task.game}_user_prompt": task.request.messages[-1]["content"], f"g{task.game}_judgment": text}
        row |= {"judge": [judge, first.template], **games, "turn": first.turn}
        judgments.append(row | {"tstamp": time.time() if now is None else now})
    return judgments


def _texts(cache: AnswerCache, writer: Writer, tasks: Sequence[Task], cfg: JudgeConfig, seed: int) -> list[str]:
    requests = [task.request for task in tasks]
    found = ask_texts(cache, writer, requests, cfg, seed=seed)
    return [found.values[r.id]["text"] if r.id in found.values else NO_JUDGMENT for r in requests]
