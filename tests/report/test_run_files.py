"""Reading run directories for people: finished, unfinished and damaged ones."""

import json
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from made_runs import made_run, response, write_lines

from jaxsi.report import plots
from jaxsi.report.page import page_of
from jaxsi.report.run_files import labels, read_run, read_runs, signature
from jaxsi.runs.run import RunError


def test_a_damaged_line_is_left_out_and_named(tmp_path):
    run = made_run(tmp_path / "run")
    file = run / "iter_2" / "candidates.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2], lines[4], lines[5] = b'{"id": "x", "te\n', b"[1, 2]\n", b'{"id": "\xff"}\n'
    file.write_bytes(b"".join(lines))
    read = read_run(run)
    assert len(read.scopes["iter_2"].records["candidates"]) == len(lines) - 3
    assert [line.split(";")[0].split(" (")[0] for line in read.damage] == [
        "iter_2/candidates.jsonl:3: broken JSON",
        "iter_2/candidates.jsonl:5: a list in place of an object",
        "iter_2/candidates.jsonl:6: not UTF-8",
    ]


@pytest.mark.parametrize("name", ["summary.json", "config.json", "iter_2/pairs_counts.json", "iter_1/evaluation.json"])
def test_a_damaged_value_is_named_and_the_rest_is_shown(tmp_path, name):
    run = made_run(tmp_path / "run")
    (run / name).write_text('{"status": ')
    read = read_run(run)
    assert [line.split(":")[0] for line in read.damage] == [name]
    page, samples = page_of([read])
    assert samples == 7 and name in page and "some files cannot be read" in page


def test_lines_that_a_kill_tore_are_no_damage(tmp_path):
    run = made_run(tmp_path / "run", complete=False)
    for name in ("journal.jsonl", "iter_1/train.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 9, "scope"')
    assert read_run(run).damage == []


def test_shards_of_an_unfinished_stage_are_read(tmp_path):
    run = made_run(tmp_path / "run", complete=False)
    write_lines(run / "iter_3" / "candidates.shards" / "00000.jsonl", [response("p", 0, "first")])
    write_lines(run / "iter_3" / "candidates.shards" / "00001.jsonl", [response("p", 1, "second")])
    rows = read_run(run).scopes["iter_3"].records["candidates"]
    assert [row["text"] for row in rows] == ["first", "second"]


def test_a_folder_without_a_run_is_an_error_that_names_it(tmp_path):
    with pytest.raises(RunError, match=r"holds no run \(there is no config.json in it\)"):
        read_run(tmp_path)


def test_labels_are_the_parts_of_the_paths_that_differ():
    assert labels([Path("/r/a/method/0"), Path("/r/b/method/0")]) == ["a", "b"]
    assert labels([Path("/r/a/0"), Path("/r/a/1")]) == ["0", "1"]
    assert labels([Path("/r/a/method/0")]) == ["method/0"]
    assert labels([Path("/r/toy"), Path("/r/toy")]) == ["toy", "toy (2)"]
    assert labels([Path("/r"), Path("/r/toy")]) == ["r", "r/toy"] or len(set(labels([Path("/r"), Path("/r/toy")]))) == 2


def test_the_signature_changes_when_a_record_is_added(tmp_path):
    run = made_run(tmp_path / "run")
    before = signature(run)
    with (run / "iter_2" / "train.jsonl").open("a") as file:
        file.write("{}\n")
    assert signature(run) != before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_content_of_a_file_keeps_the_report_from_being_written(tmp_path_factory, data):
    """Every file of a run in turn: fields of records replaced by anything, or bytes cut out. Plots have a test of their
    own, since they take their time."""
    run = made_run(tmp_path_factory.mktemp("fuzz") / "run", prompts=2)
    files = sorted(path for path in run.rglob("*.json*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    raw = file.read_bytes()
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(raw) - 1))
        file.write_bytes(raw[:start] + data.draw(st.binary(max_size=3)) + raw[start + data.draw(st.integers(0, 9)) :])
    else:
        rows = [json.loads(line) for line in raw.splitlines()]
        row = data.draw(st.sampled_from(rows))
        row[data.draw(st.sampled_from([*row, "chosen", "texts", "scores", "label", "improved"]))] = data.draw(JSON)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = {"return_value": "<svg></svg>"}
    with mock.patch.object(plots, "lines", **drawn), mock.patch.object(plots, "bars", **drawn):
        page, _ = page_of(read_runs([run]))
    assert page.rstrip().endswith("</html>")
