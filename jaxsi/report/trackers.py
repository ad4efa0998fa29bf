"""Experiment trackers: TensorBoard, Trackio and Weights & Biases show what a run directory holds.

The JSON lines of the run are the truth. A tracker gets them replayed: each figure has a name and a step, which follow
from its iteration, stage and step alone, and what the tracker already has is not sent again. So a run that was killed
and taken up again shows every step once, and a run can be tracked after it has ended.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxsi.report import figures
from jaxsi.report.run_files import RunFiles, number, read_run, text
from jaxsi.report.samples import EVALUATION, samples_of
from jaxsi.report.visible import plain
from jaxsi.runs.progress import processes
from jaxsi.runs.run import RunError

_log = logging.getLogger(__name__)

EVERY = 10.0  # seconds between two looks at the run
TABLE_ROWS = 64  # samples of an iteration, evenly spaced
TABLE_COLUMNS = ("iteration", "prompt", "response", "score", "tags")

# tracker -> (the module it needs, the extra that installs it)
TRACKERS = {"tensorboard": "tensorboardX", "trackio": "trackio", "wandb": "wandb"}


class TrackerError(RunError):
    """A tracker that is not known, or not installed."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number with its name, e.g. "train/loss", and its step."""

    name: str
    step: int
    value: float


@dataclasses.dataclass(frozen=True)
class SampleTable:
    """Samples of an iteration, under a name of its own: a later iteration never writes over them."""

    name: str
    step: int
    rows: Sequence[Sequence[str]]


Event = Figure | SampleTable


class Tracker(Protocol):
    """Where figures go. ``sent``: the (name, step) that are there already. ``send`` returns once they are."""

    def sent(self) -> set[tuple[str, int]]: ...

    def send(self, events: Sequence[Event]) -> None: ...

    def close(self) -> None: ...


def check(names: Iterable[str]) -> None:
    """Raises: TrackerError if a tracker is not known or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise TrackerError(f"--track {name}: the trackers are {', '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise TrackerError(f"--track {name} needs {TRACKERS[name]}: pip install 'jaxsi[{name}]'")


def opened(name: str, directory: Path) -> Tracker:
    """The tracker of a run. What it keeps in files is in DIR/trackers."""
    home = directory / "trackers"
    if name == "tensorboard":
        return TensorBoard(home / "tensorboard")
    home.mkdir(parents=True, exist_ok=True)
    return (Trackio if name == "trackio" else WeightsAndBiases)(home, _name_of(directory, home))


def _name_of(directory: Path, home: Path) -> str:
    """The name of a run in trackers: its folder's, and eight random digits that move with the folder."""
    file = home / "id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    return f"{directory.resolve().name}-{file.read_text().strip()}"


# ---- what there is to send -------------------------------------------------------------------------------------------


def events_of(run: RunFiles) -> list[Event]:
    """All figures of a run, in the order in which it made them. Steps of trainings are counted through the run."""
    events: list[Event] = []
    before = 0
    for scope, lines in figures.trainings(run):
        for row in lines:
            step = before + int(row["step"])
            values = {name: number(value) for name, value in row.items() if name not in ("step", "of")}
            events += [Figure(f"train/{name}", step, value) for name, value in values.items() if value is not None]
            events.append(Figure("train/iteration", step, _place(scope)))
        before += max([int(number(row.get("of")) or row["step"]) for row in lines])
    for entry in run.iterations:
        t = entry["iteration"]
        head, step = ("given_model", 0) if t == "base" else ("iteration", int(t))
        for name, (mean, low, high) in figures.values_of(entry).items():
            events.append(Figure(f"{head}/{name}", step, mean))
            if low is not None and high is not None:
                events += [Figure(f"{head}/{name}.low", step, low), Figure(f"{head}/{name}.high", step, high)]
    return events


