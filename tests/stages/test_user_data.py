"""Files that people have, written by other libraries: every format, every dialect, and what is wrong with bad rows."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from jaxsi.runs.records import Prompt, RecordError
from jaxsi.stages.user_data import columns_of, read_examples, read_pairs, read_prompts

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
TEXTS = {"a": "One", "b": 'Two\nlines, "quoted"\u2028 here', "c": "好"}
ROWS = [{"id": id, "prompt": text} for id, text in TEXTS.items()]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
EXPECTED = [Prompt.of(row["id"], row["prompt"]) for row in ROWS]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- formats ---------------------------------------------------------------------------------------------------------


def csv_of_python(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["id", "prompt"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def zstd_of_pyarrow(path: Path) -> None:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(LINES)


def arrow_file(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def two_splits(path: Path) -> None:
    rest = datasets.Dataset.from_list([{"id": "z", "prompt": "Test"}])
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": rest}).save_to_disk(str(path))


def shards_of_parquet(path: Path) -> None:
    path.mkdir()
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        datasets.Dataset.from_list(rows).to_parquet(str(path / f"train-{number:05d}-of-00002.parquet"))


WRITERS = {
    "rows.jsonl": lambda path: datasets.Dataset.from_list(ROWS).to_json(str(path)),
    "rows.ndjson": lambda path: datasets.Dataset.from_list(ROWS).to_json(str(path)),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), "utf-8"),
    "lines.json": lambda path: datasets.Dataset.from_list(ROWS).to_json(str(path)),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "rows.csv": csv_of_python,
    "arrow.csv": lambda path: pyarrow.csv.write_csv(pyarrow.Table.from_pylist(ROWS), str(path)),
    "datasets.csv": lambda path: datasets.Dataset.from_list(ROWS).to_csv(str(path)),
    "rows.tsv": lambda path: csv_of_python(path, "\t"),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.jsonl.zst": zstd_of_pyarrow,
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), str(path)),
    "named_wrongly.jsonl": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), str(path)),
    "rows.arrow": arrow_file,
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
    "splits": two_splits,
    "folder": shards_of_parquet,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    WRITERS[name](tmp_path / name)
    assert read_prompts(tmp_path / name) == EXPECTED
    assert read_prompts(tmp_path / name, 2) == EXPECTED[:2]


def test_split_is_named(tmp_path):
    two_splits(tmp_path / "splits")
    assert read_prompts(tmp_path / "splits", split="test") == [Prompt.of("z", "Test")]
    with pytest.raises(RecordError, match="has no split 'validation'; it has train, test"):
        read_prompts(tmp_path / "splits", split="validation")


def test_byte_order_mark_and_windows_lines_are_read(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "One"}\r\n\r\n{"prompt": "Two"}\r\n')
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt.of("1", "One"), Prompt.of("3", "Two")]


# ---- dialects --------------------------------------------------------------------------------------------------------

SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Hi"}, (USER,)),
        ({"prompt": [SYSTEM, USER]}, (SYSTEM, USER)),
        ({"question": "Hi"}, (USER,)),
        ({"query": "Hi", "response": "Hello"}, (USER,)),
        ({"messages": [SYSTEM, USER, ANSWER]}, (SYSTEM, USER)),
        ({"messages": [USER, ANSWER, USER]}, (USER, ANSWER, USER)),
        ({"messages": PARTS}, (USER,)),
        ({"messages": [USER | {"name": "Eve", "tool_calls": None}]}, (USER,)),
        ({"prompt": "Hi", "prompt_id": "p", "messages": [USER, ANSWER]}, (USER,)),
        ({"conversations": SHAREGPT}, (SYSTEM, USER)),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, (USER,)),
        ({"instruction": "Reverse:", "input": "cat"}, ({"role": "user", "content": "Reverse:\n\ncat"},)),
        ({"dataset": "helpful_base", "instruction": "Hi", "output": "Hello", "generator": "gpt4"}, (USER,)),
    ],
)  # fmt: skip
def test_every_dialect_of_prompts(row, messages, tmp_path):
    [prompt] = read_prompts(jsonl(tmp_path / "p.jsonl", [row]))
    assert prompt == Prompt(id=row.get("prompt_id", "1"), messages=messages)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"question": "Hi", "answer": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"conversations": SHAREGPT[1:]},
        {"prompt": "Hi", "response": "Hello"},
    ],
)
def test_every_dialect_of_demonstrations(row, tmp_path):
    [example] = read_examples(jsonl(tmp_path / "p.jsonl", [row]))
    assert (example.messages, example.response) == ((USER,), "Hello")


BAD = {"role": "assistant", "content": "Go"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [BAD]},
        {"chosen": [USER, ANSWER], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, BAD], "score_chosen": 8.0, "messages": [USER]},
    ],
)
def test_every_dialect_of_pairs(row, tmp_path):
    [pair] = read_pairs(jsonl(tmp_path / "p.jsonl", [row]))
    assert (pair.prompt.messages, pair.chosen, pair.rejected) == ((USER,), "Hello", "Go")


def test_columns_have_the_names_that_the_user_says(tmp_path, caplog):
    caplog.set_level("INFO")
    path = jsonl(tmp_path / "p.jsonl", [{"ask": "Hi", "prompt": "no", "say": "Hello", "note": 5}])
    columns = columns_of(["prompt=ask", "response=say"])
    assert read_prompts(path, columns=columns) == [Prompt.of("1", "Hi")]
    [example] = read_examples(path, columns=columns)
    assert (example.messages, example.response) == ((USER,), "Hello")
    assert "these columns are not used: note, prompt" in caplog.text
    for word in ("prompt", "promt=x", "prompt="):
        with pytest.raises(ValueError, match="is not of the form COLUMN=NAME"):
            columns_of([word])


# ---- bad rows --------------------------------------------------------------------------------------------------------

BROKEN = [
    ('{"prompt": "a"', r"p\.jsonl:2: broken JSON at column 15: .*\{\"prompt\": \"a\""),
    ('{"prompt": ""}', r"p\.jsonl:2: \"prompt\" is ''; it must be a non-empty text"),
    ('{"prompt": " \\n"}', "non-empty"),
    ('{"prompt": 5}', r"\"prompt\" is 5"),
    ('{"promt": "a"}', "no prompt: the columns are promt; name the one that has it by --column prompt=NAME"),
    ('{"id": "b"}', "no prompt: the columns are id"),
    ('{"instruction": "a", "input": 5}', '"input" is 5; it must be a text'),
    ('{"id": "1", "prompt": "a"}', "id '1' is already on line 1"),
    ('{"id": 1, "prompt": "a"}', "id '1' is already on line 1"),
    ('{"id": null, "prompt": "a"}', "id None is not"),
    ('{"id": "", "prompt": "a"}', "id '' is not"),
    ('["a"]', r"a row is an object .*found \['a'\]"),
    ('{"prompt": NaN}', "NaN is not JSON"),
    ('{"prompt": "\\ud800"}', "half a surrogate pair"),
    ('{"messages": []}', "non-empty list of "),
    ('{"messages": [{"role": "user"}]}', '"role" and "content" only'),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "role 'bot' is not one of system, user, assistant"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "ends with the user's turn"),
    ("[" * 100_000, r"p\.jsonl:2"),
]


@pytest.mark.parametrize(("line", "says"), BROKEN)
def test_error_of_a_broken_prompt_names_file_line_value_and_fix(line, says, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n{{"prompt": "fine too"}}\n')
    with pytest.raises(RecordError, match=says) as caught:
        read_prompts(path)
    assert caught.value.line == 2
    assert caught.value.path == path


def test_bad_rows_are_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(['{"prompt": "fine"}', *(line for line, _ in BROKEN), '{"id": "z", "prompt": "last"}']))
    n = len(BROKEN)
    with pytest.raises(
        RecordError, match=rf"{n} of {n + 2} rows are bad, at 2, 3, 4, 5, 6, \.\.\.; .* --skip-bad-rows"
    ):
        read_prompts(path)
    prompts = read_prompts(path, skip_bad_rows=True)
    assert prompts == [Prompt.of("1", "fine"), Prompt.of("z", "last")]
    assert f"{n} of {n + 2} rows are left out: " in caplog.text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Hi"}, "no chosen response; name its column by --column chosen=NAME"),
        ({"prompt": "Hi", "chosen": "a"}, "no rejected response"),
        ({"chosen": "a", "rejected": "b"}, "no prompt before the chosen response"),
        ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, USER, BAD]}, "differ before their last turn"),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER]}, "ends with the turn of the user"),
        ({"prompt": "Hi", "chosen": "", "rejected": "b"}, '"chosen" is '),
    ],
)
def test_error_of_a_broken_pair(row, says, tmp_path):
    with pytest.raises(RecordError, match=says):
        read_pairs(jsonl(tmp_path / "p.jsonl", [row]))


@pytest.mark.parametrize(
    ("row", "says"),
    [({"prompt": "Hi"}, "no response: .* --column response=NAME"), ({"messages": [USER]}, "no response")],
)
def test_error_of_a_demonstration_without_a_response(row, says, tmp_path):
    with pytest.raises(RecordError, match=says):
        read_examples(jsonl(tmp_path / "p.jsonl", [row]))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", b'{"prompt": "\xff"}\n', "p.jsonl:1: not UTF-8 at byte 12"),
        ("p.jsonl", b"\n \n", "the file holds no prompts"),
        ("p.json", b'{"prompt": "a"}', "is one list"),
        ("p.json", b"[]", "no prompts"),
        ("p.json", b'[\n{"prompt": }]', r"p.json:2: broken JSON"),
        ("p.json", b'[{"prompt": "a"}, {"prompt": ""}]', r"p.json:2: "),
        ("p.jsonl.gz", b"not gzip", "damaged gzip"),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 100, mtime=0)[:-10], "damaged gzip"),
        ("p.jsonl.zst", b"not zstd", "damaged zstd"),
        ("p.parquet", b"PAR1 and nothing else", "damaged Parquet"),
        ("p.arrow", b"ARROW1 and nothing else", "damaged Arrow"),
        ("p.csv", b'prompt\n"open', r"p.csv:\d: broken CSV: unexpected end of data"),
        ("p.csv", b"id,prompt\na,b,c\n", "p.csv:2: 3 cells, the header has 2 columns"),
        ("p.csv", "prompt\nH\u00e9\n".encode("latin-1"), "not UTF-8 at byte 8"),
    ],
)
def test_error_names_a_broken_file(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=says):
        read_prompts(tmp_path / name)


def test_missing_file_and_invalid_limit_are_errors(tmp_path):
    with pytest.raises(RecordError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(RecordError, match="no such file, and no such data set on the hub"):
        read_prompts("nobody/nothing")
    with pytest.raises(RecordError, match="cannot be read as a data set"):
        read_prompts(tmp_path)
    with pytest.raises(ValueError, match="max_prompts is 0"):
        read_prompts(tmp_path / "none.jsonl", 0)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.csv"])
def test_pointer_of_git_lfs_is_said_to_be_one(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    with pytest.raises(RecordError, match=r"a Git LFS pointer, not the data themselves; run `git lfs pull`"):
        read_prompts(tmp_path / name)


def test_developer_of_newer_chats_is_the_system(tmp_path):
    file = tmp_path / "x.jsonl"
    rows = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    file.write_text(json.dumps({"messages": rows}) + "\n")
    assert [message["role"] for message in read_prompts(file)[0].messages] == ["system", "user"]
