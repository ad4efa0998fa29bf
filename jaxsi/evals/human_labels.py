"""Files of human labels and of judges' verdicts, in the formats in which they are published.

Labels: votes on MT-Bench (`model_a`, `model_b`, `winner`), LLMBar (`output_1`, `output_2`, `label`), PandaLM's test set
(`response1`, `response2`, `annotator1` to `annotator3`). Verdicts: the same votes by a judge, FastChat's pair judgments
(`g1_winner`, `g2_winner`) and single judgments (`score`), LLMBar's `result.json`, PandaLM's results (`idx`,
`..._result`), and our own (`Verdict`). The columns of the first row say which format a file has. Scores of models on
benchmarks are a CSV.
"""

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsi.evals.agreement import SWAPPED, Pair, Verdict, winner_of
from jaxsi.runs.records import Prompt, RecordError, from_json, opened, shown
from jaxsi.stages.prompts.comparison import Winner
from jaxsi.stages.rows import rows

Row = Mapping[str, Any]


class Texts(NamedTuple):
    """What a pair is about: the prompt and both responses, for a judge that has yet to be asked."""

    prompt: Prompt
    first: str
    second: str


class Labelled(NamedTuple):
    """The pairs of a file, and their texts by the id of the pair if the file holds them."""

    pairs: list[Pair]
    texts: dict[str, Texts]


def read_labels(path: Path | str, voters: str = "") -> Labelled:
    """Pairs with people's labels from a file; see the module for the formats.

    Args:
      voters: count only the votes of those whose name begins so, such as "expert"; of files that name who voted.

    Raises: RecordError: if the file cannot be read, has another format, or a row is bad; it names the line.
    """
    table = _rows(path)
    formats: list[tuple[set[str], Callable[[Path | str, list[tuple[int, Row]], str], Labelled]]] = [
        ({"model_a", "model_b", "winner"}, _votes),
        ({"output_1", "output_2", "label"}, _llmbar),
        ({"response1", "response2", "annotator1"}, _pandalm),
    ]
    columns = table[0][1].keys()
    for needed, reader in formats:
        if needed <= columns:
            return reader(path, table, voters)
    raise RecordError(
        path,
        table[0][0],
        f"no format of human labels has the columns {', '.join(columns)}; it takes model_a, model_b, winner (votes); "
        "output_1, output_2, label (LLMBar); or response1, response2, annotator1 (PandaLM)",
    )


def read_verdicts(path: Path | str) -> tuple[list[Verdict], list[Pair]]:
    """A judge's verdicts from a file, and their pairs without labels, as far as the file names them.

    Raises: RecordError: as `read_labels`.
    """
    table = _rows(path)
    columns = table[0][1].keys()
    if {"g1_winner", "g2_winner"} <= columns:
        return _fastchat_pairs(path, table)
    if {"model", "score", "turn"} <= columns:
        return _fastchat_scores(path, table)
    if {"model_a", "model_b", "winner"} <= columns:
        return _judge_votes(path, table)
    if {"label", "results"} <= columns:
        return [_llmbar_verdict(path, line, str(i), row) for i, (line, row) in enumerate(table)], []
    result = next((name for name in columns if name.endswith("_result")), None)
    if "idx" in columns and result is not None:
        return _reading(path, table, lambda row: _pandalm_verdict(row, result)), []
    if {"id", "winner"} <= columns:
        return _reading(path, table, lambda row: from_json(Verdict, row)), []
    raise RecordError(
        path,
        table[0][0],
        f"no format of verdicts has the columns {', '.join(columns)}; it takes g1_winner, g2_winner or model, score, "
        "turn (FastChat); model_a, model_b, winner (votes); label, results (LLMBar); idx, ..._result (PandaLM); or "
        "id, winner (ours)",
    )


# ---------------------------------------------------------------------------------------------------------- rows


