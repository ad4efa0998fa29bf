"""Loaders on small files of each format, their errors, and the first records of a set."""

import csv
import json
import re
from pathlib import Path

import pytest

from jaxsi.runs.records import SFTExample
from jaxsi.stages import datasets
from jaxsi.stages.datasets import SourceError, transcript_messages

USER, REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    from datasets import config, disable_progress_bars

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    disable_progress_bars()


def write(folder, rows, suffix="jsonl"):
    path = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif suffix == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return str(path)


def oasst_row(id, parent, role, text, rank=None, lang="en"):
    return {"message_id": id, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": lang, "tree": 1}


OASST = [
    oasst_row("r1", None, "prompter", "Why?"),
    oasst_row("a1", "r1", "assistant", "worse", 1.0),
    oasst_row("a2", "r1", "assistant", "best", 0.0),
    oasst_row("a3", "r1", "assistant", "unranked"),
    oasst_row("f1", "a2", "prompter", "And then?"),
    oasst_row("f2", "f1", "assistant", "a second turn", 0.0),
    oasst_row("r2", None, "prompter", "\u00bfPor qu\u00e9?", lang="es"),
    oasst_row("a4", "r2", "assistant", "porque", 0.0, lang="es"),
    oasst_row("r3", None, "prompter", "How?"),
    oasst_row("a5", "r3", "assistant", "only", 0.0),
    oasst_row("r4", None, "prompter", "No reply"),
]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_oasst(tmp_path, suffix):
    path = write(tmp_path, OASST, suffix)
    assert datasets.oasst(path) == [
        SFTExample(id="r1", messages=({"role": "user", "content": "Why?"},), response="best"),
        SFTExample(id="r3", messages=({"role": "user", "content": "How?"},), response="only"),
    ]
    (ranked,) = datasets.oasst_rankings(path)
    assert (ranked.id, ranked.responses, ranked.ranks) == ("r1", ("best", "worse"), (0, 1))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_tulu2_mixture(tmp_path, suffix):
    system = {"role": "system", "content": "Be brief"}
    rows = [
        {"id": "a", "messages": [USER, REPLY]},
        {"id": "b", "messages": [system, USER, REPLY, USER, {"role": "assistant", "content": "Again?"}, USER]},
        {"id": "c", "messages": [USER]},
        {"id": "d", "messages": [USER, {"role": "assistant", "content": " "}]},
    ]
    assert datasets.tulu2_mixture(write(tmp_path, rows, suffix)) == [
        SFTExample(id="a", messages=(USER,), response="Hello"),
        SFTExample(id="b", messages=(system, USER, REPLY, USER), response="Again?"),
    ]


def test_nectar(tmp_path):
    prompt = "\n\nHuman: Hi\n\nAssistant: "
    answers = [{"answer": text, "rank": rank, "model": "m"} for text, rank in [("b", 2.0), ("a", 1.0), ("d", 4.0)]]
    (ranked,) = datasets.nectar(write(tmp_path, [{"prompt": prompt, "answers": answers}]))
    assert ranked.messages == (USER,)
    assert (ranked.responses, ranked.ranks) == (("a", "b", "d"), (0, 1, 2))


def test_ultrafeedback(tmp_path):
    completions = [
        {"response": r, "overall_score": s} for r, s in [("low", 2.5), ("high", 9.0), ("too", 9.0), ("mid", 4.0)]
    ]
    (ranked,) = datasets.ultrafeedback(write(tmp_path, [{"instruction": "Hi", "completions": completions}]))
    assert ranked.messages == (USER,)
    assert (ranked.responses, ranked.ranks) == (("high", "too", "mid", "low"), (0, 0, 1, 2))


def test_ultrafeedback_leaves_out_wrong_scores_and_empty_rows(tmp_path, caplog):
    """In the published set some overall scores of 1 became 10; the fine-grained ones show it."""
    scored = [("bad", 10.0, 1.0), ("good", 8.5, 4.5), ("fair", 6.0, 3.0), ("unrated", 9.0, None)]
    completions = [{"response": r, "overall_score": s, "fine-grained_score": f} for r, s, f in scored]
    rows = [{"instruction": "Hi", "completions": completions}, {"instruction": "Ho", "completions": []}]
    (ranked,) = datasets.ultrafeedback(write(tmp_path, rows))
    assert ranked.responses == ("unrated", "good", "fair")
    assert "1 completions with a wrong overall score are left out" in caplog.text
    assert "1 instructions without completions are left out" in caplog.text


def test_ultrafeedback_reads_scores_as_people_store_them(tmp_path, caplog):
    """As texts, absent, or wrong in the other direction; a row without completions may hold null."""
    scored = [
        ("bad", "10", "1.25"),
        ("good", "8.5", "4.5"),
        ("none", "N/A", "3"),
        ("swapped", 1, 5.0),
        ("poor", 3, 1.5),
    ]
    completions = [{"response": r, "overall_score": str(s), "fine-grained_score": str(f)} for r, s, f in scored]
    rows = [{"instruction": "Hi", "completions": completions}, {"instruction": "Ho", "completions": None}]
    (ranked,) = datasets.ultrafeedback(write(tmp_path, rows))
    assert (ranked.responses, ranked.ranks) == (("good", "poor"), (0, 1))
    assert "2 completions with a wrong overall score are left out, the first in row 0" in caplog.text
    assert "1 completions without an overall score are left out" in caplog.text
    assert "1 instructions without completions are left out, the first in row 1" in caplog.text


def test_nectar_leaves_out_rows_that_are_no_prompts(tmp_path, caplog):
    answers, turn = [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 2.0}], "\n\nHuman: Hi\n\nAssistant: "
    rows = [{"prompt": "Hi", "answers": answers}, {"prompt": turn, "answers": answers}, {"prompt": turn, "answers": []}]
    rows.append({"prompt": "\n\nHuman: Hi\n\nAssistant: Half an", "answers": answers})
    (ranked,) = datasets.nectar(write(tmp_path, rows))
    assert ranked.id == "nectar-1"
    assert '2 prompts without a turn of "Human:" at the end are left out, the first in row 0' in caplog.text
    assert "1 prompts without answers are left out, the first in row 2" in caplog.text