def tables_of(run: RunFiles, known: set[tuple[str, int]]) -> list[SampleTable]:
    """A table of samples of each iteration that is done and not among the ``known``, and one of its evaluation."""
    done = [int(entry["iteration"]) for entry in run.iterations if entry["iteration"] != "base"]
    wanted = [t for t in done if (f"samples/iter_{t}", t) not in known]
    if not wanted:
        return []
    read = read_run(run.path)
    samples, _ = samples_of([read], limit=1_000_000)
    tables = []
    for t in wanted:
        rows = [
            (
                str(t),
                sample.prompt,
                entry.text,
                "" if entry.score is None else f"{entry.score:g}",
                ", ".join(entry.tags),
            )
            for sample in samples
            if sample.group in (EVALUATION, f"iter_{t}")
            for entry in sample.entries
            if entry.scope == f"iter_{t}"
        ]
        kept = [rows[i * len(rows) // TABLE_ROWS] for i in range(TABLE_ROWS)] if len(rows) > TABLE_ROWS else rows
        tables.append(SampleTable(f"samples/iter_{t}", t, [[plain(cell)[:2000] for cell in row] for row in kept]))
    return tables


def _place(scope: str) -> float:
    tail = scope.rpartition("_")[2]
    return float(tail) if tail.isdecimal() else 0.0


def replay(directory: Path, tracker: Tracker, known: set[tuple[str, int]]) -> int:
    """Sends what a tracker does not have; adds it to ``known``; returns how many events there were."""
    run = read_run(directory, records=False)
    events: list[Event] = [one for one in events_of(run) if (one.name, one.step) not in known]
    events += tables_of(run, known)
    if events:
        tracker.send(events)
        known |= {(one.name, one.step) for one in events}
    return len(events)


@contextlib.contextmanager
def following(directory: Path, names: Sequence[str]) -> Iterator[None]:
    """Replays a run into trackers while it goes on, and once more at its end. A tracker that fails is told and left
    out: it never stops the run.

    Raises: TrackerError if one is not known or not installed.
    """
    check(names)
    if not names or processes()[0] != 0:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(directory, names, over), name="jaxsi trackers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _follow(directory: Path, names: Sequence[str], over: threading.Event) -> None:
    trackers: dict[str, tuple[Tracker, set[tuple[str, int]]]] = {}
    failed: set[str] = set()
    ends = False
    while not ends:
        ends = over.wait(EVERY)
        if not (directory / "config.json").exists():
            continue
        for name in [one for one in names if one not in failed]:
            try:
                if name not in trackers:
                    tracker = opened(name, directory)
                    trackers[name] = tracker, tracker.sent()
                replay(directory, *trackers[name])
                if ends:
                    trackers[name][0].close()
            except Exception as error:
                failed.add(name)
                reason = (str(error).splitlines() or [""])[0]
                _log.warning(
                    "the tracker %s failed (%s: %s), so the run goes on without it; the same command with --track %s "
                    "sends the rest later", name, type(error).__name__, reason, name,
                )  # fmt: skip


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in a folder, written by tensorboardX, which needs neither TensorFlow nor TensorBoard. Each process
    adds a file; what the earlier ones hold is read from them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer: Any = None

    def sent(self) -> set[tuple[str, int]]:
        proto, found = importlib.import_module("tensorboardX.proto.event_pb2"), set()
        for file in sorted(self.folder.glob("*.tfevents.*")):
            for record in event_records(file.read_bytes()):
                event = proto.Event.FromString(record)
                found |= {(value.tag.removesuffix("/text_summary"), event.step) for value in event.summary.value}
        return found

    def send(self, events: Sequence[Event]) -> None:
        summary = importlib.import_module("tensorboardX.summary")
        proto = importlib.import_module("tensorboardX.proto.event_pb2")
        if self.writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            number = len(list(self.folder.glob("*.tfevents.*")))
            suffix = f".{number:04d}.{secrets.token_hex(4)}"  # processes of the same second keep their own files
            module = importlib.import_module("tensorboardX.event_file_writer")
            self.writer = module.EventsWriter(str(self.folder / "events"), filename_suffix=suffix)
        for one in events:
            value = summary.scalar(one.name, one.value) if isinstance(one, Figure) else _text(one, summary)
            value.value[0].tag = one.name if isinstance(one, Figure) else f"{one.name}/text_summary"
            self.writer.write_event(proto.Event(wall_time=time.time(), step=one.step, summary=value))
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _text(table: SampleTable, summary: Any) -> Any:
    def cell(value: str) -> str:
        marked = value.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
        return marked.replace("`", "\\`")

    head = [" | ".join(TABLE_COLUMNS), " | ".join("---" for _ in TABLE_COLUMNS)]
    return summary.text(table.name, "\n".join([*head, *(" | ".join(map(cell, row)) for row in table.rows)]))


def event_records(content: bytes) -> Iterator[bytes]:
    """The records of an event file, up to one that a kill has torn: length (8 bytes), its checksum (4), the record, its
    checksum (4)."""
    place = 0
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 8], "little")
        end = place + 12 + length + 4
        if end > len(content):
            return
        yield content[place + 12 : end - 4]
        place = end


# ---- Trackio ---------------------------------------------------------------------------------------------------------