def _rows(path: Path | str) -> list[tuple[int, Row]]:
    table = []
    for line, row in rows(path):
        if isinstance(row, ValueError):
            raise RecordError(path, line, str(row))
        if not isinstance(row, Mapping):
            raise RecordError(path, line, f"a row is a JSON object, found {shown(row)}")
        table.append((line, row))
    if not table:
        raise RecordError(path, None, "no rows in this file; give one with at least one row")
    return table


def _reading(path: Path | str, table: Sequence[tuple[int, Row]], read: Callable[[Row], Any]) -> list[Any]:
    """``read`` of every row; a missing key or a bad value becomes a RecordError that names the line."""
    found = []
    for line, row in table:
        try:
            found.append(read(row))
        except KeyError as error:
            raise RecordError(path, line, f"no column {error.args[0]!r}; it has {', '.join(row)}") from None
        except (TypeError, ValueError) as error:
            raise RecordError(path, line, str(error)) from None
    return found


def _whole(row: Row, key: str) -> int:
    """An id or a turn: a whole number, which some files write as a text."""
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip().lstrip("-").isdigit():
        raise ValueError(f"{key} is {shown(value)}; it is a whole number")
    return int(value)


# ---------------------------------------------------------------------------------------------------------- MT-Bench


class Place(NamedTuple):
    """What two models answered: a turn of a question. The names are in the order of the alphabet."""

    question_id: int
    turn: int
    first: str
    second: str

    @property
    def id(self) -> str:
        return f"{self.item}, {self.first} | {self.second}"

    @property
    def item(self) -> str:
        return f"{self.question_id}, turn {self.turn}"

    def pair(self, labels: Sequence[Winner] = ()) -> Pair:
        return Pair(
            id=self.id, item=self.item, first=self.first, second=self.second, labels=tuple(labels),
            group=f"turn {self.turn}",
        )  # fmt: skip


def _place(row: Row, a: str, b: str) -> tuple[Place, bool]:
    """The place of a row, and whether model ``a`` of the row is the first one of the place."""
    first, second = row[a], row[b]
    if not isinstance(first, str) or not isinstance(second, str) or first == second:
        raise ValueError(f"{a} is {shown(first)} and {b} is {shown(second)}; they are the names of two models")
    place = Place(_whole(row, "question_id"), _whole(row, "turn"), *sorted((first, second)))
    return place, first == place.first


def _winner(value: Any, a: str, b: str) -> Winner:
    text = str(value)
    if text.startswith("tie"):  # "tie (inconsistent)": the two orders disagree
        return "C"
    if text not in (a, b):
        raise ValueError(f"the winner is {shown(value)}; it is {a}, {b} or tie")
    return "A" if text == a else "B"


def _vote(row: Row) -> tuple[Place, Winner, str]:
    place, straight = _place(row, "model_a", "model_b")
    winner = _winner(row["winner"], "model_a", "model_b")
    return place, winner if straight else SWAPPED[winner], str(row["winner"])


def _votes(path: Path | str, table: list[tuple[int, Row]], voters: str) -> Labelled:
    kept = [(line, row) for line, row in table if str(row.get("judge", "")).startswith(voters)]
    if not kept:
        raise RecordError(path, None, f"no vote is by a judge whose name begins with {voters!r}; leave --voters out")
    labels: dict[Place, list[Winner]] = {}
    for place, winner, _ in _reading(path, kept, _vote):
        labels.setdefault(place, []).append(winner)
    return Labelled([place.pair(winners) for place, winners in labels.items()], {})


def _judge_votes(path: Path | str, table: list[tuple[int, Row]]) -> tuple[list[Verdict], list[Pair]]:
    found = _reading(path, table, _vote)
    says = any("inconsistent" in text for *_, text in found)  # then a verdict without it is of two orders that agree
    verdicts = [
        Verdict(id=place.id, winner=winner, inconsistent="inconsistent" in text if says else None)
        for place, winner, text in found
    ]
    return verdicts, _unlabelled([place for place, *_ in found])


