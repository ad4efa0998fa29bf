"""Methods x arms x seeds on the embedded world, and whether what they gain is more than chance.

An arm is a config of its method; the arm "method" is the method itself, the others change one thing. What arms of one
seed have in common (``IN_COMMON``) is computed once.
"""

import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsi.lm import load
from jaxsi.methods.start import carry_out, method_of
from jaxsi.model.compute_dtype import settled
from jaxsi.runs import metrics
from jaxsi.runs.config_snapshot import describe_config
from jaxsi.runs.records import write_atomically
from jaxsi.runs.run import Run
from jaxsi.toyworld.methods_claims import METHOD, claims, gain_text


class InCommon(NamedTuple):
    """What the arms of a method have in common: the folders ``shared``, if their configs differ in ``fields`` alone."""

    fields: frozenset[str]
    shared: tuple[str, ...]


IN_COMMON = {
    "self_rewarding": InCommon(
        frozenset({"judging", "dpo", "pairs", "early_stop", "iterations"}), ("iter_0", "sft_baseline", "iter_1")
    ),
    "srt": InCommon(frozenset({"dpo", "scoring", "direction"}), ("base", "iter_0")),
    "seft": InCommon(
        frozenset({"prompts", "internal", "external", "internal_rounds", "sft", "iterations"}),
        ("base", "iter_0", "warm_reviser", "reviser"),
    ),
    "pit": InCommon(
        frozenset({"rounds", "mix", "rewarding"}),
        ("base", "policy", "iter_0", "gap_reward", "policy_reward", "policy_rl"),
    ),
    "spin": InCommon(frozenset(), ()),
    "grpo": InCommon(frozenset({"judging"}), ("iter_0",)),
    "online_dpo": InCommon(frozenset({"judging"}), ("iter_0",)),
    "cream": InCommon(frozenset({"consistency"}), ("iter_0", "sft_baseline", "iter_1")),
    "temporal": InCommon(frozenset({"judging"}), ("iter_0", "sft_baseline", "iter_1")),
    "meta_rewarding": InCommon(frozenset({"judging", "pairs"}), ("iter_0", "sft_baseline", "iter_1")),
}


# Figures of an iteration's line of summary.json, of which the table has the mean over seeds.
REPORTED = (
    "judge_agreement",
    "judge_agreement_without_ties",
    "judge_tie_share",
    "mean_length",
    "pairs",
)
JUDGED = ("accuracy", "accuracy_without_ties", "tie_share", "exact_match", "five_best", "spearman", "kendall")


