"""The records that stages exchange, and their files: one JSON object per line, keyed by id, readable with `less`.

Stages exchange only these frozen records. A record that a model sampled also carries its token ids, the reason why it
ended, the fingerprint of the weights and the hash of the chat template. Files appear complete or not at all, are UTF-8,
and return exactly what was written (floats bit for bit).

Decoding is our own. msgspec and cattrs accept unknown keys in nested records or do not name the wrong value, and
msgspec cannot read half a surrogate pair.
"""

import contextlib
import functools
import gzip
import hashlib
import json
import os
import types
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxsi.runs.errors import InputError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
FinishReason = Literal["stop", "length"]
ROLES = ("system", "user", "assistant")
LFS_POINTER = b"version https://git-lfs"  # how a file begins that `git lfs pull` has not fetched yet


class RecordError(InputError):
    """A file of records or prompts that cannot be read or written; `str()` is "path:line: reason"."""

    def __init__(self, path: Path | str, line: int | None, reason: str):
        super().__init__(f"{path}: {reason}" if line is None else f"{path}:{line}: {reason}")
        self.path, self.line, self.reason = Path(path), line, reason


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation whose next turn is the assistant's, e.g. Prompt.of("17", "Reverse the word: loop")."""

    id: str
    messages: tuple[Message, ...]

    @staticmethod
    def of(id: str, text: str) -> "Prompt":
        """The prompt of one user message."""
        return Prompt(id=id, messages=({"role": "user", "content": text},))

    @property
    def text(self) -> str:
        """The content of the last user message."""
        return next(message["content"] for message in reversed(self.messages) if message["role"] == "user")


@dataclass(frozen=True, kw_only=True)
class Response:
    """One sampled answer, e.g. id "17#2" for sample 2 of prompt "17".

    `text` is the answer; `reasoning` is the thought before it, if there is one. An answer that was cut off within the
    thought has no text, and the finish_reason "length".

    `token_ids` are the sampled ids (the end-of-turn included if finish_reason is "stop"); `logps[i]` is the log-prob
    of `token_ids[i]` under the untruncated softmax at temperature 1, independent of the sampling settings.
    """

    id: str
    prompt_id: str
    sample: int
    text: str
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    finish_reason: FinishReason
    fingerprint: str
    template: str
    reasoning: str = ""

    @staticmethod
    def of(id: str, prompt_id: str, sample: int, text: str) -> "Response":
        """A text that was not sampled here. It has no token ids, so only readers of texts can use it."""
        return Response(
            id=id,
            prompt_id=prompt_id,
            sample=sample,
            text=text,
            token_ids=(),
            logps=(),
            finish_reason="stop",
            fingerprint="",
            template="",
        )


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """A judge's K texts about the response with the same id, their scores, and the mean of the valid scores.

    A text without a verdict has the score None. Without a valid score `score` is None, and no pair uses the response.
    """

    id: str
    prompt_id: str
    scores: tuple[float | None, ...]
    score: float | None
    texts: tuple[str, ...]
    fingerprint: str
    template: str


@dataclass(frozen=True, kw_only=True)
class Critique:
    """A critique of the response with the same id: language feedback, a score, and an improved response.

    A part that is missing, or not in the form that was asked for, is None. `text` is everything the critic generated;
    `fingerprint` is that of its weights, or the name of the model behind an endpoint.
    """

    id: str
    prompt_id: str
    weaknesses: str | None
    suggestions: str | None
    score: float | None
    improved: str | None
    text: str
    finish_reason: FinishReason
    fingerprint: str
    template: str


@dataclass(frozen=True, kw_only=True)
class Revision:
    """A reviser's or improver's new version of the response with the same id; on the label NO, that response itself.

    `label_probs` are in the order of the labels in the reviser's template; None from an improver, which has no labels.
    """

    id: str
    prompt_id: str
    label: str | None
    label_probs: tuple[float, ...] | None
    response: Response


Outcome = Literal["draft", "accepted", "kept", "rejected", "no response", "too long", "cut off", "empty", "ended"]


@dataclass(frozen=True, kw_only=True)
class Improvement:
    """The response to a prompt after a round of improvement at inference time, e.g. id "17@2" after round 2.

    Round 0 is the first response ("draft"). If a round's new response replaces the one before, it is "accepted".
    Otherwise `response` is that of the round before, and the outcome says why: "kept" (the method sees nothing to
    improve), "rejected" (the new response is not better), "no response", "cut off" or "empty" (the new text cannot be
    used), "too long" (the request does not fit in the context). The later rounds of the prompt have then "ended",
    except in best-of-n, where a round without a gain goes on to more samples.

    `score` is the method's own number (see jaxsi.stages.improve.rounds); `quality` is that of a judge or an exact
    grader. `feedback` was written about the response before. `tokens` counts the tokens generated in this round.
    """

    id: str
    prompt_id: str
    round: int
    response: Response
    outcome: Outcome
    score: float | None
    quality: float | None
    feedback: str | None
    tokens: int


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two responses to the prompt with the same id; chosen_score > rejected_score. ``agreement``: the probability that
    the label is right, for losses that read it."""

    id: str
    messages: tuple[Message, ...]
    chosen: Response
    rejected: Response
    chosen_score: float
    rejected_score: float
    agreement: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SFTExample:
    """A demonstration: the prompt's messages and the response as text (the chat template adds the end-of-turn)."""

    id: str
    messages: tuple[Message, ...]
    response: str


@dataclass(frozen=True, kw_only=True)
class RankedResponses:
    """Responses to one prompt ranked by a human (or a stand-in): ranks[i] of responses[i], 0 = best, ties allowed."""

    id: str
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[int, ...]


