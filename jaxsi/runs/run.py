"""The run directory: stages that are on disk once they are done, a journal, named keys, and one check of the config.

    DIR/config.json  summary.json  journal.jsonl  .lock
    DIR/iter_1/prompts.jsonl                   a finished stage
    DIR/iter_1/candidates.shards/00000.jsonl   an unfinished stage: a kill loses the current shard only
    DIR/iter_1/quality.json                    a stage whose result is one JSON value

`scope.records(name, stage, *args)` is the result of the stage, read from its file if the file exists; so the text of a
method is its resume logic. With several hosts every process calls the same stages in the same order on one shared file
system; shard k is written by process k mod n, everything else by process 0.
"""

import contextlib
import datetime
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from jaxsi.runs import memory, preemption
from jaxsi.runs.config_snapshot import RunError, check_config, describe_settled, with_known_files
from jaxsi.runs.errors import InputError
from jaxsi.runs.lock import take_lock
from jaxsi.runs.named_keys import fold
from jaxsi.runs.progress import processes, progress
from jaxsi.runs.records import RecordError, read_jsonl, write_atomically, write_jsonl
from jaxsi.runs.spent import Spent, now

Record = TypeVar("Record")
Item = TypeVar("Item")


class RunConfig(Protocol):
    """What a run needs of its frozen config: a seed, from which all its keys are derived."""

    @property
    def seed(self) -> int: ...