def _fastchat_pairs(path: Path | str, table: list[tuple[int, Row]]) -> tuple[list[Verdict], list[Pair]]:
    def read(row: Row) -> tuple[Place, Verdict]:
        place, straight = _place(row, "model_1", "model_2")
        both: list[Winner | None] = []
        for game in ("g1_winner", "g2_winner"):  # model_1 is shown first in game 1, model_2 in game 2
            winner = None if row[game] == "error" else _winner(row[game], "model_1", "model_2")
            both.append(winner if straight or winner is None else SWAPPED[winner])
        first, second = both if straight else both[::-1]  # the order with the place's first model shown first
        return place, Verdict.of_orders(place.id, first, second)

    found = _reading(path, table, read)
    return [verdict for _, verdict in found], _unlabelled([place for place, _ in found])


def _fastchat_scores(path: Path | str, table: list[tuple[int, Row]]) -> tuple[list[Verdict], list[Pair]]:
    """Single grades as verdicts about every two models; without those that were not read (-1)."""

    def read(row: Row) -> tuple[tuple[int, int], str, float]:
        if not isinstance(row["score"], int | float) or isinstance(row["score"], bool):
            raise ValueError(f"score is {shown(row['score'])}; it is a number, -1 for a judgment without one")
        return (_whole(row, "question_id"), _whole(row, "turn")), str(row["model"]), float(row["score"])

    scores: dict[tuple[int, int], dict[str, float]] = {}
    for turn, model, score in _reading(path, table, read):
        scores.setdefault(turn, {})[model] = score  # a repeated judgment replaces the one before
    verdicts, places = [], []
    for (question_id, turn), by_model in scores.items():
        for first, second in _twos(sorted(by_model)):
            place = Place(question_id, turn, first, second)
            known = by_model[first] >= 0 and by_model[second] >= 0
            winner = winner_of(by_model[first], by_model[second]) if known else None
            verdicts.append(Verdict(id=place.id, winner=winner))
            places.append(place)
    return verdicts, _unlabelled(places)


