"""Public data sets as records, and the judge's own training data (EFT) from ranked responses.

Each known set has one loader, which knows its columns. `source` is a hub name, a local file (JSON, JSONL, Parquet, CSV)
or a folder. A loader skips rows that its set is known to contain and that cannot become a record (another language, an
unfinished conversation). A missing column or a value of another shape is a SourceError.
"""

import hashlib
import json
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsi.runs.records import LFS_POINTER, Judgment, Message, Prompt, RankedResponses, Response, SFTExample
from jaxsi.stages.prompts import Rubric, question_text, up_to_verdict

_log = logging.getLogger(__name__)

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant", "prompter": "user"}

Columns = Mapping[str, str] | None  # the loader's name of a column -> the file's name of it
Row = dict[str, Any]


class SourceError(Exception):
    """A data set cannot be read as its loader expects; the message names the set, the place and the fix."""


def oasst(source: str = "OpenAssistant/oasst1", *, split: str = "train", columns: Columns = None) -> list[SFTExample]:
    """Open Assistant: English first turns with the reply that humans ranked best (rank 0); the paper's IFT set."""
    return [
        SFTExample(id=ranked.id, messages=ranked.messages, response=ranked.responses[0])
        for ranked in _oasst_replies(source, split, columns)
        if ranked.ranks[0] == 0
    ]


def oasst_rankings(
    source: str = "OpenAssistant/oasst1", *, split: str = "train", columns: Columns = None
) -> list[RankedResponses]:
    """Open Assistant: English first turns with two or more human-ranked replies, best first."""
    return [ranked for ranked in _oasst_replies(source, split, columns) if len(ranked.responses) >= 2]


def tulu2_mixture(
    source: str = "allenai/tulu-v2-sft-mixture", *, split: str = "train", columns: Columns = None
) -> list[SFTExample]:
    """The Tulu 2 mixture: each conversation's last assistant turn is the response, the turns before it the prompt."""
    examples = []
    for row in _rows("tulu2_mixture", source, split, ("id", "messages"), columns):
        messages = _messages("tulu2_mixture", row["id"], row["messages"])
        while messages and messages[-1]["role"] != "assistant":
            messages = messages[:-1]
        if len(messages) >= 2 and messages[-2]["role"] == "user" and messages[-1]["content"].strip():
            response = messages[-1]["content"]
            examples.append(SFTExample(id=str(row["id"]), messages=messages[:-1], response=response))
    return _checked("tulu2_mixture", source, examples)


def nectar(
    source: str = "berkeley-nest/Nectar", *, split: str = "train", columns: Columns = None
) -> list[RankedResponses]:
    """Nectar: seven responses per prompt (a transcript that ends in "Assistant:"), ranked from 1 = best."""
    ranked, dropped = [], _Dropped("nectar")
    for number, row in enumerate(_rows("nectar", source, split, ("prompt", "answers"), columns)):
        where = f"row {number}"
        answers = _list("nectar", where, "answers", row["answers"])
        texts = [_field("nectar", where, "answers", answer, "answer", str) for answer in answers]
        ranks = [_field("nectar", where, "answers", answer, "rank", int | float) for answer in answers]
        messages = transcript_messages(row["prompt"])
        if messages and messages[-1] == {"role": "assistant", "content": ""}:
            messages = messages[:-1]
        if not messages or messages[-1]["role"] != "user":
            dropped.count(where, 'prompts without a turn of "Human:" at the end')
        elif not texts:
            dropped.count(where, "prompts without answers")
        elif not all(map(math.isfinite, ranks)):
            dropped.count(where, "prompts with an answer without a rank")
        else:
            ranked.append(_ranked(f"nectar-{number}", messages, texts, [float(rank) for rank in ranks]))
    return dropped.checked(source, ranked)


def ultrafeedback(
    source: str = "openbmb/UltraFeedback", *, split: str = "train", columns: Columns = None
) -> list[RankedResponses]:
    """UltraFeedback: four completions per instruction, ranked by their overall score. Of some completions of the set
    the overall score is wrong (10 in place of 1): where it contradicts the mean of the fine-grained ratings, the
    completion is left out. So are completions without a score, and instructions without completions."""
    ranked, dropped = [], _Dropped("ultrafeedback")
    for number, row in enumerate(_rows("ultrafeedback", source, split, ("instruction", "completions"), columns)):
        where = f"row {number}"
        texts: list[str] = []
        scores: list[float] = []
        for completion in _list("ultrafeedback", where, "completions", row["completions"] or []):
            text = _field("ultrafeedback", where, "completions", completion, "response", str)
            overall, fine = (_score(completion.get(name)) for name in ("overall_score", "fine-grained_score"))
            if "overall_score" not in completion:
                _field("ultrafeedback", where, "completions", completion, "overall_score", int | float)
            if overall is None:
                dropped.count(where, "completions without an overall score")
            elif fine is not None and _contradictory(overall, fine):
                dropped.count(where, "completions with a wrong overall score")
            else:
                texts.append(text)
                scores.append(overall)
        if texts:
            messages = ({"role": "user", "content": row["instruction"]},)
            ranked.append(_ranked(f"ultrafeedback-{number}", messages, texts, [-score for score in scores]))
        else:
            dropped.count(where, "instructions without completions")
    return dropped.checked(source, ranked)


