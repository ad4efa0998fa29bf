"""Public data sets as records.

Each known set has one loader, which knows its columns. `source` is a hub name, a local file (JSON, JSONL, Parquet, CSV)
or a folder. A loader skips rows that its set is known to contain and that cannot become a record (another language, an
unfinished conversation). A missing column or a value of another shape is a SourceError.
"""

import json
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxsi.runs.errors import InputError
from jaxsi.runs.metrics import dense_ranks
from jaxsi.runs.records import LFS_POINTER, Message, RankedResponses, SFTExample

_log = logging.getLogger(__name__)

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant", "prompter": "user"}

Columns = Mapping[str, str] | None  # the loader's name of a column -> the file's name of it
Row = dict[str, Any]
Record = TypeVar("Record")


class SourceError(InputError):
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


def first(records: Sequence[Record], count: int, *, least: int | None = None) -> list[Record]:
    """The first ``count`` records, or all of them if there are fewer; the log says how many there are.

    Args:
      least: the fewest that will do; by default ``count`` itself.

    Raises: SourceError if there are fewer than ``least``. ValueError if ``least`` is above ``count``.
    """
    least = count if least is None else least
    if not 0 <= least <= count:
        raise ValueError(f"least is {least}; it lies from 0 to count = {count}")
    if len(records) < least:
        raise SourceError(
            f"{len(records)} records, fewer than the {least} that are needed; check the set and its split, or state a "
            "smaller minimum (least) where the config takes them"
        )
    taken = list(records[:count])
    _log.info("%d of %d records are taken; %d were asked for", len(taken), len(records), count)
    return taken


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
    ranks = dense_ranks([-value for value in order]) if dense else [int(value) for value in order]
    rows = sorted((rank, i) for i, rank in enumerate(ranks))
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
