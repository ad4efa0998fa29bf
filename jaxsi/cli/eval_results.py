"""What the evaluations write and print: a folder of files, the spread over judge seeds, and the plan of a dry run."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsi.cli.command import Report, UsageError
from jaxsi.runs.metrics import table


def make_folder(out: Path | None, why: str) -> Path:
    """The folder of a command's results, made if it is not there. Raises: UsageError: if it was not given, or is a
    file."""
    if out is None:
        raise UsageError(f"{why} needs a folder: -o DIR")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a folder")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    out.mkdir(exist_ok=True)
    return out


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON objects, one a line, as `write_file`."""
    write_file(path, ((json.dumps(row) + "\n").encode("utf-8", "backslashreplace") for row in rows))


def write_file(path: Path, parts: Iterable[bytes]) -> None:
    """Writes a file of results in the first process; it appears complete or not at all."""
    from jaxsi.runs.progress import processes
    from jaxsi.runs.records import write_atomically

    if processes()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, parts)


def spreads(figures: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How far figures of several judge seeds lie apart: {name: {"values", "mean", "sd", "low", "high"}}, of the seeds
    that have the figure; None where there is nothing to tell."""
    return {name: _spread([one[name] for one in figures]) for name in names}


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    import statistics

    known = [value for value in values if value is not None]
    return {
        "values": list(values),
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "low": min(known, default=None),
        "high": max(known, default=None),
    }


def spreads_text(seeds: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of `spreads`, "" for one seed."""
    rows = [
        {
            "over the judge's seeds": name,
            "seeds": len(one["values"]),
            **{k: one[k] for k in ("mean", "sd", "low", "high")},
        }
        for name, one in seeds.items()
        if len(one["values"]) > 1
    ]
    return table(rows) if rows else ""


def counts_text(counts: Mapping[str, Any]) -> str:
    """What was asked, and why it failed."""
    names = ("judged", "reused", "failed", "unreadable")
    line = ", ".join(f"{name} {counts[name]}" for name in names)
    lines = ["; ".join([line, *counts["failures"]])]
    if counts["unreadable"] and counts["unreadable"] >= counts["judged"] + counts["reused"]:
        lines.append(
            "no verdict could be read: this judge writes none; name another one, or give it more --judge-tokens"
        )
    return "\n".join(lines)


def planned(**plans: Any) -> Report:
    """The report of a dry run: the `Plan` of each part, and of all."""
    from jaxsi.evals.judging import Plan

    named = plans | {"total": sum(plans.values(), Plan())}
    value = {"dry_run": True, **{name: plan._asdict() for name, plan in named.items()}}
    return Report(value, table([{"": name, **plan._asdict()} for name, plan in named.items()]))


def plan_of_responses(prompts: Sequence[Any], max_new_tokens: int) -> Any:
    """The `Plan` of a MODEL's responses to prompts, as if none were there; the model is not loaded."""
    from jaxsi.evals.judging import Plan, estimate

    return Plan.of(len(prompts), len(prompts), estimate(None, prompts, max_new_tokens))
