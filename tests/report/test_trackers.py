"""Trackers show what the JSON lines of a run hold: every step once, however often the run was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from made_runs import entry, made_run, train_line, write_lines, write_value

from jaxsi.report import trackers
from jaxsi.report.run_files import read_run
from jaxsi.report.trackers import Figure, SampleTable, TensorBoard, TrackerError, events_of, following, replay

needs_tensorboard = pytest.mark.skipif(
    trackers.importlib.util.find_spec("tensorboardX") is None, reason="pip install 'jaxsi[tensorboard]'"
)
needs_trackio = pytest.mark.skipif(
    trackers.importlib.util.find_spec("trackio") is None, reason="pip install 'jaxsi[trackio]'"
)


needs_wandb = pytest.mark.skipif(
    trackers.importlib.util.find_spec("wandb") is None, reason="pip install 'jaxsi[wandb]'"
)


def written(folder: Path) -> Counter:
    """How often each (tag, step) stands in the event files of a folder."""
    from tensorboardX.proto import event_pb2

    found: Counter = Counter()
    for file in folder.glob("*.tfevents.*"):
        for record in trackers.event_records(file.read_bytes()):
            event = event_pb2.Event.FromString(record)
            found.update((value.tag, event.step) for value in event.summary.value)
    return found


def expected(run: Path) -> set[tuple[str, int]]:
    figures = {(one.name, one.step) for one in events_of(read_run(run))}
    return figures | {(f"samples/iter_{t}/text_summary", t) for t in (1, 2)}


class Memory:
    """A tracker that keeps what it gets."""

    def __init__(self):
        self.events = []

    def sent(self):
        return set()

    def send(self, events):
        self.events += events

    def close(self):
        self.events.append("closed")


def test_steps_are_counted_through_the_trainings_and_iterations_have_their_own(tmp_path):
    events = events_of(read_run(made_run(tmp_path / "run")))
    losses = [(one.step, one.value) for one in events if one.name == "train/loss"]
    assert [step for step, _ in losses] == [2, 4, 6, 8, 10, 12]
    assert Figure("iteration/quality", 2, 70.0) in events and Figure("iteration/quality.low", 2, 68.0) in events
    assert Figure("iteration/judge_quality.accuracy", 1, 0.7) in events
    assert len({(one.name, one.step) for one in events}) == len(events)


def test_samples_are_one_table_an_iteration_under_a_name_of_its_own(tmp_path):
    tracker = Memory()
    replay(made_run(tmp_path / "run", texts=("a\x1b[31m | b", "blue")), tracker, set())
    tables = [one for one in tracker.events if isinstance(one, SampleTable)]
    assert [(one.name, one.step) for one in tables] == [("samples/iter_1", 1), ("samples/iter_2", 2)]
    assert tables[0].rows == [["1", "Evaluated?", "answer of M_1", "", ""]]
    assert ["2", "Which colour is number 1? blue", "blue", "5", "chosen"] in tables[1].rows
    assert not any("\x1b" in cell for row in tables[1].rows for cell in row)


def test_only_what_is_new_is_sent(tmp_path):
    run, tracker, known = made_run(tmp_path / "run"), Memory(), set()
    assert replay(run, tracker, known) > 20
    assert replay(run, tracker, known) == 0
    with (run / "iter_2" / "train.jsonl").open("a") as file:
        file.write(json.dumps(train_line(7, 7)) + "\n" + '{"step": 8, "lo')  # the second line is being written
    tracker.events.clear()
    replay(run, tracker, known)
    assert {(one.name, one.step) for one in tracker.events} >= {("train/loss", 13)}
    assert {one.step for one in tracker.events} == {13}


@needs_tensorboard
def test_tensorboard_has_every_step_once_after_torn_files_and_restarts(tmp_path):
    """Each restart is a new process: it knows only what the files hold, and the last file may end in half a record."""
    run, folder = made_run(tmp_path / "run"), tmp_path / "board"
    lines = [train_line(step, 30) for step in range(1, 31)]
    for attempt, (first, last) in enumerate([(0, 8), (5, 14), (10, 22), (20, 30)]):
        write_lines(run / "iter_2" / "train.jsonl", lines[:first])  # a resumed run drops what its checkpoint lacks
        board = TensorBoard(folder)
        known = board.sent()
        for stop in range(first, last + 1):
            write_lines(run / "iter_2" / "train.jsonl", lines[:stop])
            replay(run, board, known)
        board.close()
        newest = max(folder.glob("*.tfevents.*"), key=lambda file: file.name)
        if attempt < 3:
            newest.write_bytes(newest.read_bytes()[:-7])
    found = written(folder)
    assert set(found) == expected(run) and set(found.values()) == {1}


KILLED = """
import sys, time
from pathlib import Path
from jaxsi.report import trackers
trackers.EVERY = 0.02
name, run = sys.argv[1], Path(sys.argv[2])
with trackers.following(run, [name]):
    print("on", flush=True)
    while not (run / "over").exists():
        time.sleep(0.01)
