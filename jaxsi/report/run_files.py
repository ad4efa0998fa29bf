"""Reads a run directory for people: whatever is there, finished or not, and says what is damaged.

A method reads its files strictly, because it computes with them (`runs.records`). A report has to show a run that is
still going on, that was killed, or that was made by another version. So here a line that cannot be read is left out and
named in `damage`; nothing but a missing run is an error.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxsi.runs.lock import is_locked
from jaxsi.runs.run import RunError

TRAINING = "train"  # the stem of the file of a training's figures


@dataclasses.dataclass(frozen=True)
class ScopeFiles:
    """The files of a folder of a run. ``records``: the rows of each NAME.jsonl, also of the finished shards of a stage
    that is not finished. ``values``: the content of each NAME.json. ``train``: the lines of train.jsonl."""

    name: str
    records: dict[str, list[dict[str, Any]]]
    values: dict[str, Any]
    train: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run directory as it is now. ``iterations``: a line for each model that was measured, the given one ("base")
    first; each has the figures of its evaluation as well. ``damage``: what could not be read, for people."""

    path: Path
    label: str
    config: dict[str, Any]
    summary: dict[str, Any]
    journal: list[dict[str, Any]]
    scopes: dict[str, ScopeFiles]
    live: bool
    damage: list[str]

    @property
    def iterations(self) -> list[dict[str, Any]]:
        base, lines = self.summary.get("base"), self.summary.get("iterations")
        entries = [base] if isinstance(base, dict) else []
        entries += [line for line in lines if isinstance(line, dict)] if isinstance(lines, list) else []
        measured = []
        for entry in entries:
            t = entry.get("iteration")
            if t != "base" and number(t) is None:
                continue
            scope = self.scopes.get("base" if t == "base" else f"iter_{t}")
            figures = mapping(scope.values.get("evaluation")) if scope else {}
            measured.append({**figures, **{name: value for name, value in entry.items() if value is not None}})
        return measured

    @property
    def method(self) -> str:
        """The name of the method; of one that has not said it yet, the part of its config's name that has it."""
        stored = self.summary.get("method")
        name = text(self.config.get("__type__", "")).split("#")[0].split(".")
        return text(stored) if stored else (name[-2] if len(name) > 1 else name[-1])

    @property
    def status(self) -> str:
        """ "complete", "running" or "stopped"."""
        if self.summary.get("status") == "complete":
            return "complete"
        return "running" if self.live else "stopped"


def read_runs(
    directories: list[Path], *, advance: Callable[[int, bool], None] = lambda items, worked: None
) -> list[RunFiles]:
    """Reads run directories. A label is what tells a run from the others: the part of its path that differs.

    ``advance(1, True)`` is called after each.

    Raises: RunError if a directory does not exist, or holds no run.
    """
    runs = []
    for path, label in zip(directories, labels(directories), strict=True):
        runs.append(read_run(path, label))
        advance(1, True)
    return runs


def labels(paths: list[Path]) -> list[str]:
    """Short names that tell paths apart: runs/a/0 and runs/b/0 are "a" and "b"; one path alone is "a/0". Paths that are
    equal get a number."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) == 1:
        short = next((n for n in range(1, len(parts[0])) if not parts[0][-n].isdecimal()), 1)
        parts = [one[-short:] for one in parts]
    else:
        while len({one[0] for one in parts}) == 1 and all(len(one) > 1 for one in parts):
            parts = [one[1:] for one in parts]
        while len({one[-1] for one in parts}) == 1 and all(len(one) > 1 for one in parts):
            parts = [one[:-1] for one in parts]
    names, seen = [], dict[str, int]()
    for one in parts:
        name = "/".join(one)
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def read_run(directory: Path, label: str | None = None, *, records: bool = True) -> RunFiles:
    """Reads a run directory; without ``records`` only its values, its journal and the lines of its trainings.

    Raises: RunError if it does not exist or holds no run.
    """
    if not (directory / "config.json").is_file():
        raise RunError(f"{directory} holds no run (there is no config.json in it); check the path")
    live = is_locked(directory)
    damage = _Damage(directory)
    scopes = {}
    for folder in sorted((p for p in directory.iterdir() if p.is_dir() and not p.name.startswith(".")), key=_natural):
        scope = _read_scope(folder, damage, records)
        if scope.records or scope.values or scope.train:
            scopes[folder.name] = scope
    journal = [row for row in _rows(directory / "journal.jsonl", damage, torn=True) if _is_entry(row)]
    return RunFiles(
        path=directory,
        label=label or directory.resolve().name,
        config=mapping(_value(directory / "config.json", damage)),
        summary=mapping(_value(directory / "summary.json", damage) if (directory / "summary.json").exists() else {}),
        journal=journal,
        scopes=scopes,
        live=live,
        damage=damage.told,
    )


def signature(directory: Path) -> dict[str, tuple[int, int]]:
    """{file: (time of its last change, size)} of all files of records in a run: it changes when the report would."""
    found = {}
    for path in sorted(directory.rglob("*.json*")):
        try:
            if not {"checkpoint", "resume"} & set(path.relative_to(directory).parts):
                found[str(path)] = (path.stat().st_mtime_ns, path.stat().st_size)
        except OSError:  # removed in the meantime
            continue
    return found


# ---- values ----------------------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return value if is_number and math.isfinite(value) else None
    except OverflowError:  # an int beyond every float
        return None


def text(value: Any) -> str:
    """A text; anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def mapping(value: Any) -> dict[str, Any]:
    """An object; {} for anything else."""
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[Any]:
    """A list; [] for anything else."""
    return value if isinstance(value, list) else []


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects by dotted names; the type of an object stands under its own name."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in flat(
            item, ".".join(part for part in (prefix, key if key != "__type__" else "") if part)
        ).items()
    }


