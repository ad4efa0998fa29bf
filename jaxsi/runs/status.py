"""The state of a run, read from its directory without opening it."""

from pathlib import Path
from typing import Any

from jaxsi.runs.lock import is_locked
from jaxsi.runs.run import RunError, read_journal, read_json, stored_config


def read_summary(directory: Path) -> dict[str, Any]:
    """The content of summary.json; {"status": "running"} if there is none yet."""
    path = directory / "summary.json"
    return read_json(path) if path.exists() else {"status": "running"}


def status(directory: Path | str) -> dict[str, Any]:
    """The state of the run in a directory, without opening it.

    {"directory", "status", "live": a process holds it, "iterations": configured or None, "summary": summary.json,
    "stages": [{"scope", "stage", "state", "records", "seconds", "shards": "3/12" or None}]}, stages in the order in
    which they first started, each "done", "running", "interrupted" or "deleted". Raises: RunError if there is no
    run.
    """
    path = Path(directory)
    config = stored_config(path)
    if config is None:
        raise RunError(f"{path} holds no run (there is no config.json in it); check the path")
    live = is_locked(path)
    stages: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in read_journal(path):
        place = entry["scope"], entry["stage"]
        new = {"scope": place[0], "stage": place[1], "state": "", "records": None, "seconds": 0.0, "shards": None}
        row = stages.setdefault(place, new)
        row["state"] = "done" if entry["event"] != "start" else ("running" if live else "interrupted")
        row["records"] = entry["records"]
        row["seconds"] = round(row["seconds"] + entry["seconds"], 3)
    for (scope, stage), row in stages.items():
        folder = path / scope / f"{stage}.shards"
        if row["state"] != "done" and (folder / "plan.json").exists():
            plan = read_json(folder / "plan.json")
            row["shards"] = f"{len(list(folder.glob('*.jsonl')))}/{-(-plan['items'] // plan['shard_size'])}"
        if row["records"] is not None and not (path / scope / f"{stage}.jsonl").exists():
            row["state"] = "deleted"
    summary = read_summary(path)
    return {
        "directory": str(path),
        "status": summary["status"],
        "live": live,
        "iterations": config.get("iterations"),
        "stages": list(stages.values()),
        "summary": summary,
    }