"""


def killed_three_times(name: str, run: Path, environment: dict[str, str]) -> None:
    """A run that grows, with a tracker in a process that is killed three times; the fourth sees the end."""
    done = read_lines = (run / "iter_2" / "train.jsonl").read_text().splitlines()
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, name, str(run)], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        for step in range(10):
            done.append(json.dumps(train_line(7 + 10 * attempt + step, 50)))
            (run / "iter_2" / "train.jsonl").write_text("\n".join(read_lines) + "\n")
            time.sleep(0.02)
        if attempt < 3:
            process.send_signal(signal.SIGKILL)
        else:
            (run / "over").touch()
        process.wait(timeout=120)
        process.stdout.close()
    assert process.returncode == 0


@needs_tensorboard
@pytest.mark.slow
def test_tensorboard_of_a_run_killed_three_times_has_every_step_once(tmp_path):
    run = made_run(tmp_path / "run")
    killed_three_times("tensorboard", run, dict(os.environ))
    found = written(run / "trackers" / "tensorboard")
    assert set(found) == expected(run) and set(found.values()) == {1}


@needs_trackio
@pytest.mark.slow
def test_trackio_of_a_run_killed_three_times_has_every_step_once(tmp_path):
    run, home = made_run(tmp_path / "run"), tmp_path / "trackio"
    environment = {**os.environ, "TRACKIO_DIR": str(home)}
    killed_three_times("trackio", run, environment)
    code = (
        "import sys, json; from trackio.sqlite_storage import SQLiteStorage;"
        "rows = SQLiteStorage.get_logs('jaxsi', sys.argv[1]);"
        "print(json.dumps([[n, r['step']] for r in rows for n in r if n not in ('step', 'timestamp')]))"
    )
    name = f"run-{(run / 'trackers' / 'id').read_text()}"
    done = subprocess.run(
        [sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, check=True
    )
    found = Counter((name, step) for name, step in json.loads(done.stdout.splitlines()[-1]))
    assert {(name.removesuffix("/text_summary"), step) for name, step in expected(run)} == set(found)
    assert set(found.values()) == {1}


def test_a_tracker_that_fails_is_told_once_and_never_stops_the_run(tmp_path, monkeypatch, caplog):
    run = made_run(tmp_path / "run")
    monkeypatch.setattr(trackers, "EVERY", 0.01)
    monkeypatch.setitem(trackers.TRACKERS, "trackio", "json")

    def fails(name, directory):
        raise OSError("no disk")

    monkeypatch.setattr(trackers, "opened", fails)
    with following(run, ["trackio"]):
        time.sleep(0.1)
    assert caplog.text.count("the tracker trackio failed (OSError: no disk)") == 1


def test_the_end_of_a_run_is_sent_before_the_command_ends(tmp_path, monkeypatch):
    run, tracker = made_run(tmp_path / "run", complete=False), Memory()
    monkeypatch.setitem(trackers.TRACKERS, "trackio", "json")
    monkeypatch.setattr(trackers, "opened", lambda name, directory: tracker)
    with following(run, ["trackio"]):
        write_value(run / "summary.json", {"iterations": [{"iteration": 7, "greedy": 3.0}], "status": "complete"})
    assert Figure("iteration/greedy", 7, 3.0) in tracker.events and tracker.events[-1] == "closed"


@pytest.mark.parametrize(
    ("name", "message"),
    [("mlflow", "the trackers are tensorboard, trackio, wandb"), ("wandb", r"pip install 'jaxsi\[wandb\]'")],
)
def test_a_tracker_that_is_not_there_is_an_error_before_the_run(name, message, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "wandb", "no_such_module")
    with pytest.raises(TrackerError, match=message):
        trackers.check([name])


def test_wandb_gets_every_event_once_over_restarts(tmp_path, monkeypatch):
    """A module in place of wandb: its service is outside. What was sent is listed beside the run."""

    class Run:
        logged = []  # noqa: RUF012

        def define_metric(self, *names, **settings): ...

        def log(self, data):
            Run.logged.append(data)

        def finish(self): ...

    class Module:
        asked = []  # noqa: RUF012

        @staticmethod
        def init(**settings):
            Module.asked.append(settings)
            return Run()

        @staticmethod
        def Table(columns, data):
            return len(data)

    monkeypatch.setattr(trackers.importlib, "import_module", lambda name: Module)
    run = made_run(tmp_path / "run")
    for further in range(2):
        write_lines(run / "iter_2" / "train.jsonl", [train_line(step, 9) for step in range(1, 6 + further)])
        tracker = trackers.opened("wandb", run)
        replay(run, tracker, tracker.sent())
        tracker.close()
    found = Counter((name, data["train/step"]) for data in Run.logged for name in data if name == "train/loss")
    assert set(found.values()) == {1} and len(found) == 3 + 6
    assert len({asked["id"] for asked in Module.asked}) == 1 and Module.asked[0]["resume"] == "allow"


DIES = """
import os, signal, sys, time
from pathlib import Path
from jaxsi.report import trackers
run, tracker = Path(sys.argv[1]), trackers.opened("wandb", Path(sys.argv[1]))
trackers.replay(run, tracker, tracker.sent())
if sys.argv[2] == "ends":
    tracker.close()