Record = TypeVar("Record")


def to_json(record: Any) -> dict[str, Any]:
    """The record as plain JSON values, with its fields in the order of the class; without those that have their
    default."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {f.name: _encode(values[f.name]) for f in fields(record) if values[f.name] != f.default}


def from_json(cls: type[Record], value: Any) -> Record:
    """The record of class `cls` from the output of `to_json`.

    Raises: ValueError: if a field is missing, unknown or of another type; it names the field.
    """
    if not isinstance(value, dict):
        raise ValueError(f"a {cls.__name__} is a JSON object, found {shown(value)}")
    hints, required = _schema(cls)
    if unknown := value.keys() - hints.keys():
        raise ValueError(f"unknown key {shown(min(unknown))} in a {cls.__name__}; its keys are {', '.join(hints)}")
    if missing := required - value.keys():
        raise ValueError(f"key {shown(min(missing))} of a {cls.__name__} is missing")
    return cls(**{name: _decode(hints[name], item, name) for name, item in value.items()})


def digest(records: Iterable[Any]) -> str:
    """16 hex digits that change when a record does."""
    rows = json.dumps([to_json(record) for record in records])
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


def write_jsonl(path: Path | str, records: Iterable[Any]) -> None:
    """Writes one record per line; the file appears complete or not at all.

    Raises:
      RecordError: if a field holds something that JSON cannot represent (NaN, arrays).
      OSError: if the disk fails.
    """
    write_atomically(path, (_dump_line(path, number, record) for number, record in enumerate(records, start=1)))


def read_jsonl(
    path: Path | str, cls: type[Record], *, fill: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> list[Record]:
    """The records of a file that `write_jsonl` wrote, or of another one whose rows ``fill`` completes.

    Raises: RecordError: if a line is broken; it names the line.
    """
    records = []
    for line, value in _json_lines(path):
        try:
            records.append(from_json(cls, fill(value) if fill is not None and isinstance(value, dict) else value))
        except ValueError as error:
            raise RecordError(path, line, str(error)) from None
    return records


def write_atomically(path: Path | str, chunks: Iterable[bytes]) -> None:
    """Writes `path` so that it appears complete or not at all, even if the process or the machine dies."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the rename is on disk only once its folder is synced
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def as_prompts(prompts: Iterable[Prompt | str]) -> list[Prompt]:
    """Records, or texts, which become prompts with their index as id."""
    return [p if isinstance(p, Prompt) else Prompt.of(str(i), p) for i, p in enumerate(prompts)]


# ---- JSON files ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[typing.IO[bytes]]:
    """Opens a plain or gzipped file for reading. Every error becomes a RecordError that names the file."""
    path = Path(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield typing.cast(typing.IO[bytes], file)
    except FileNotFoundError:
        raise RecordError(path, None, "no such file; check the path") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RecordError(path, None, f"damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise RecordError(path, None, f"cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path | str) -> Iterator[tuple[int, Any]]:
    with opened(path) as file:
        for line, raw in enumerate(file, start=1):  # bytes: split at \n only, never at U+2028 inside a text
            if raw.strip():
                yield line, parse_json(path, line, raw.rstrip(b"\r\n"))


def parse_json(path: Path | str, line: int | None, raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig" if line in (1, None) else "utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RecordError(path, line, f"not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        place = line if line is not None else error.lineno
        raise RecordError(
            path, place, f"broken JSON at column {error.colno}: {error.msg} in {shown(error.doc)}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RecordError(path, line, f"cannot be parsed: {error}") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; write null for an absent number")


def _dump_line(path: Path | str, line: int, record: Any) -> bytes:
    try:
        value = to_json(record)
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecordError(path, line, f"{type(record).__name__} cannot be written: {error}") from None
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair survives only as an escape
        return json.dumps(value, allow_nan=False).encode("ascii") + b"\n"


def check_unicode(text: str, key: str) -> None:
    """JSON can escape half a surrogate pair, which is not a character, so tokenizers reject it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(
            f'"{key}" holds half a surrogate pair ({half!r}, character {error.start}); remove it'
        ) from None


# ---- records to JSON values and back ---------------------------------------------------------------------------------


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if hasattr(type(value), "__dataclass_fields__"):
        return to_json(value)
    return value


@functools.cache
def _schema(cls: type) -> tuple[dict[str, Any], frozenset[str]]:
    """({field: type}, the fields without a default)."""
    hints = typing.get_type_hints(cls)
    required = frozenset(f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)
    return {field.name: hints[field.name] for field in fields(cls)}, required


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is float and type(value) in (float, int):
        return float(value)
    if hint in (str, int, bool) and type(value) is hint:
        return value
    if origin is tuple and isinstance(value, list):
        item = arguments[0]
        if item in (int, float, str) and set(map(type, value)) <= {item}:  # fast path for long lists of ids and logps
            return tuple(value)
        return tuple(_decode(item, element, f"{where}[{index}]") for index, element in enumerate(value))
    if origin in (typing.Union, types.UnionType):  # `X | None` only
        return None if value is None else _decode(arguments[0], value, where)
    if origin is Literal and value in arguments:
        return value
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return from_json(hint, value)
    expected = hint.__name__ if isinstance(hint, type) and origin is None else str(hint).removeprefix("typing.")
    raise ValueError(f"{where} is {shown(value)}, which is not of type {expected}")


def shown(value: Any, limit: int = 80) -> str:
    """A value in an error, cut to ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "…"
