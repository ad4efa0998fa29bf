"""`jaxsi report` from the command line."""

import json
import threading
import time

import pytest
from made_runs import made_run, write_value

from jaxsi.cli.main import main
from jaxsi.cli.report import report
from jaxsi.report import plots


@pytest.fixture(autouse=True)
def _quick_plots(monkeypatch):
    for name in ("lines", "bars"):
        monkeypatch.setattr(plots, name, lambda *series, **settings: "<svg></svg>")


def test_report_writes_one_file_into_the_run_directory(tmp_path, capsys):
    run = made_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}: 1 run, 7 samples\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_report_of_several_runs_names_what_it_could_not_read(tmp_path, capsys):
    runs = [made_run(tmp_path / name) for name in ("a", "b")]
    (runs[1] / "iter_2" / "pairs.jsonl").write_text("{\n")
    out = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "-o", str(out), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["runs"] == 2 and out.exists()
    assert len(value["damage"]) == 1 and value["damage"][0].startswith(f"{runs[1]}/iter_2/pairs.jsonl:1: broken JSON")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "nothing is not a run directory"),
        (["."], "holds no run"),
        (["run", "-o", "no/such/page.html"], "it has to be a file in a folder that exists"),
        (["run", "--samples", "0"], "--samples is 0"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    made_run(tmp_path / "run")
    assert main(["report", *words]) != 0
    assert message in capsys.readouterr().err


def test_watch_writes_the_page_until_the_run_is_complete(tmp_path):
    run, out = made_run(tmp_path / "run", complete=False), tmp_path / "page.html"
    pages = []

    def finish():
        while not out.exists():
            time.sleep(0.01)
        pages.append(out.read_text())
        summary = json.loads((run / "summary.json").read_text())
        write_value(run / "summary.json", summary | {"status": "complete"})

    thread = threading.Thread(target=finish)
    thread.start()
    value = report([str(run), "--watch", "--every", "0.02", "-o", str(out)]).value
    thread.join()
    assert value["complete"] and "load again every 0.02 seconds" in pages[0]
    assert "load again" not in out.read_text()