else:
    time.sleep(float(sys.argv[2]))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_wandb
@pytest.mark.slow
def test_wandb_offline_of_a_run_killed_before_and_after_its_file_is_written_has_every_step_once(tmp_path):
    run = made_run(tmp_path / "run")
    environment = {
        **os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
    }  # fmt: skip
    for part, fate in enumerate(("0", "4", "0", "ends")):
        write_lines(run / "iter_2" / "train.jsonl", [train_line(step, 50) for step in range(1, 10 * (part + 1))])
        process = subprocess.run([sys.executable, "-c", DIES, str(run), fate], env=environment, check=False)
        assert process.returncode == (0 if fate == "ends" else -signal.SIGKILL)
    files = [file.read_bytes() for file in (run / "trackers" / "wandb").glob("*run-*/*.wandb")]
    found = Counter(one for content in files for one in trackers.logged_in(content))
    assert {(name.removesuffix("/text_summary"), step) for name, step in expected(run)} == set(found)
    assert set(found.values()) == {1}
    assert trackers.opened("wandb", run).sent() == set(found)
    assert sum(map(bool, map(list, map(trackers.logged_in, files)))) == 2, "the second one and the last one"


def test_records_of_a_log_are_put_together_and_end_at_a_torn_one():
    whole = [b"a" * 10, b"b" * 70_000, b"", b"c" * 32_700, b"d"]
    content = b":W&B..."
    for record in whole:
        first, last = True, False
        while not last:
            left = 32768 - len(content) % 32768
            if left < 7:
                content, left = content + bytes(left), 32768
            piece, record = record[: left - 7], record[left - 7 :]
            last = not record
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, last]
            content += b"crc." + len(piece).to_bytes(2, "little") + bytes([kind]) + piece
            first = False
    assert list(trackers.log_records(content)) == whole
    assert list(trackers.log_records(content[:-1])) == whole[:-1]
    assert list(trackers.log_records(b"")) == []


def test_records_of_an_event_file_end_at_a_torn_one():
    whole = (3).to_bytes(8, "little") + b"crc." + b"abc" + b"crc."
    assert list(trackers.event_records(whole + whole[:-1])) == [b"abc"]
    assert list(trackers.event_records(b"")) == []


def test_a_journal_decides_the_order_of_trainings(tmp_path):
    run = made_run(tmp_path / "run")
    write_lines(run / "journal.jsonl", [entry("iter_2", "dpo", "start"), entry("iter_1", "sft", "start")])
    first = next(one for one in events_of(read_run(run)) if one.name == "train/iteration")
    assert first.value == 2.0