class Sampler(Protocol):
    """The identity of a model, to check records against: see `Scope.sharded`."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def template_hash(self) -> str: ...


class StaleRecordsError(InputError, ValueError):
    """Records on disk that another model made, or that other prompts belong to."""


# ---- the run ---------------------------------------------------------------------------------------------------------


class Run:
    """A run directory held by this process, from `Run.open`; `close` (or leaving a `with` block) releases it."""

    def __init__(self, path: Path, config: RunConfig, lock: int | None):
        self.path, self.config = path, config
        self._release = (lambda: None) if lock is None else weakref.finalize(self, os.close, lock)
        self.inside = Spent()  # by the finished stages inside the current one

    @staticmethod
    def open(directory: Path | str, config: RunConfig, *, resume: bool = True) -> "Run":
        """Creates the run directory, or resumes the run in it.

        On resume only fields that their dataclass marks with `may_change` or `may_move` may differ, and `iterations`
        may be raised.
        With several hosts, call it after jax.distributed is initialised.

        Raises: RunConfigError with the differences, or if a dtype in ``config`` is still "auto". RunError if another
          live process holds the directory, if it holds something that is not a run, or if it holds a run and ``resume``
          is False.
        """
        path = Path(directory)
        described = describe_settled(config)
        if not _is_writer():  # process 0 checks and writes; if it fails, jax.distributed ends the others
            _barrier(f"open {path.name}")
            return Run(path, config, None)
        stored = stored_config(path)
        if stored is not None and not resume:
            raise RunError(f"{path} already holds a run; resume it, or give another directory")
        if stored is not None:
            check_config(path, stored, config)
            described = with_known_files(described, stored)
        with _disk(path):
            path.mkdir(parents=True, exist_ok=True)
            run = Run(path, config, take_lock(path))
            for leftover in path.rglob("*.tmp"):  # from a process that died: the lock shows that no other one lives
                leftover.unlink()
            _end_torn_line(path / "journal.jsonl")
            if stored is not None and stored.get("iterations") != described.get("iterations"):
                # First: after a kill here the added iterations must not count as complete.
                run._write_summary({"status": "running"})
            if described != stored:
                _write_json(path / "config.json", described)
            if not (path / "summary.json").exists():
                run._write_summary({"status": "running"})
        _barrier(f"open {path.name}")
        return run

    def close(self) -> None:
        """Releases the directory, so that other processes can resume the run."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def at(self, name: str) -> "Scope":
        """The folder DIR/name of this run, e.g. run.at("iter_1"): all that makes M_1."""
        return Scope(self, _checked_name(name))

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        return read_json(self.path / "summary.json")

    def update_summary(self, values: dict[str, Any]) -> None:
        """Replaces the given top-level keys of DIR/summary.json, atomically."""
        if _is_writer():
            with _disk(self.path):
                self._write_summary(values)
        _barrier("summary")

    @property
    def complete(self) -> bool:
        """Whether the run has nothing left to do: its summary says "complete"."""
        return self.summary["status"] == "complete"

    def _write_summary(self, values: dict[str, Any]) -> None:
        path = self.path / "summary.json"
        _write_json(path, {**(read_json(path) if path.exists() else {}), **values})

    def journal(
        self,
        scope: str,
        stage: str,
        event: str,
        *,
        seconds: float = 0.0,
        records: int | None = None,
        measured: dict[str, Any] | None = None,
    ) -> None:
        """Adds a line to DIR/journal.jsonl (process 0). ``measured``: further values of it."""
        if not _is_writer():
            return
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        entry = {"time": at, "scope": scope, "stage": stage, "event": event, "seconds": round(seconds, 3)}
        line = json.dumps({**entry, "records": records, "process": os.getpid(), **(measured or {})}) + "\n"
        path = self.path / "journal.jsonl"
        with _disk(path), path.open("ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())


class Scope:
    """A folder of a run, e.g. iter_2. Each stage in it is computed once."""

    def __init__(self, run: Run, name: str):
        self.run, self.name, self.path = run, name, run.path / name

    def records(self, name: str, stage: Callable[..., Iterable[Record]], *args: Any, of: type[Record]) -> list[Record]:
        """`list(stage(*args))`, records of class `of`, kept in <name>.jsonl: read from there if the file exists."""
        path = self._file(name, ".jsonl")
        if _agreed([path.exists()])[0]:
            return self._reused(name, _read_stage(path, of))
        with self._timed(name) as done:
            records = _checked_records(stage(*args), of, name)
            self._write(path, write_jsonl, path, records)
            done(len(records))
        return records

    def counted(
        self,
        name: str,
        stage: Callable[..., tuple[Iterable[Record], Any]],
        *args: Any,
        of: type[Record],
        **keywords: Any,
    ) -> tuple[list[Record], Any]:
        """`stage(*args, **keywords)`: records, stored in <name>.jsonl, and a JSON value with counts of what happened
        to the input, stored in <name>_counts.json. If both files exist, they are read instead."""
        path, counts_path = self._file(name, ".jsonl"), self._file(f"{name}_counts", ".json")
        there, counts_there = _agreed([path.exists(), counts_path.exists()])
        if there and counts_there:
            return self._reused(name, _read_stage(path, of)), read_json(counts_path)
        with self._timed(name) as done:
            output, value = stage(*args, **keywords)
            records, counts = _checked_records(output, of, name), _plain(value, name)
            if there:  # records that later stages may have used already are never written again
                records = _read_stage(path, of)
            else:
                self._write(path, write_jsonl, path, records)
            self._write(counts_path, _write_json, counts_path, counts)
            done(len(records))
        return records, counts

    def finished(self, name: str, *, of: type[Record]) -> list[Record]:
        """The records of a stage that this run has done earlier. Raises: RunError if their file is gone."""
        path = self._file(name, ".jsonl")
        if not _agreed([path.exists()])[0]:
            raise RunError(f"{path} is gone, and later iterations need it; put it back, or begin a new run")
        return self._reused(name, _read_stage(path, of))

    def sharded(
        self,
        name: str,
        items: Sequence[Item],
        stage: Callable[..., Iterable[Record]],
        *args: Any,
        of: type[Record],
        by: Sampler | None = None,
        shard_size: int = 256,
    ) -> list[Record]:
        """`list(stage(items, *args))` in shards of `shard_size` items, each on disk once it is done, then one
        <name>.jsonl.

        The records of an item must not depend on the shard it is in: name random keys by id, not by position.

        Args:
          by: the model that samples the records. All records must have its fingerprint and its template, since files
            may outlive the model folder that they were made with.

        Raises: StaleRecordsError if a record was sampled by another model than `by`.
        """
        records = self._sharded(name, items, stage, args, of, by, shard_size)
        _check_sampled_by(by, records, self._file(name, ".jsonl"))
        return records

    def _sharded(
        self,
        name: str,
        items: Sequence[Item],
        stage: Callable[..., Iterable[Record]],
        args: Sequence[Any],
        of: type[Record],
        by: Sampler | None,
        shard_size: int,
    ) -> list[Record]:
        if shard_size < 1:
            raise RunError(f"stage {name!r}: shard_size is {shard_size}; it must be at least 1")
        path, folder = self._file(name, ".jsonl"), self._file(name, ".shards")
        if _agreed([path.exists()])[0]:
            self._write(folder, _remove, folder)  # a kill may have left it beside the merged file
            return self._reused(name, _read_stage(path, of))
        with self._timed(name) as done:
            cuts = range(0, len(items), shard_size)
            shards = [folder / f"{number:05d}.jsonl" for number in range(len(cuts))]
            self._write(folder, _plan_shards, folder, {"items": len(items), "shard_size": shard_size})
            finished = _agreed([shard.exists() for shard in shards])
            records: list[Record] = []
            index, count = processes()
            with progress(f"{self.name}/{name}", len(items)) as advance, preemption.stops_itself():
                for number, (cut, shard, is_finished) in enumerate(zip(cuts, shards, finished, strict=True)):
                    part = items[cut : cut + shard_size]
                    if is_finished:
                        part_records = _read_stage(shard, of)
                        _check_sampled_by(by, part_records, shard)  # before another model adds shards of its own
                    else:
                        part_records = _checked_records(stage(part, *args), of, name)
                        if number % count == index:
                            with _disk(shard):
                                write_jsonl(shard, part_records)
                    records += part_records
                    advance(len(part), not is_finished)
                    if preemption.requested() and number + 1 < len(shards):
                        raise preemption.Stopped(f"{folder}: {number + 1} of {len(shards)} parts are kept")
            _barrier(f"{self.name}/{folder.name}")
            self._write(path, write_atomically, path, _bytes_of(shards))
            self._write(folder, _remove, folder)
            done(len(records))
        return records

    def value(self, name: str, stage: Callable[..., Any], *args: Any) -> Any:
        """`stage(*args)`, a JSON value (numbers, texts, lists, objects), kept in <name>.json."""
        path = self._file(name, ".json")
        if _agreed([path.exists()])[0]:
            self.run.journal(self.name, name, "reused")
            return read_json(path)
        with self._timed(name) as done:
            value = _plain(stage(*args), name)
            self._write(path, _write_json, path, value)
            done(None)
        return value

    def key(self, *names: str | int) -> Any:
        """The typed threefry key named by (run seed, this scope, names…): the same on every host and every resume."""
        import jax

        return fold(jax.random.key(self.run.config.seed, impl="threefry2x32"), self.name, *names)

    def seconds(self) -> dict[str, float]:
        """{stage: seconds spent, without those of stages inside it}, summed over all times it ran in this scope."""
        total: dict[str, float] = {}
        for entry in read_journal(self.run.path):
            if entry["scope"] == self.name and entry["event"] == "done":
                total[entry["stage"]] = round(total.get(entry["stage"], 0.0) + entry["seconds"], 3)
        return total

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Journals a piece of work that keeps its own files, such as training into a checkpoint."""
        with self._timed(_checked_name(name)) as done:
            yield
            done(None)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[Callable[[int | None], None]]:
        preemption.check()
        self.run.journal(self.name, name, "start")
        with memory.peak() as peak, progress(f"{self.name}/{name}"):
            start, around, self.run.inside = now(), self.run.inside, Spent()

            def done(count: int | None) -> None:
                whole = now().less(start)
                alone = whole.less(self.run.inside)
                measured = {"tokens": alone.tokens, "memory": peak()}
                self.run.journal(self.name, name, "done", seconds=alone.seconds, records=count, measured=measured)
                self.run.inside = around.plus(whole)

            yield done

    def _reused(self, name: str, records: list[Record]) -> list[Record]:
        self.run.journal(self.name, name, "reused", records=len(records))
        return records

    def _file(self, name: str, suffix: str) -> Path:
        return self.path / (_checked_name(name) + suffix)

    def _write(self, path: Path, write: Callable[..., None], *args: Any) -> None:
        """Process 0 writes; the others wait for the file."""
        if _is_writer():
            with _disk(path):
                self.path.mkdir(exist_ok=True)
                write(*args)
        _barrier(f"{self.name}/{path.name}")


# ---- files -----------------------------------------------------------------------------------------------------------


def stored_config(path: Path) -> dict[str, Any] | None:
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; a run needs a directory of its own")
    if (path / "config.json").exists():
        return read_json(path / "config.json")
    strangers = [] if not path.exists() else sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    if strangers:
        raise RunError(f"{path} is not a run: it holds {', '.join(strangers[:5])} and no config.json; give another one")
    return None


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turns errors of the disk into RunErrors that say what to do."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Every finished stage and shard is kept; free some space "
            "(or make the directory writable) and run the same command again"
        ) from error


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, [text.encode("utf-8", "backslashreplace")])


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise RunError(f"{path} is broken JSON ({error}); {_delete_hint(path)}") from None


def _delete_hint(path: Path) -> str:
    if path.name in ("config.json", "plan.json"):
        return f"delete {path.parent} and start again"
    return "delete the file, and the same command makes it again"


def _read_stage(path: Path, of: type[Record]) -> list[Record]:
    try:
        return read_jsonl(path, of)
    except RecordError as error:
        raise RecordError(
            path, error.line, f"{error.reason}; delete this file, and the stage runs again"
        ) from error.__cause__


def _checked_records(output: Iterable[Record], of: type[Record], stage: str) -> list[Record]:
    records = list(output)
    for record in records:
        if type(record) is not of:
            raise RunError(f"stage {stage!r} returned a {type(record).__name__}, but of={of.__name__} is declared")
    return records


def _plain(value: Any, stage: str) -> Any:
    """The value as JSON gives it back: tuples are lists from the first time on."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RunError(f"stage {stage!r} returned {value!r:.200}, which JSON cannot represent: {error}") from None


def _check_sampled_by(model: Sampler | None, records: Sequence[Any], path: Path) -> None:
    if model is None:
        return
    for record in records:
        if (record.fingerprint, record.template) != (model.fingerprint, model.template_hash):
            raise StaleRecordsError(
                f"{path}: record {record.id!r} was sampled by weights {record.fingerprint} with template "
                f"{record.template}; this model has {model.fingerprint} and {model.template_hash}. Restore the "
                "model, or start a new run directory"
            )


def _bytes_of(files: Sequence[Path]) -> Iterator[bytes]:
    for file in files:
        yield file.read_bytes()


def _plan_shards(folder: Path, plan: dict[str, int]) -> None:
    """Deletes shards that were cut by another plan."""
    file = folder / "plan.json"
    if not (file.exists() and read_json(file) == plan):
        _remove(folder)
    if not folder.exists():
        folder.mkdir()
        _write_json(file, plan)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _checked_name(name: str) -> str:
    if not name or name.startswith(".") or not all(c.isalnum() or c in "_-.@" for c in name):
        raise RunError(
            f"{name!r} is not a valid stage or folder name: use letters, digits, _, -, . and @; no leading dot"
        )
    return name


def read_journal(directory: Path) -> Iterator[dict[str, Any]]:
    path = directory / "journal.jsonl"
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):  # a line torn by a kill
            yield json.loads(line)


def _end_torn_line(path: Path) -> None:
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


# ---- processes -------------------------------------------------------------------------------------------------------


def _is_writer() -> bool:
    return processes()[0] == 0


def _barrier(name: str) -> None:
    if processes()[1] > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"jaxsi {name}")


def _agreed(flags: list[bool]) -> list[bool]:
    """What process 0 sees: processes that look at a folder at different moments must still agree."""
    if processes()[1] == 1 or not flags:
        return flags
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(flags))).tolist()