# ---- files -----------------------------------------------------------------------------------------------------------


class _Damage:
    """Collects what cannot be read."""

    def __init__(self, root: Path):
        self.root, self.told = root, list[str]()

    def add(self, path: Path, reason: str, line: int | None = None) -> None:
        place = path.relative_to(self.root)
        self.told.append(f"{place}{'' if line is None else f':{line}'}: {reason}")


def _read_scope(folder: Path, damage: _Damage, with_records: bool) -> ScopeFiles:
    records, values, train = {}, {}, []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.name == f"{TRAINING}.jsonl":
            train = [row for row in _rows(path, damage, torn=True) if number(row.get("step")) is not None]
        elif path.suffix in (".jsonl", ".shards") and not with_records:
            continue
        elif path.suffix == ".jsonl":
            records[path.stem] = list(_rows(path, damage))
        elif path.suffix == ".json" and not path.name.startswith("ref_logps_"):
            values[path.stem] = _value(path, damage)
        elif path.suffix == ".shards" and path.is_dir() and not path.with_suffix(".jsonl").exists():
            shards = sorted(path.glob("*.jsonl"))
            records[path.stem] = [row for shard in shards for row in _rows(shard, damage)]
    return ScopeFiles(folder.name, records, values, train)


def _rows(path: Path, damage: _Damage, *, torn: bool = False) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, without the token ids and log-probabilities of responses; "tokens" has their
    number. ``torn``: the file grows line by line, so its last line may be unfinished."""
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                if not raw.strip() or (torn and not raw.endswith(b"\n")):
                    continue
                row, reason = _parsed(raw)
                if reason:
                    damage.add(path, f"{reason}; this line is left out", line)
                else:
                    yield _lighter(row)
    except FileNotFoundError:  # a stage that ends just now turns its shards into one file
        return
    except OSError as error:
        damage.add(path, f"cannot be read: {error.strerror or error}")


def _parsed(raw: bytes) -> tuple[Any, str]:
    """(The object, "") or (None, the reason why there is none)."""
    try:
        row = json.loads(raw.decode("utf-8"), parse_constant=_refused)
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except RecursionError:
        return None, "nested too deeply"
    except ValueError as error:
        return None, f"broken JSON ({error})"
    return (row, "") if isinstance(row, dict) else (None, f"a {type(row).__name__} in place of an object")


def _refused(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _lighter(row: Any) -> Any:
    if isinstance(row, dict):
        if "token_ids" in row:
            row["tokens"] = len(listed(row.pop("token_ids")))
            row.pop("logps", None)
        for name in ("chosen", "rejected", "response"):
            if isinstance(row.get(name), dict):
                _lighter(row[name])
    return row


def _value(path: Path, damage: _Damage) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        damage.add(path, f"cannot be read: {error.strerror or error}")
    except (ValueError, RecursionError) as error:
        damage.add(path, f"broken JSON ({error}); the file is left out")
    return None


def _is_entry(row: dict[str, Any]) -> bool:
    """Whether a line of the journal has what every reader of it takes for granted."""
    places = all(isinstance(row.get(name), str) for name in ("time", "scope", "stage", "event"))
    return places and number(row.get("seconds")) is not None


def _natural(path: Path) -> tuple[bool, str, float]:
    """Sorts iter_10 after iter_9, and everything before iter_0 first."""
    head, _, tail = path.name.rpartition("_")
    return (
        head == "iter",
        "" if head == "iter" else path.name,
        float(tail) if head == "iter" and tail.isdecimal() else 0.0,
    )