class BenchError(RuntimeError):
    """A run that no longer belongs to the table."""


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
    prompts. "judge_quality" has the means over seeds of what `judge_quality` measures. ``made_by``
    says how the table came to be: command, commit, versions.
    """
    runs = [(arm, seed) for arm in arms for seed in arm.seeds]
    commit = (made_by or {}).get("commit")
    for number, (arm, seed) in enumerate(runs, start=1):
        finished = (a for a in arms if a is not arm and (a.method, a.name) == (arm.method, METHOD) and seed in a.seeds)
        label = f"[{number}/{len(runs)}] {arm.method}, {arm.name}, seed {seed}"
        _run(directory, arm, seed, next(finished, None), label, commit)
    rows = [_measured(directory, arm) for arm in arms]
    commits = {str(json.loads((_folder(directory, *of) / "summary.json").read_text()).get("commit")) for of in runs}
    told = dict(made_by or {}) | ({"commit": ", ".join(sorted(commits))} if made_by else {})
    value = {"arms": rows, "claims": [claim._asdict() for claim in claims(rows)], "made_by": told}
    write_atomically(directory / "table.json", [(json.dumps(value, indent=2) + "\n").encode()])
    below = "".join(f"{name}: {text}  \n" for name, text in told.items())
    tables = [markdown(rows_of(value))]
    if judged := judge_rows_of(value):
        tables.append(f"The models as judges of human rankings:\n\n{markdown(judged)}")
    write_atomically(directory / "table.md", ["\n".join([*tables, below]).encode()])
    return value


def _folder(directory: Path, arm: Arm, seed: int) -> Path:
    return directory / arm.method / arm.name.replace(" ", "_") / str(seed)


def _run(directory: Path, arm: Arm, seed: int, source: Arm | None, label: str, commit: str | None) -> None:
    began = time.monotonic()
    folder = _folder(directory, arm, seed)
    cfg = settled(dataclasses.replace(arm.config, seed=seed), folder)
    with Run.open(folder, cfg) as run:
        if run.complete:
            _check_model(run, cfg.model)
            print(f"{label}: already complete", file=sys.stderr)
            return
        if source is not None:
            done = _folder(directory, source, seed)
            share(settled(dataclasses.replace(source.config, seed=seed), done), done, cfg, run.path)
        carry_out(cfg, run)
        run.update_summary({"commit": commit})
    print(f"{label}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _check_model(run: Run, model: str) -> None:
    """A run that is complete is not opened again by its method, which would notice another model under the old name."""
    given, now = run.at("iter_0").value("model", dict)["fingerprint"], _fingerprint(model)
    if given != now:
        raise BenchError(
            f"{run.path} was made from the weights {given}, {model} now has {now}: give another --run-dir, or delete it"
        )


@functools.cache
def _fingerprint(model: str) -> str:
    return load(model, dtype="float32").fingerprint


def share(source: Any, done: Path, cfg: Any, folder: Path) -> None:
    """Copies to a run's ``folder`` the scopes that its config has in common with the finished run of ``source``, see
    ``IN_COMMON``. A scope appears under its name complete or not at all."""
    in_common = IN_COMMON[method_of(cfg).__name__]
    described = [describe_config(c) for c in (source, cfg)]
    for name in in_common.fields:
        for fields in described:
            del fields[name]
    if described[0] != described[1]:
        return
    for name in in_common.shared:
        if (done / name).is_dir() and not (folder / name).exists():
            unfinished = folder / f".{name}.copy"
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(done / name, unfinished)
            unfinished.rename(folder / name)


def _measured(directory: Path, arm: Arm) -> dict[str, Any]:
    """A row of the table. A method may stop early, so runs of one arm may have different numbers of iterations: an
    iteration's figures are of the runs that have it, the gain is from each run's first to its own last, or to the one
    that its summary calls best."""
    runs = [_folder(directory, arm, seed) for seed in arm.seeds]
    told = [json.loads((run / "summary.json").read_text()) for run in runs]
    measured = [
        [_figures(run, line) for line in summary["iterations"]] for run, summary in zip(runs, told, strict=True)
    ]
    lines = []
    for number in range(max(map(len, measured))):
        of = [figures[number] for figures in measured if number < len(figures)]
        by_prompt = np.asarray([figure["by_prompt"] for figure in of])
        lines.append(
            {
                "iteration": of[0]["iteration"],
                "seeds": len(of),
                "quality": float(by_prompt.mean()),
                "ci95": _interval(by_prompt),
                "quality_of_seeds": by_prompt.mean(axis=1).tolist(),
                **{name: _mean(figure[name] for figure in of) for name in REPORTED},
                "judge_quality": _means([f["judge_quality"] for f in of if f["judge_quality"]]),
            }
        )
    first = [figures[0] for figures in measured]
    last = [
        next((f for f in figures if f["iteration"] == summary.get("best")), figures[-1])
        for figures, summary in zip(measured, told, strict=True)
    ]
    return {
        "method": arm.method,
        "arm": arm.name,
        "seeds": list(arm.seeds),
        "gain": _gain(last, first, "by_prompt") if len(lines) > 1 else None,
        "over_drafts": _gain(last, last, "draft_by_prompt") if "draft_by_prompt" in last[0] else None,
        "base": _mean(summary["base"]["quality"]["mean"] for summary in told if "base" in summary),
        "seconds": _mean(_seconds(run) for run in runs),
        "reviser": [summary["reviser"] for summary in told if "reviser" in summary],
        "iterations": lines,
        "first": [_without_prompts(figures) for figures in first],
        "last": [_without_prompts(figures) for figures in last],
    }


def _figures(run: Path, line: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of one iteration of one run."""
    figures = json.loads((run / f"iter_{line['iteration']}" / "evaluation.json").read_text())
    reported = {name: line.get(name) for name in ("iteration", "judge_quality", *REPORTED)}
    if "judge_tie_share" not in line:  # of an earlier version, whose agreement counted a tie as half right
        reported["judge_agreement"] = None
    return figures | reported


def _without_prompts(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figure for name, figure in figures.items() if not name.endswith("by_prompt")}


def _gain(after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Mean and interval of the gain of ``after`` over ``before``, which holds its qualities under ``name``."""
    qualities = [[figures["by_prompt"] for figures in after], [figures[name] for figures in before]]
    mean, low, high = metrics.paired_bootstrap(*map(np.asarray, qualities))
    return {"mean": mean, "ci95": [low, high]}


def _seconds(run: Path) -> float:
    """What the stages of a run took that were not copied from another one."""
    journal = [json.loads(line) for line in (run / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    return sum(entry["seconds"] for entry in journal if entry["event"] == "done")


def _interval(by_prompt: np.ndarray) -> list[float]:
    """The confidence interval of the mean over seeds x prompts."""
    _, low, high = metrics.paired_bootstrap(by_prompt, np.zeros_like(by_prompt))
    return [low, high]


def _mean(values: Any) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _means(measured: Sequence[Mapping[str, float | None]]) -> dict[str, float | None] | None:
    """The mean of each figure over runs; None without any run."""
    return {name: _mean(of[name] for of in measured) for name in measured[0]} if measured else None


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
                    "gain": gain_text(arm["gain"]) if last and arm["gain"] else "",
                    "agreement": _text(line["judge_agreement"], 3),
                    "without ties": _text(line["judge_agreement_without_ties"], 3),
                    "ties": _text(line["judge_tie_share"], 3),
                    "length": _text(line["mean_length"]),
                    "seconds an arm": _text(arm["seconds"], 0) if first else "",
                    "seeds": str(line["seeds"]),
                }
            )
    return rows


def judge_rows_of(value: Mapping[str, Any]) -> list[dict[str, str]]:
    """The second table: the models as judges of human rankings (`judge_quality`), for arms that measure it."""
    rows = []
    for arm in value["arms"]:
        measured = [line for line in arm["iterations"] if line["judge_quality"] is not None]
        for line in measured:
            first = line is measured[0]
            rows.append(
                {
                    "method": arm["method"] if first else "",
                    "arm": arm["arm"] if first else "",
                    "iteration": str(line["iteration"]),
                    **{name.replace("_", " "): _text(line["judge_quality"][name], 3) for name in JUDGED},
                    "seeds": str(line["seeds"]),
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
