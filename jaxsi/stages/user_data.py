"""The files that people have, as records: prompts, demonstrations, preference pairs and ranked responses.

A source is a file (JSONL, JSON, CSV, TSV, Parquet or Arrow; text also as .gz or .zst), a folder that `datasets` saved
or that holds such files, or the name of a set on the hub. A file is read by its content and by the end of its name. The
rows may be in any of these dialects:

    {"prompt": TEXT or MESSAGES}                TRL, and this project; "question" and "query" mean the same
    {"messages": MESSAGES}                      OpenAI, TRL; the last assistant's turn is the response
    {"conversations": [{"from", "value"}]}      ShareGPT
    {"instruction": TEXT, "input": TEXT}        Alpaca, with "output" as the response
    {"chosen": ..., "rejected": ...}            TRL: texts beside a prompt, or whole conversations that begin alike
    {..., "completion": TEXT or MESSAGES}       TRL; "response", "output" and "answer" mean the same
    {..., "responses": [TEXT, ...]}             best first; or in any order, with "ranks": [NUMBER, ...], 0 the best

Other columns are ignored, and named once.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxsi.runs.records import (
    ROLES,
    Message,
    Prompt,
    RankedResponses,
    RecordError,
    SFTExample,
    check_unicode,
    shown,
)
from jaxsi.stages.rows import rows

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
Columns = Mapping[str, str]  # the name of a column here -> its name in the file

PROMPT_COLUMNS = ("prompt", "messages", "conversations", "conversation", "instruction", "question", "query")
RESPONSE_COLUMNS = ("completion", "response", "output", "answer")
_ID_COLUMNS = ("id", "prompt_id")
_ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "developer": "system",
}
_TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_MAX_SHOWN = 5  # numbers of bad rows in an error


class Pair(NamedTuple):
    """A prompt with a better and a worse response, as texts."""

    prompt: Prompt
    chosen: str
    rejected: str


def read_prompts(
    source: Path | str,
    max_rows: int | None = None,
    *,
    columns: Columns | None = None,
    split: str = "train",
    skip_bad_rows: bool = False,
) -> list[Prompt]:
    """The prompts of a source, at most the first ``max_rows``. Turns after the last one of the user are left out.

    Args:
      columns: e.g. {"prompt": "ask"}, if the file calls the prompt "ask".
      split: of a saved set or a set on the hub that has several.
      skip_bad_rows: leave bad rows out and say how many they are, in place of an error. A row without an id of its own
        gets its line's number, or its place in the file if there are no lines, from 1.

    Raises: RecordError: if the source cannot be read or holds no prompt, or if a row is bad: it names the file, the
      line, the value, the reason and the fix.
    """
    return _read(source, _prompt, max_rows, columns, split, skip_bad_rows)


def read_examples(source: Path | str, max_rows: int | None = None, **options: Any) -> list[SFTExample]:
    """The demonstrations of a source: prompts with a response. Arguments and errors as in `read_prompts`."""
    return _read(source, _example, max_rows, **options)


def read_pairs(source: Path | str, max_rows: int | None = None, **options: Any) -> list[Pair]:
    """The preference pairs of a source. Arguments and errors as in `read_prompts`."""
    return _read(source, _pair, max_rows, **options)


def read_rankings(source: Path | str, max_rows: int | None = None, **options: Any) -> list[RankedResponses]:
    """The ranked responses of a source: two or more to each prompt. Arguments and errors as in `read_prompts`."""
    return _read(source, _ranking, max_rows, **options)


def columns_of(words: Sequence[str]) -> dict[str, str]:
    """("prompt=ask", "response=say") as {"prompt": "ask", "response": "say"}. Raises: ValueError for other words."""
    known = (*PROMPT_COLUMNS, *RESPONSE_COLUMNS, "input", "chosen", "rejected", "responses", "ranks", "id")
    columns = {}
    for word in words:
        column, equals, name = word.partition("=")
        if not equals or not name or column not in known:
            raise ValueError(f"{word!r} is not of the form COLUMN=NAME; COLUMN is one of {', '.join(known)}")
        columns[column] = name
    return columns


def place_of(
    source: Path | str, id: str, *, columns: Columns | None = None, split: str = "train", **options: Any
) -> int | None:
    """The line, or the place from 1, of the row with this id; for errors about a row that was read. None if the source
    is not read by rows, such as a function. Arguments as in `read_prompts`."""
    with contextlib.suppress(RecordError):
        for place, value in rows(source, split):
            with contextlib.suppress(ValueError):
                if _Row(value, place, columns or {}, set()).id() == id:
                    return place
    return None


def _read(
    source: Path | str,
    convert: Callable[["_Row"], Result],
    max_rows: int | None,
    columns: Columns | None = None,
    split: str = "train",
    skip_bad_rows: bool = False,
) -> list[Result]:
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_prompts is {max_rows}, the least is 1; leave it out to read every prompt")
    results: list[Result] = []
    seen: dict[str, int] = {}
    bad: dict[int, str] = {}
    unused: set[str] = set()
    count = 0
    for place, value in rows(source, split):
        count += 1
        try:
            row = _Row(value, place, columns or {}, set())
            result = convert(row)
            id = row.id()
            if id in seen:
                raise ValueError(f"id {shown(id)} is already on line {seen[id]}; ids must be unique")
        except ValueError as error:
            bad[place] = str(error)
            continue
        seen[id] = place
        unused |= value.keys() - row.used
        results.append(result)
        if len(results) == max_rows:
            break
    if bad:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in Counter(bad.values()).most_common(3))
        if not skip_bad_rows:
            first = min(bad)
            others = "" if len(bad) == 1 else f"; {len(bad)} of {count} rows are bad, at {_places(list(bad))}"
            fix = "" if len(bad) == count else "; mend it, or leave out what is bad with --skip-bad-rows"
            raise RecordError(source, first, bad[first] + others + fix)
        _log.warning("%s: %d of %d rows are left out: %s", source, len(bad), count, reasons)
    if not results:
        raise RecordError(source, None, 'the file holds no prompts; write one object per line, as {"prompt": "…"}')
    if unused:
        _log.info("%s: these columns are not used: %s", source, ", ".join(sorted(map(str, unused))))
    return results


def _places(places: list[int]) -> str:
    return ", ".join(map(str, places[:_MAX_SHOWN])) + (", ..." if len(places) > _MAX_SHOWN else "")


# ---- rows as records -------------------------------------------------------------------------------------------------


class _Row:
    """A row of a source, and which of its columns have been used."""

    def __init__(self, value: Any, place: int, columns: Columns, used: set[str]):
        if isinstance(value, ValueError):
            raise value
        if not isinstance(value, dict):
            raise ValueError(f'a row is an object like {{"prompt": "…"}}, found {shown(value)}')
        self.value, self.place, self.columns, self.used = value, place, columns, used

    def name(self, column: str) -> str:
        return self.columns.get(column, column)

    def first(self, columns: Sequence[str]) -> str | None:
        """The first of the columns that the row has; those that the user has named come before all others."""
        named = [column for column in columns if column in self.columns]
        return next((c for c in (*named, *columns) if self.value.get(self.name(c)) is not None), None)

    def get(self, column: str) -> Any:
        self.used.add(self.name(column))
        return self.value[self.name(column)]

    def id(self) -> str:
        for column in _ID_COLUMNS:
            if self.name(column) in self.value:
                id = self.get(column)
                if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
                    raise ValueError(f"id {shown(id)} is not a non-empty string or a number")
                check_unicode(str(id), "id")
                return str(id)
        return str(self.place)

    def prompt(self) -> tuple[Message, ...]:
        """The conversation; a response may follow."""
        column = self.first(PROMPT_COLUMNS)
        if column is None:
            names = ", ".join(sorted(map(str, self.value))) or "none"
            raise ValueError(f"no prompt: the columns are {names}; name the one that has it by --column prompt=NAME")
        messages = _messages(self.get(column), column)
        if column == "instruction" and self.first(("input",)) is not None:
            more = self.get("input")
            if not isinstance(more, str):
                raise ValueError(f'"input" is {shown(more)}; it must be a text')
            if more.strip():
                messages = ({"role": "user", "content": f"{messages[0]['content']}\n\n{more}"},)
        return messages


def _prompt(row: _Row) -> Prompt:
    messages = row.prompt()
    while messages and messages[-1]["role"] != "user":
        messages = messages[:-1]
    if not messages:
        raise ValueError("the conversation has no turn of the user; a prompt ends with the user's turn")
    return Prompt(id=row.id(), messages=messages)


def _example(row: _Row) -> SFTExample:
    messages = row.prompt()
    column = row.first(RESPONSE_COLUMNS)
    if column is not None:
        messages = (*_prompt(row).messages, *_completion(row.get(column), column))
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        raise ValueError(
            f"no response: the row has neither a last turn of the assistant nor one of the columns "
            f"{', '.join(RESPONSE_COLUMNS)}; name it by --column response=NAME"
        )
    return SFTExample(id=row.id(), messages=messages[:-1], response=messages[-1]["content"])


def _pair(row: _Row) -> Pair:
    if missing := [column for column in ("chosen", "rejected") if row.first((column,)) is None]:
        raise ValueError(f"no {missing[0]} response; name its column by --column {missing[0]}=NAME")
    chosen, rejected = (_completion(row.get(column), column) for column in ("chosen", "rejected"))
    if row.first(PROMPT_COLUMNS) is not None:
        messages = _prompt(row).messages
        # Some sets repeat the prompt in both.
        chosen, rejected = (turns[len(messages) :] if turns[:-1] == messages else turns for turns in (chosen, rejected))
    else:
        if chosen[:-1] != rejected[:-1]:
            raise ValueError("chosen and rejected differ before their last turn, so they do not answer one prompt")
        messages = chosen[:-1]
        chosen, rejected = chosen[-1:], rejected[-1:]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("no prompt before the chosen response; name its column by --column prompt=NAME")
    if len(chosen) != 1 or len(rejected) != 1:
        raise ValueError("chosen and rejected must each be one turn of the assistant after the prompt")
    return Pair(Prompt(id=row.id(), messages=messages), chosen[0]["content"], rejected[0]["content"])


def _ranking(row: _Row) -> RankedResponses:
    if row.first(("responses",)) is None:
        raise ValueError("no responses; name the column of their list by --column responses=NAME")
    texts, ranks = row.get("responses"), None
    if not isinstance(texts, list) or len(texts) < 2:
        raise ValueError(f'"responses" is {shown(texts)}; it must be a list of two or more texts, the best first')
    if row.first(("ranks",)) is not None:
        ranks = row.get("ranks")
        if not isinstance(ranks, list) or len(ranks) != len(texts) or not all(type(rank) is int for rank in ranks):
            raise ValueError(
                f'"ranks" is {shown(ranks)}; it must hold {len(texts)} whole numbers, the smallest the best'
            )
    prompt = _prompt(row)
    return RankedResponses(
        id=prompt.id,
        messages=prompt.messages,
        responses=tuple(_completion(text, "responses")[-1]["content"] for text in texts),
        ranks=tuple(range(len(texts)) if ranks is None else [rank - min(ranks) for rank in ranks]),
    )


def _completion(value: Any, column: str) -> tuple[Message, ...]:
    """A response: a text, or turns of which the last is the assistant's."""
    if isinstance(value, str):
        return ({"role": "assistant", "content": _text(value, column)},)
    messages = _messages(value, column)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f'"{column}" ends with the turn of the {messages[-1]["role"]}, not of the assistant')
    return messages


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{column}" is {shown(value)}; it must be a non-empty text')
    check_unicode(value, column)
    return value


def _messages(value: Any, column: str) -> tuple[Message, ...]:
    if column in ("prompt", "instruction", "question", "query") and not isinstance(value, list):
        return ({"role": "user", "content": _text(value, column)},)
    if not isinstance(value, list) or not value:
        raise ValueError(f'"{column}" is {shown(value)}; it must be a non-empty list of {{"role", "content"}}')
    return tuple(map(_message, value))


def _message(value: Any) -> Message:
    role_key, text_key = ("from", "value") if isinstance(value, dict) and "from" in value else ("role", "content")
    if not isinstance(value, dict) or not {role_key, text_key} <= value.keys():
        raise ValueError(f'message {shown(value)} must be an object with the keys "role" and "content" only')
    role, content = value[role_key], value[text_key]
    role = _ROLE_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"role {shown(role)} is not one of {', '.join(ROLES)}; leave out such messages or the row")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"the content of message {shown(value)} must be a non-empty text")
    check_unicode(content, "content")
    return {"role": role, "content": content}