def _score(value: Any) -> float | None:
    """A score as a number, also if the file has it as a text; None if it is none."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:  # "N/A"
        return None
    return number if math.isfinite(number) else None


def _contradictory(overall: float, fine: float) -> bool:
    """Whether an overall score from 1 to 10 is very good (8 or more) where the mean of the fine-grained ratings, from 1
    to 5, is bad (2 or less), or the other way round."""
    return (overall >= 8 and fine <= 2) or (overall <= 3 and fine >= 4)


def hh_rlhf(
    source: str = "Anthropic/hh-rlhf", *, split: str = "train", columns: Columns = None
) -> list[RankedResponses]:
    """HH-RLHF: two transcripts that differ in the last assistant turn; the chosen has rank 0, the rejected rank 1. A
    few differ earlier, or end in another turn: they compare conversations, not responses, and are left out."""
    ranked, dropped = [], _Dropped("hh_rlhf")
    for number, row in enumerate(_rows("hh_rlhf", source, split, ("chosen", "rejected"), columns)):
        chosen, rejected = (transcript_messages(row[column]) for column in ("chosen", "rejected"))
        if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
            dropped.count(f"row {number}", "pairs without a prompt in common")
        elif not chosen[-1]["role"] == rejected[-1]["role"] == "assistant" or chosen[-2]["role"] != "user":
            dropped.count(f"row {number}", 'pairs that do not end in "Human:" and "Assistant:"')
        else:
            texts = [chosen[-1]["content"], rejected[-1]["content"]]
            ranked.append(_ranked(f"hh-{number}", chosen[:-1], texts, [0.0, 1.0]))
    return dropped.checked(source, ranked)


class _Dropped:
    """Counts what a loader leaves out, by reason, and where the first of each is."""

    def __init__(self, name: str):
        self.name, self.first = name, dict[str, str]()
        self.counts = Counter[str]()

    def count(self, where: str, reason: str) -> None:
        self.first.setdefault(reason, where)
        self.counts[reason] += 1

    def checked(self, source: str, records: list[Any]) -> list[Any]:
        """The records; the log says what was left out. Raises: SourceError if nothing is left."""
        for reason, count in self.counts.items():
            _log.warning("%s: %d %s are left out, the first in %s", self.name, count, reason, self.first[reason])
        if not records and self.counts:
            reasons = "; ".join(f"{self.first[reason]} and others: {reason}" for reason in self.counts)
            raise SourceError(
                f"{self.name} from {source}: no row became a record ({reasons}); check the name of the set"
            )
        return _checked(self.name, source, records)


def transcript_messages(text: str) -> tuple[Message, ...]:
    """Turns that begin with "Human:" or "Assistant:", each after a blank line, as stripped messages.

    Text before the first turn is ignored.
    """
    pieces = _TURN.split(text)[1:]
    return tuple(
        {"role": _ROLES.get(role, "assistant"), "content": content.strip()}
        for role, content in zip(pieces[::2], pieces[1::2], strict=True)
    )


def as_responses(ranked: Iterable[RankedResponses]) -> tuple[list[Prompt], list[Response]]:
    """Prompts and responses as `jaxsi.judge` takes them. Response i of prompt p has the id "p#i" and no token ids."""
    prompts, responses = [], []
    for record in ranked:
        prompts.append(Prompt(id=record.id, messages=record.messages))
        responses += [Response.of(f"{record.id}#{i}", record.id, i, text) for i, text in enumerate(record.responses)]
    return prompts, responses


def eft_examples(
    ranked: Sequence[RankedResponses],
    judgments: Sequence[Judgment],
    rubric: Rubric,
    *,
    max_share: float = 0.4,
    seed: int = 0,
    ift: Sequence[SFTExample] = (),
) -> tuple[list[SFTExample], dict[str, float]]:
    """Judge prompt -> justification and score: the judge's own texts for prompts on which it agrees with humans.

    The paper's rule (Self-Rewarding, arXiv 2401.10020): judge human-ranked responses, keep those on which the orders
    agree, and resample so that no score dominates. Our reading of it: take the first of the K judgments whose verdicts
    order no pair of responses wrongly and at least one pair rightly (equal scores count as neither). Then thin out the
    scores that hold more than `max_share` of the examples, by `seed` and independent of the order of the records.

    Args:
      judgments: of `as_responses(ranked)`, joined by id; the target is the text up to its verdict.
      ift: demonstrations whose prompts are left out, so that the two sets are disjoint.

    Returns: examples with the ids of their responses, and counts: prompts, "in_ift", "disagree" (none of the K agrees),
      "agree", "no_justification" (a bare score), "thinned", examples; and "max_share_raised_to" if the kept examples
      have so few different scores that `max_share` cannot be met.

    Raises: ValueError: if the judgments do not fit `ranked`.
    """
    if not 0.0 < max_share <= 1.0:
        raise ValueError(f"max_share is {max_share}; give a number in (0, 1]")
    by_id = {judgment.id: judgment for judgment in judgments}
    if len(by_id) != len(judgments):
        raise ValueError(f"{len(judgments) - len(by_id)} of {len(judgments)} judgments repeat an id; ids are unique")
    ift_questions = {_normal(question_text(example.messages)) for example in ift}
    counts = dict.fromkeys(("in_ift", "disagree", "agree", "no_justification"), 0)
    candidates: list[tuple[int, SFTExample]] = []
    for record in ranked:
        if _normal(question_text(record.messages)) in ift_questions:
            counts["in_ift"] += 1
            continue
        verdicts = _first_agreeing(record, by_id, rubric)
        counts["agree" if verdicts else "disagree"] += 1
        for i, score, text in verdicts:
            judge_prompt = rubric.render(question_text(record.messages), record.responses[i])
            target = up_to_verdict(text)
            if target is None or not re.search(r"\w", target[: target.lower().rindex("score")]):
                counts["no_justification"] += 1
                continue
            messages = Prompt.of("", judge_prompt).messages
            candidates.append((score, SFTExample(id=f"{record.id}#{i}", messages=messages, response=target)))
    least = 1 / max(len({score for score, _ in candidates}), 1)
    examples = _thinned(candidates, max(max_share, least), seed)
    statistics = {
        "prompts": len(ranked),
        **counts,
        "thinned": len(candidates) - len(examples),
        "examples": len(examples),
    }
    return examples, statistics | ({"max_share_raised_to": least} if candidates and least > max_share else {})


def _first_agreeing(
    record: RankedResponses, by_id: Mapping[str, Judgment], rubric: Rubric
) -> list[tuple[int, int, str]]:
    """(response number, score, text) of the first judgment whose scores order the responses as the ranks do."""
    texts = []
    for i in range(len(record.responses)):
        judgment = by_id.get(f"{record.id}#{i}")
        if judgment is None:
            raise ValueError(f"ranked response {record.id}#{i} has no judgment; judge all of as_responses(ranked)")
        texts.append(judgment.texts)
    for k in range(max(map(len, texts), default=0)):
        verdicts = [(i, rubric.parse(row[k]), row[k]) for i, row in enumerate(texts) if k < len(row)]
        valid = [(i, score, text) for i, score, text in verdicts if score is not None]
        signs = {
            (a > b) - (a < b) == (record.ranks[j] > record.ranks[i]) - (record.ranks[j] < record.ranks[i])
            for i, a, _ in valid
            for j, b, _ in valid
            if i < j and a != b and record.ranks[i] != record.ranks[j]
        }
        if signs == {True}:
            return valid
    return []


def _thinned(scored: Sequence[tuple[int, SFTExample]], max_share: float, seed: int) -> list[SFTExample]:
    """Examples cut to the same number for each score, so that none exceeds `max_share`; they are drawn by id."""
    sizes = Counter(score for score, _ in scored)
    if not sizes:
        return []
    cap = max(sizes.values())
    while cap > 1 and cap > max_share * sum(min(size, cap) for size in sizes.values()) + 1e-9:
        cap -= 1
    groups: dict[int, list[tuple[bytes, str]]] = defaultdict(list)
    for score, example in scored:
        groups[score].append((hashlib.sha256(f"{seed}\0{example.id}".encode()).digest(), example.id))
    ids = {id for group in groups.values() for _, id in sorted(group)[:cap]}
    return [example for _, example in scored if example.id in ids]


def _oasst_replies(source: str, split: str, columns: Columns) -> list[RankedResponses]:
    """English first turns with their ranked English replies."""
    names = ("message_id", "parent_id", "text", "role", "lang", "rank")
    rows = [row for row in _rows("oasst", source, split, names, columns) if row["lang"] == "en"]
    replies: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["role"] == "assistant" and row["rank"] is not None:
            replies[row["parent_id"]].append(row)
    ranked = [
        _ranked(
            row["message_id"],
            ({"role": "user", "content": row["text"]},),
            [reply["text"] for reply in replies[row["message_id"]]],
            [float(reply["rank"]) for reply in replies[row["message_id"]]],
            dense=False,
        )
        for row in rows
        if row["role"] == "prompter" and row["parent_id"] is None and row["message_id"] in replies
    ]
    return _checked("oasst", source, ranked)


def _ranked(
    id: str, messages: tuple[Message, ...], texts: Sequence[str], order: Sequence[float], *, dense: bool = True
) -> RankedResponses:
    """Responses sorted from the lowest `order`, which is best. `dense`: ranks count from 0 without gaps, and equal
    values share one rank; otherwise the values themselves are the ranks."""
    places = {value: rank for rank, value in enumerate(sorted(set(order)))}
    rows = sorted(((places[value] if dense else int(value), i) for i, value in enumerate(order)))
    return RankedResponses(
        id=id,
        messages=messages,
        responses=tuple(texts[i] for _, i in rows),
        ranks=tuple(rank for rank, _ in rows),
    )


def _rows(name: str, source: str, split: str, required: Sequence[str], columns: Columns) -> Iterable[Row]:
    """The rows with only the required columns, under the loader's names; structured CSV cells are read as JSON."""
    names = {column: (columns or {}).get(column, column) for column in required}
    unknown = set(columns or {}) - set(required)
    if unknown:
        raise SourceError(f"{name}: columns maps {sorted(unknown)}; this set has {', '.join(required)}")
    table = _table(name, source, split)
    missing = [column for column in names.values() if column not in table.column_names]
    if missing:
        ours = next(column for column, theirs in names.items() if theirs == missing[0])
        raise SourceError(
            f"{name} from {source}: no column {missing[0]!r}; it has {', '.join(table.column_names)}. "
            f"Name it by columns={{{ours!r}: ...}} or check the source"
        )
    is_csv = Path(source).suffix == ".csv"
    for number, row in enumerate(table.select_columns(list(names.values()))):
        values = {column: row[theirs] for column, theirs in names.items()}
        if is_csv:
            values = {column: _cell(value) for column, value in values.items()}
        for column, value in values.items():
            optional = column in ("parent_id", "rank", "completions")
            if value is None and not optional:
                raise SourceError(
                    f"{name} from {source}: row {number} has no {names[column]!r}; remove or fill that row"
                )
        yield values


