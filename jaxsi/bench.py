"""Methods x arms x seeds on the embedded world, and whether what they gain is more than chance.

An arm is a config of its method; the arm "method" is the method itself, the others change one thing. What arms of one
seed have in common (``Config.SHARED``, where they differ in ``Config.ARM_FIELDS`` alone) is computed once.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsi import metrics
from jaxsi.bench_claims import METHOD, claims, gain_text
from jaxsi.config import describe_config
from jaxsi.methods import method_of
from jaxsi.records import write_atomically
from jaxsi.run import Run


class Arm(NamedTuple):
    """A config to run with each of ``seeds``, under ``method/name/seed``."""

    method: str
    name: str
    config: Any
    seeds: tuple[int, ...]


def bench_methods(directory: Path, arms: Sequence[Arm], made_by: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Runs each arm with each of its seeds, where that is not done yet, and tabulates.

    Returns: {"arms": [{"method", "arm", "seeds", "gain", "base", "seconds", "iterations": [{"iteration", "quality",
    ...}]}], "claims", "made_by"}, which is also ``directory/table.json`` and, to read, ``table.md``. Gain is the exact
    quality of the last iteration less that of the first, with its 95 % interval: a paired bootstrap over seeds x
    prompts. ``made_by`` says how the table came to be: command, commit, versions.
    """
    runs = [(arm, seed) for arm in arms for seed in arm.seeds]
    for number, (arm, seed) in enumerate(runs, start=1):
        source = next((a for a in arms if (a.method, a.name) == (arm.method, METHOD) and seed in a.seeds), None)
        label = f"[{number}/{len(runs)}] {arm.method}, {arm.name}, seed {seed}"
        _run(directory, arm, seed, None if source is None or source is arm else source, label)
    rows = [_measured(directory, arm) for arm in arms]
    value = {"arms": rows, "claims": [claim._asdict() for claim in claims(rows)], "made_by": dict(made_by or {})}
    write_atomically(directory / "table.json", [(json.dumps(value, indent=2) + "\n").encode()])
    told = [f"{name}: {text}  \n" for name, text in value["made_by"].items()]
    write_atomically(directory / "table.md", ["\n".join([markdown(rows_of(value)), "".join(told)]).encode()])
    return value


def _folder(directory: Path, arm: Arm, seed: int) -> Path:
    return directory / arm.method / arm.name.replace(" ", "_") / str(seed)


def _run(directory: Path, arm: Arm, seed: int, source: Arm | None, label: str) -> None:
    began = time.monotonic()
    cfg = dataclasses.replace(arm.config, seed=seed)
    with Run.open(_folder(directory, arm, seed), cfg) as run:
        if run.complete:
            print(f"{label}: already complete", file=sys.stderr)
            return
        if source is not None:
            share(dataclasses.replace(source.config, seed=seed), _folder(directory, source, seed), cfg, run.path)
        method_of(cfg)(cfg, run)
    print(f"{label}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def share(source: Any, done: Path, cfg: Any, folder: Path) -> None:
    """Copies to a run's ``folder`` the scopes that its config has in common with the finished run of ``source``: none
    where they differ in more than ARM_FIELDS. A scope appears under its name complete or not at all."""
    described = [describe_config(c) for c in (source, cfg)]
    for name in type(cfg).ARM_FIELDS:
        for fields in described:
            del fields[name]
    if described[0] != described[1]:
        return
    for name in type(cfg).SHARED:
        if (done / name).is_dir() and not (folder / name).exists():
            unfinished = folder / f".{name}.copy"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(done / name, unfinished)
            unfinished.rename(folder / name)


def _measured(directory: Path, arm: Arm) -> dict[str, Any]:
    runs = [_folder(directory, arm, seed) for seed in arm.seeds]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    lines, by_prompt = [], []
    for number, first in enumerate(summaries[0]["iterations"]):
        figures = [json.loads((run / f"iter_{first['iteration']}" / "evaluation.json").read_text()) for run in runs]
        by_prompt.append(np.asarray([figure["by_prompt"] for figure in figures]))
        told = [summary["iterations"][number] for summary in summaries]
        lines.append(
            {
                "iteration": first["iteration"],
                "quality": float(by_prompt[-1].mean()),
                "ci95": _interval(by_prompt[-1]),
                "quality_of_seeds": by_prompt[-1].mean(axis=1).tolist(),
                "judge_agreement": _mean(line["judge_agreement"] for line in told),
                "mean_length": _mean(line["mean_length"] for line in told),
                "pairs": _mean(line["pairs"] for line in told),
                "seconds": _mean(sum(line["seconds"].values()) for line in told),
                "figures": [{k: v for k, v in figure.items() if k != "by_prompt"} for figure in figures],
            }
        )
    mean, low, high = metrics.paired_bootstrap(by_prompt[-1], by_prompt[0])
    return {
        "method": arm.method,
        "arm": arm.name,
        "seeds": list(arm.seeds),
        "gain": {"mean": mean, "ci95": [low, high]},
        "seconds": _mean(_seconds(run) for run in runs),
        "reviser": [summary["reviser"] for summary in summaries if "reviser" in summary],
        "base": _mean(summary["base"]["quality"]["mean"] for summary in summaries if "base" in summary),
        "iterations": lines,
    }


def _seconds(run: Path) -> float:
    """What the stages of a run took that were not copied from another one."""
    journal = [json.loads(line) for line in (run / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    return sum(entry["seconds"] for entry in journal if entry["event"] == "done")


def _interval(by_prompt: np.ndarray) -> list[float]:
    """Of the mean over seeds x prompts."""
    _, low, high = metrics.paired_bootstrap(by_prompt, np.zeros_like(by_prompt))
    return [low, high]


def _mean(values: Any) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def rows_of(value: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table as texts: one row an arm and iteration; the gain stands in the row of the last."""
    rows = []
    for arm in value["arms"]:
        for line in arm["iterations"]:
            first, last = line is arm["iterations"][0], line is arm["iterations"][-1]
            rows.append(
                {
                    "method": arm["method"] if first else "",
                    "arm": arm["arm"] if first else "",
                    "base": _text(arm["base"]) if first else "",
                    "iteration": str(line["iteration"]),
                    "quality": f"{line['quality']:.1f} ({line['ci95'][0]:.1f} to {line['ci95'][1]:.1f})",
                    "gain": gain_text(arm["gain"]) if last else "",
                    "agreement": _text(line["judge_agreement"], 3),
                    "length": _text(line["mean_length"]),
                    "seconds an arm": _text(arm["seconds"], 0) if first else "",
                    "seeds": str(len(arm["seeds"])) if first else "",
                }
            )
    return rows


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _text(figure: float | None, digits: int = 1) -> str:
    return "-" if figure is None else f"{figure:.{digits}f}"