class Trackio:
    """A local Trackio project; `trackio show --project jaxsi` shows it. TRACKIO_DIR says where it is kept."""

    def __init__(self, home: Path, name: str):
        self.name = name
        self.run: Any = None

    def sent(self) -> set[tuple[str, int]]:
        storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        rows = storage.get_logs("jaxsi", self.name)
        return {(name, int(row["step"])) for row in rows for name in row if name not in ("step", "timestamp")}

    def send(self, events: Sequence[Event]) -> None:
        pandas, trackio = (importlib.import_module(module) for module in ("pandas", "trackio"))
        if self.run is None:
            with contextlib.redirect_stdout(None):
                self.run = trackio.init(
                    "jaxsi", name=self.name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
                )
        for step, values in by_step(events).items():
            tables = {
                name: trackio.Table(dataframe=pandas.DataFrame(list(one.rows), columns=list(TABLE_COLUMNS)))
                for name, one in values.items()
                if isinstance(one, SampleTable)
            }
            numbers = {name: one.value for name, one in values.items() if isinstance(one, Figure)}
            self.run.log(numbers | tables, step=step)

    def close(self) -> None:
        if self.run is not None:
            with contextlib.redirect_stdout(None):
                self.run.finish()


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


class WeightsAndBiases:
    """A W&B run in the project "jaxsi", or that of WANDB_PROJECT; WANDB_MODE=offline keeps it on this machine.

    W&B's own process writes to a file with a delay of seconds, and a kill ends it, too. So DIR/trackers/wandb.jsonl
    lists what is sure to be there: all that a run sent which ended, and what these files hold of one that was killed.
    """

    def __init__(self, home: Path, name: str):
        self.home, self.name = home, name
        self.run: Any = None
        self.list = home / "wandb.jsonl"
        self.logged: list[tuple[str, int]] = []

    def sent(self) -> set[tuple[str, int]]:
        lines = self.list.read_text().splitlines() if self.list.exists() else []
        found = set()
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):  # a line torn by a kill
                name, step = json.loads(line)
                found.add((text(name), int(step)))
        files = sorted((self.home / "wandb").glob("*run-*/*.wandb"))
        kept = {one for file in files for one in logged_in(file.read_bytes())} - found
        self._add(sorted(kept))
        return found | kept

    def _add(self, sent: Iterable[tuple[str, int]]) -> None:
        with self.list.open("a") as file:
            file.write("".join(json.dumps(one) + "\n" for one in sent))

    def send(self, events: Sequence[Event]) -> None:
        wandb = importlib.import_module("wandb")
        if self.run is None:
            project = os.environ.get("WANDB_PROJECT", "jaxsi")
            self.run = wandb.init(project=project, id=self.name, name=self.name, resume="allow", dir=str(self.home))
            # W&B's own step may only grow; trainings and iterations each have a step of their own.
            self.run.define_metric("train/*", step_metric="train/step")
            self.run.define_metric("iteration/*", step_metric="iteration/step")
        for step, values in by_step(events).items():
            heads = {name.partition("/")[0] for name in values}
            data: dict[str, Any] = {f"{head}/step": step for head in heads}
            for name, one in values.items():
                is_table = isinstance(one, SampleTable)
                table = (
                    wandb.Table(columns=list(TABLE_COLUMNS), data=[list(row) for row in one.rows]) if is_table else None
                )
                data[name] = table if isinstance(one, SampleTable) else one.value
            self.run.log(data)
        self.logged += [(one.name, one.step) for one in events]

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()
            self._add(self.logged)


def logged_in(content: bytes) -> Iterator[tuple[str, int]]:
    """(Name, step) of what was logged to a file of W&B: records of its protocol buffer in LevelDB's format of logs,
    which may end in a torn one."""
    protocol = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for record in log_records(content):
        row: dict[str, Any] = {}
        for item in protocol.Record.FromString(record).history.item:
            row.setdefault(item.key or item.nested_key[0], item.value_json)  # a table has many nested keys
        for name in row:
            head = name.partition("/")[0]
            if f"{head}/step" in row and name != f"{head}/step":
                yield name, int(json.loads(row[f"{head}/step"]))


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a log of LevelDB, after the 7 bytes with which W&B begins it, up to the first torn one. A record
    is cut in pieces, none of which crosses the end of a block of 32 KiB: (checksum, 4 bytes; length, 2; kind, 1)."""
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if left < 7 or kind == 0:  # the rest of a block
            place += left
            continue
        if place + 7 + length > len(content):
            return
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def by_step(events: Sequence[Event]) -> dict[int, Mapping[str, Event]]:
    """{step: {name: event}}, the numbers finite."""
    found: dict[int, dict[str, Event]] = {}
    for one in events:
        if isinstance(one, SampleTable) or math.isfinite(one.value):
            found.setdefault(one.step, {})[one.name] = one
    return dict(sorted(found.items()))