def _cell(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}" and value else value


def _table(name: str, source: str, split: str) -> Any:
    """A datasets.Dataset from a local file or folder, or from the hub (or its cache)."""
    import datasets

    path = Path(source)
    kind = _FORMATS.get(path.suffix)
    if path.is_file() and kind is None:
        raise SourceError(f"{name}: {source} is not a {', '.join(_FORMATS)} file; convert it to one of these")
    local = path.exists() or source.startswith((".", "/")) or kind is not None
    if local and not path.exists():
        raise SourceError(f"{name}: the file {source} does not exist; check the path or give a hub name")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise SourceError(
                    f"{name}: {source} is a Git LFS pointer, not the data; run `git lfs pull` in its folder"
                )
    try:
        if path.is_file() and kind is not None:
            return datasets.load_dataset(kind, data_files=str(path), split="train")
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises dozens of types, which for the user have two causes
        fix = "check that the file is whole" if local else "check name, split and network, or give a local file"
        raise SourceError(f"{name}: cannot read {source} ({type(error).__name__}: {error}); {fix}") from error


def _messages(name: str, id: str, value: Any) -> tuple[Message, ...]:
    messages = []
    for message in _list(name, f"row {id}", "messages", value):
        role = _field(name, f"row {id}", "messages", message, "role", str)
        if role not in ("system", "user", "assistant"):
            raise SourceError(f"{name}: row {id}, column 'messages': role {role!r}; it is system, user or assistant")
        content = _field(name, f"row {id}", "messages", message, "content", str)
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _list(name: str, where: str, column: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise SourceError(f"{name}: {where}, column {column!r} holds {type(value).__name__}; it is a list of objects")
    return value


def _field(name: str, where: str, column: str, value: Any, key: str, kind: Any) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        raise SourceError(
            f"{name}: {where}, column {column!r}: an entry has no usable {key!r}; check the set's version"
        )
    return value[key]


def _checked(name: str, source: str, records: list[Any]) -> list[Any]:
    """Raises: SourceError: if no row became a record: the set then has another shape than its loader expects."""
    if not records:
        raise SourceError(f"{name} from {source}: no row became a record; check the name of the set and its split")
    return records


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()
