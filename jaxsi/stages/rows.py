"""The rows of the files that people have: JSONL, JSON, CSV, TSV, Parquet, Arrow, saved sets and sets on the hub.

A file is read by its content and by the end of its name. Which columns a row has is `user_data`'s concern.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsi.runs.records import LFS_POINTER, RecordError, opened, parse_json, shown


def rows(source: Path | str, split: str = "train") -> Iterator[tuple[int, Any]]:
    """The rows of a source: (line, or place from 1; the row as a dict, or the ValueError of a row that cannot be read).

    Raises: RecordError if the source as a whole cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return _numbered(_saved_set(path, split))
    if not path.exists():
        if str(source).count("/") == 1 and not str(source).startswith((".", "/")) and not path.suffix:
            return _numbered(_hub_set(str(source), split))
        raise RecordError(path, None, "no such file; check the path")
    head = _head(path)
    if head.startswith(LFS_POINTER):
        raise RecordError(path, None, "a Git LFS pointer, not the data themselves; run `git lfs pull` in its folder")
    if head.startswith(b"PAR1"):
        return _numbered(_parquet(path))
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return _numbered(_arrow(path))
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".csv", ".tsv")):
        return _table(path, "\t" if name.endswith(".tsv") else ",")
    return _json(path) if name.endswith(".json") else _json_lines(path)


def version_of(source: Path | str) -> tuple[tuple[str, int, int], ...]:
    """(Name, time of the last change, size) of a file, or of each file of a folder; () of a set on the hub. For caches
    of what was read."""
    path = Path(source)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists())


def _numbered(values: Iterator[Any]) -> Iterator[tuple[int, Any]]:
    return enumerate(values, start=1)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER))
    except OSError as error:
        raise RecordError(path, None, f"cannot be read: {error.strerror or error}") from error


def _content(path: Path) -> bytes:
    """The whole file, unpacked."""
    if path.suffix != ".zst":
        with opened(path) as file:
            return file.read()
    import pyarrow

    try:
        with pyarrow.input_stream(str(path), compression="zstd") as file:
            return file.read()
    except OSError as error:
        raise RecordError(path, None, f"damaged zstd file: {error.strerror or error}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    # Split at \n only, never at U+2028 inside a text.
    for line, raw in enumerate(_content(path).split(b"\n"), start=1):
        if raw.strip():
            try:
                yield line, parse_json(path, line, raw.rstrip(b"\r"))
            except RecordError as error:
                yield line, ValueError(error.reason)


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    content = _content(path)
    try:
        value = parse_json(path, None, content)
    except RecordError as error:
        lines = [line for line in content.split(b"\n") if line.strip()]
        if len(lines) > 1 and all(line.lstrip(b"\xef\xbb\xbf").lstrip().startswith(b"{") for line in lines):
            yield from _json_lines(path)  # JSONL under the name of JSON
            return
        raise error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 and isinstance(lists[0], list) and "messages" not in value else value
    if not isinstance(value, list):
        raise RecordError(path, None, f"a .json file is one list of rows, found {shown(value)}; use .jsonl for lines")
    yield from enumerate(value, start=1)


def _table(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    try:
        text = _content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(path, None, f"not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or []
        for row in reader:
            if None in row or None in row.values():
                cells = len(names) + (len(row[None]) if None in row else -list(row.values()).count(None))
                yield reader.line_num, ValueError(f"{cells} cells, the header has {len(names)} columns")
            else:
                yield reader.line_num, {name: _cell(value) for name, value in row.items() if value != ""}
    except csv.Error as error:
        raise RecordError(path, reader.line_num, f"broken CSV: {error}; mend the quotes in this line") from None


def _cell(text: str) -> Any:
    """A cell, which may hold a conversation as JSON."""
    if text[:2] in ("[{", '{"'):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(path, None, f"damaged Parquet file ({error}); fetch it again") from None


def _arrow(path: Path) -> Iterator[Any]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as file:
            is_file = _head(path).startswith(b"ARROW1")
            table = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(file).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(path, None, f"damaged Arrow file ({error}); fetch it again") from None
    for batch in table.to_batches():
        yield from batch.to_pylist()


def _saved_set(path: Path, split: str) -> Iterator[Any]:
    import datasets

    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise RecordError(path, None, f"has no split {split!r}; it has {', '.join(map(str, found))}")
                found = found[split]
        else:
            found = datasets.load_dataset(str(path), split=split)
    except RecordError:
        raise
    except Exception as error:  # the library raises dozens of types
        reason = f"cannot be read as a data set ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise RecordError(path, None, f"{reason}; give one of its files") from error
    return iter(found)


def _hub_set(name: str, split: str) -> Iterator[Any]:
    import datasets

    try:
        return iter(datasets.load_dataset(name, split=split))
    except Exception as error:
        reason = f"no such file, and no such data set on the hub ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise RecordError(name, None, f"{reason}; check the path, or name, split and network") from error
