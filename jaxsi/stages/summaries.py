"""OpenAI's summarisation preferences as ranked responses: one of the three data sets of PIT (arXiv 2310.00898).

The set is that of Stiennon et al. 2020 (arXiv 2009.01325): people chose the better of two summaries of a Reddit post.
A row has the columns "info" (an object with "post", "title" and "subreddit"; news articles have "article" in place of
"post"), "summaries" (two objects with "text" and "policy"), "choice" (0 or 1), "worker", "batch", "split", "extra".
"""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Message, RankedResponses, RecordError, check_unicode, shown
from jaxsi.stages.user_data import rows

_log = logging.getLogger(__name__)

# Ours: how PIT asked for a summary could not be read.
POST = "Summarize this post from r/{subreddit} in a few sentences.\n\nTitle: {title}\n\n{text}"
ARTICLE = "Summarize this news article in a few sentences.\n\nTitle: {title}\n\n{text}"

# The hub keeps the set as a script, which `datasets` no longer runs, and beside it, on this branch, as Parquet files.
_HUB = "hf://datasets/{name}@refs/convert/parquet/comparisons/{split}/*.parquet"
_ENDINGS = (".json", ".jsonl", ".parquet")


@stored_as("summaries.openai_summaries")
def openai_summaries(source: str = "openai/summarize_from_feedback", *, split: str = "train") -> list[RankedResponses]:
    """The comparisons as pairs of responses to a request for a summary: the chosen one first, with rank 0.

    Args:
      source: the name of the set on the hub, a file of it (JSON, JSONL, Parquet), or a folder of such files, e.g. of
        OpenAI's own batch3.json to batch22.json.
      split: "train" (posts), or "validation" (posts and news articles). OpenAI's files hold both, and call parts of the
        second valid1 and valid2; the rows say which is which.

    Returns: one record per comparison, with the ids "summaries-0", ... in the order of the rows of the split. A post
      may be in many.

    Raises: RecordError if the source cannot be read or has no row of the split, or if a row has another shape: it names
      the file, the line and the column.
    """
    ranked, count, empty = [], 0, 0
    for place, line, row in _rows(source, split):
        try:
            of_split = _is_of(row, split)
            record = _ranked(f"summaries-{count}", row) if of_split else None
        except ValueError as error:
            raise RecordError(place, line, str(error)) from None
        count += of_split
        if record is not None:
            ranked.append(record)
        elif of_split:
            empty += 1
    if empty:
        _log.warning("%s: %d comparisons without a text to summarise are left out", source, empty)
    if not ranked:
        raise RecordError(source, None, f"no comparison of the split {split!r}; give train or validation")
    return ranked


def _ranked(id: str, row: dict[str, Any]) -> RankedResponses | None:
    """A row as a record; None if it has nothing to summarise. Raises: ValueError if it has another shape."""
    info, summaries, choice = (row.get(column) for column in ("info", "summaries", "choice"))
    if not isinstance(info, dict):
        raise ValueError(f'"info" is {shown(info)}; it is an object with "post", "title" and "subreddit"')
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise ValueError(f'"summaries" is {shown(summaries)}; it is a list of two objects with "text"')
    if choice not in (0, 1) or isinstance(choice, bool):
        raise ValueError(f'"choice" is {shown(choice)}; it is 0 or 1, the number of the better summary')
    texts = [_text(summary, "text", "summaries") for summary in summaries]
    messages = _request(info)
    if messages is None:
        return None
    return RankedResponses(
        id=id, messages=messages, responses=(texts[choice].strip(), texts[1 - choice].strip()), ranks=(0, 1)
    )


def _request(info: dict[str, Any]) -> tuple[Message, ...] | None:
    """The request to summarise a row's post or article; None if it has neither."""
    column = "post" if (info.get("post") or "").strip() else "article"
    if not (info.get(column) or "").strip():
        return None
    values = {"title": info.get("title") or "", "subreddit": info.get("subreddit") or "", "text": info[column].strip()}
    content = POST if column == "post" else ARTICLE
    for name, value in values.items():
        check_unicode(value, f"info.{name}")
    return ({"role": "user", "content": content.format(**values)},)


def _text(value: Any, key: str, column: str) -> str:
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise ValueError(f'"{column}" holds {shown(value)}; each is an object with the text "{key}"')
    check_unicode(value[key], column)
    return value[key]


def _is_of(row: Any, split: str) -> bool:
    """Whether a row is of the split, by its own column."""
    if not isinstance(row, dict):
        raise ValueError(f"the row is {shown(row)}; it is an object with info, summaries, choice and split")
    own = row.get("split")
    if not isinstance(own, str):
        raise ValueError(f'"split" is {shown(own)}; it is train, valid1 or valid2')
    return own.startswith("valid") if split == "validation" else own == split


def _rows(source: str, split: str) -> Iterator[tuple[Path | str, int, Any]]:
    """(file, line or place from 1, row) of each row of the source."""
    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        files = sorted(file for file in path.rglob("*") if file.suffix in _ENDINGS)
        if not files:
            raise RecordError(path, None, f"no file of the set in it; give a folder of {', '.join(_ENDINGS)} files")
        for file in files:
            yield from ((file, line, _row(file, line, row)) for line, row in rows(file))
    elif path.exists() or source.startswith((".", "/")) or path.suffix:
        yield from ((path, line, _row(path, line, row)) for line, row in rows(path, split))
    else:
        yield from ((source, place, row) for place, row in zip(itertools.count(1), _hub_rows(source, split)))


def _row(path: Path, line: int, row: Any) -> Any:
    """A row, or the error of one that cannot be read."""
    if isinstance(row, ValueError):
        raise RecordError(path, line, str(row))
    return row


def _hub_rows(name: str, split: str) -> Iterator[Any]:
    import datasets

    files = _HUB.format(name=name, split=split)
    try:
        return iter(datasets.load_dataset("parquet", data_files=files, split="train"))
    except Exception as error:  # the library raises dozens of types
        reason = f"cannot be read from the hub ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise RecordError(name, None, f"{reason}; check name, split and network, or give local files") from error
