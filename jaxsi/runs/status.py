"""The state of a run, read from its directory without opening it."""

from collections.abc import Mapping
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


def sentence(line: Mapping[str, Any]) -> str:
    """A line of summary.json for people, e.g. "iteration 2: quality 82.4 (80.7 to 84.0), judge agreement 0.851, 490
    pairs, 103 ties, 60 s"."""
    parts = [f"quality {_mean(line['quality'], 1)}"] if line.get("quality") else []
    if line.get("judge_agreement") is not None:
        parts.append(f"judge agreement {line['judge_agreement']:.3f}")
    parts += [f"{name} {_mean(rate, 2)}" for name, rate in _win_rates(line)]
    if (followed := instructions_followed(line)) is not None:
        parts.append(f"IFEval {_mean(followed, 2)}")
    if line.get("parse_rate") is not None and line["parse_rate"] < 1:
        parts.append(f"parse rate {line['parse_rate']:.3f}")
    parts += [f"{line[name]:,} {name}" for name in ("pairs", "ties") if isinstance(line.get(name), int)]
    parts.append(f"{sum(line.get('seconds', {}).values()):,.0f} s")
    name = "the model as given" if line["iteration"] == "base" else f"iteration {line['iteration']}"
    return f"{name}: {', '.join(parts)}"


def so_far(summary: Mapping[str, Any]) -> str:
    """The quality, or else the win rates, or else IFEval, of all models so far: "quality 69.7 → 82.4"."""
    lines = [summary[name] for name in ("base",) if name in summary] + list(summary.get("iterations", []))
    if means := [f"{line['quality']['mean']:.1f}" for line in lines if line.get("quality")]:
        return f"quality {' → '.join(means)}"
    found = [rates[0] for line in lines if (rates := _win_rates(line))]
    found = found or [("IFEval", shares) for line in lines if (shares := instructions_followed(line)) is not None]
    return f"{found[-1][0]} {' → '.join(format(rate['mean'], '.2f') for _, rate in found)}" if found else ""


def held_out_rates(line: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The win rates of `HeldOutWinRate` in a line of summary.json, by "over_first" and "over_previous"; without those
    over which nothing could be judged."""
    rates = (line.get("evals") or {}).get("held-out", {})
    return {name: rate for name, rate in rates.items() if rate is not None and rate.get("mean") is not None}


def instructions_followed(line: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The share of prompts of which a model follows all instructions, strictly: {"mean", "ci95"} of `IFEval` in a line
    of summary.json; None if it was not measured."""
    share = (line.get("evals") or {}).get("ifeval", {}).get("prompt_strict")
    return share if share is not None and share.get("mean") is not None else None


def _win_rates(line: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    rates = held_out_rates(line)
    named = (("wins over the first model", "over_first"), ("over the previous", "over_previous"))
    return [(name, rates[key]) for name, key in named if key in rates]


def _mean(value: Mapping[str, Any], digits: int) -> str:
    low, high = value.get("ci95") or (None, None)
    mean = f"{value['mean']:.{digits}f}"
    return mean if low is None or high is None else f"{mean} ({low:.{digits}f} to {high:.{digits}f})"