def test_hh_rlhf(tmp_path, caplog):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Human: a colon\nAssistant: in a line"
    rows = [
        {"chosen": f"{start}\n\nAssistant: good", "rejected": f"{start}\n\nAssistant: bad"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: x", "rejected": "\n\nHuman: Ho\n\nAssistant: y"},
        {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Ho"},
        {"chosen": "", "rejected": ""},
    ]
    (ranked,) = datasets.hh_rlhf(write(tmp_path, rows))
    last = {"role": "user", "content": "Human: a colon\nAssistant: in a line"}
    assert ranked.messages == (USER, REPLY, last)
    assert (ranked.responses, ranked.ranks) == (("good", "bad"), (0, 1))
    assert "3 pairs without a prompt in common are left out, the first in row 1" in caplog.text


def test_transcript_keeps_blank_lines_inside_turns():
    assert transcript_messages("note\n\nHuman: one\n\ntwo\n\nAssistant: ") == (
        {"role": "user", "content": "one\n\ntwo"},
        {"role": "assistant", "content": ""},
    )


def test_columns_may_have_other_names(tmp_path):
    path = write(tmp_path, [{"question": "Hi", "completions": [{"response": "x", "overall_score": 1}]}])
    with pytest.raises(
        SourceError, match=r"no column 'instruction'; it has question, completions.*columns=\{'instruction'"
    ):
        datasets.ultrafeedback(path)
    assert datasets.ultrafeedback(path, columns={"instruction": "question"})[0].messages == (USER,)
    with pytest.raises(SourceError, match=r"columns maps \['answer'\]"):
        datasets.ultrafeedback(path, columns={"answer": "x"})


@pytest.mark.parametrize(
    ("loader", "rows", "message"),
    [
        (datasets.nectar, [{"prompt": "x", "answers": "y"}], "nectar: row 0, column 'answers' holds str"),
        (datasets.nectar, [{"prompt": "x", "answers": [{"answer": "y"}]}], "no usable 'rank'"),
        (datasets.nectar, [{"prompt": "Hi", "answers": [{"answer": "y", "rank": 1}]}], "row 0 .* without .*Human:"),
        (datasets.ultrafeedback, [{"instruction": "Hi", "completions": []}], "row 0 .*: instructions without compl"),
        (datasets.hh_rlhf, [{"chosen": "x", "rejected": "y"}], "row 0 .*: pairs without a prompt in common"),
        (datasets.tulu2_mixture, [{"id": "a", "messages": [{"role": "tool", "content": "x"}]}], "row a.*role 'tool'"),
        (datasets.ultrafeedback, [{"instruction": None, "completions": []}], "row 0 has no 'instruction'"),
        (datasets.oasst, [oasst_row("a", None, "prompter", "Hi", lang="es")], "no row became a record"),
    ],
)
def test_error_names_a_row_of_another_shape(tmp_path, loader, rows, message):
    with pytest.raises(SourceError, match=message):
        loader(write(tmp_path, rows))


def test_unreadable_sources_are_errors(tmp_path):
    with pytest.raises(SourceError, match=r"the file .*nope\.jsonl does not exist"):
        datasets.oasst(str(tmp_path / "nope.jsonl"))
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(SourceError, match=r"rows\.txt is not a \.json"):
        datasets.oasst(str(tmp_path / "rows.txt"))
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SourceError, match=r"pointer\.parquet is a Git LFS pointer, not the data"):
        datasets.oasst(str(tmp_path / "pointer.parquet"))
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a": ')
    with pytest.raises(SourceError, match=r"oasst: cannot read .*broken\.jsonl.*check that the file is whole"):
        datasets.oasst(str(tmp_path / "broken.jsonl"))


def test_first_records_say_how_many_there_are_and_refuse_too_few(caplog):
    """[:253] of a split of 188 was 188, and nobody was told."""
    caplog.set_level("INFO")
    assert datasets.first(range(300), 253) == list(range(253))
    assert "253 of 300 records are taken; 253 were asked for" in caplog.text
    assert len(datasets.first(range(188), 253, least=100)) == 188
    assert "188 of 188 records are taken; 253 were asked for" in caplog.text
    with pytest.raises(SourceError, match=r"188 records, fewer than the 253 that are needed"):
        datasets.first(range(188), 253)
    with pytest.raises(SourceError, match="99 records, fewer than the 100"):
        datasets.first(range(99), 253, least=100)
    with pytest.raises(ValueError, match=r"least is 300; it lies from 0 to count = 253"):
        datasets.first(range(400), 253, least=300)


def test_configs_cut_no_list_without_a_word():
    for path in (Path(__file__).parents[2] / "configs").rglob("*.py"):
        assert not re.search(r"\[[^\]\[\n]*:\s*[0-9][0-9_]*\]", path.read_text(encoding="utf-8")), path