def _twos(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((a, b) for i, a in enumerate(names) for b in names[i + 1 :])


def _unlabelled(places: Sequence[Place]) -> list[Pair]:
    return [place.pair() for place in dict.fromkeys(places)]


# ---------------------------------------------------------------------------------------------------------- LLMBar


def _number(value: Any, name: str) -> Winner:
    if str(value) not in ("1", "2"):
        raise ValueError(f"{name} is {shown(value)}; it is 1 or 2")
    return "A" if str(value) == "1" else "B"


def _llmbar(path: Path | str, table: list[tuple[int, Row]], voters: str) -> Labelled:
    _no_voters(path, voters)
    numbers = iter(range(len(table)))

    def read(row: Row) -> tuple[Pair, Texts]:
        id = str(next(numbers))
        pair = Pair(id=id, item=id, first="1", second="2", labels=(_number(row["label"], "label"),))
        return pair, Texts(Prompt.of(id, str(row["input"])), str(row["output_1"]), str(row["output_2"]))

    return _labelled(_reading(path, table, read))


def _llmbar_verdict(path: Path | str, line: int, id: str, row: Row) -> Verdict:
    """Winners in both orders stand under "swap = False" and "swap = True", both by the outputs' own numbers, in the
    last of the results: before it come a reference, metrics, or the verdicts that disagreed."""
    results = row["results"]
    last = results[-1] if isinstance(results, list) and results else None
    if not isinstance(last, Mapping) or not {"swap = False", "swap = True"} <= last.keys():
        raise RecordError(path, line, 'results end in no winners "swap = False" and "swap = True"; give a result.json')
    both: list[Winner | None] = []
    for name in ("swap = False", "swap = True"):
        winner = last[name].get("winner") if isinstance(last[name], Mapping) else None
        both.append("A" if str(winner) == "1" else "B" if str(winner) == "2" else None)
    return Verdict.of_orders(id, *both)


# ---------------------------------------------------------------------------------------------------------- PandaLM

_PANDALM: dict[str, Winner] = {"1": "A", "2": "B", "0": "C", "Tie": "C"}  # what could not be read counts as a tie


def _pandalm(path: Path | str, table: list[tuple[int, Row]], voters: str) -> Labelled:
    _no_voters(path, voters)
    seen = set[str]()

    def read(row: Row) -> tuple[Pair, Texts]:
        id = str(_whole(row, "idx"))
        if id in seen:
            raise ValueError(f"idx {id} occurs twice; leave one of the rows out")
        seen.add(id)
        labels = []
        for name in (name for name in row if name.startswith("annotator")):
            if str(row[name]) not in ("0", "1", "2"):
                raise ValueError(f"{name} is {shown(row[name])}; it is 1, 2, or 0 for a tie")
            labels.append(_PANDALM[str(row[name])])
        question = "\n\n".join(str(row[name]) for name in ("instruction", "input") if row.get(name))
        pair = Pair(id=id, item=id, first="1", second="2", labels=tuple(labels))
        return pair, Texts(Prompt.of(id, question), str(row["response1"]), str(row["response2"]))

    return _labelled(_reading(path, table, read))


def _pandalm_verdict(row: Row, column: str) -> Verdict:
    said = str(row[column])
    return Verdict(id=str(_whole(row, "idx")), winner=_PANDALM.get(said, "C"), unread=said not in _PANDALM)


def _labelled(found: Sequence[tuple[Pair, Texts]]) -> Labelled:
    return Labelled([pair for pair, _ in found], {pair.id: texts for pair, texts in found})


def _no_voters(path: Path | str, voters: str) -> None:
    if voters:
        raise RecordError(path, None, f"this format does not say who voted; leave --voters {voters} out")


# ---------------------------------------------------------------------------------------------------------- scores

_ABSENT = ("", "-", "nan", "n/a", "none", "null")  # cells of a model without a score


def read_scores(path: Path | str) -> dict[str, dict[str, float]]:
    """Scores of models from a CSV, such as a leaderboard: of each benchmark the score of each model that has one. The
    first column names the models. Columns without a number are left out; a row may have fewer cells than the header.
    Line breaks in the name of a column become spaces.

    Raises: RecordError: if the file cannot be read, a name occurs twice, or a cell of a benchmark is no number.
    """
    try:
        with opened(path) as file:
            table = list(csv.reader(io.StringIO(file.read().decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise RecordError(path, None, f"not a CSV file: {error}; save it as UTF-8, with commas") from None
    header, *lines = [row for row in table if any(cell.strip() for cell in row)] or [[]]
    names = [" ".join(name.split()) for name in header]
    models = [row[0].strip() for row in lines]
    for what, found in (("column", names), ("model", models)):
        if twice := [name for i, name in enumerate(found) if name in found[:i]]:
            raise RecordError(path, None, f"the {what} {twice[0]!r} occurs twice; leave one of them out")
    scores: dict[str, dict[str, float]] = {}
    for place, name in enumerate(names[1:], start=1):
        cells = {model: row[place].strip() for model, row in zip(models, lines, strict=True) if place < len(row)}
        values = {model: _score(cell) for model, cell in cells.items() if cell.lower() not in _ABSENT}
        if any(value is not None for value in values.values()):
            wrong = next((model for model, value in values.items() if value is None), None)
            if wrong is not None:
                raise RecordError(path, None, f"{name} of {wrong} is {shown(cells[wrong])}; it is a number, or empty")
            scores[name] = {model: value for model, value in values.items() if value is not None}
    if len(scores) < 2:
        raise RecordError(path, None, f"{len(scores)} columns with scores; it needs two, after one with the models")
    return scores


def _score(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
