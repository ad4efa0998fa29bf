"""Arms x seeds: the same loop with other judges, and whether what they gain is more than chance."""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsi import metrics
from jaxsi.methods import method_of
from jaxsi.records import write_atomically
from jaxsi.run import Run


def bench_methods(directory: Path, configs: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Runs each arm's config with each seed in ``directory/<arm>/<seed>``, where that is not done yet, and tabulates.

    Returns: {"seeds", "arms": [{"arm", "gain", "iterations": [{"iteration", "quality", ...}]}]}, which is also
    ``directory/table.json`` and, to read, ``table.md``. Gain is the exact quality of the last iteration less that of
    the first, with its 95 % interval: a paired bootstrap over seeds x prompts.
    """
    for arm, cfg in configs.items():
        for seed in seeds:
            _run(directory / arm / str(seed), dataclasses.replace(cfg, seed=seed), f"{arm}, seed {seed}")
    arms = [_arm(arm, [directory / arm / str(seed) for seed in seeds], cfg.iterations) for arm, cfg in configs.items()]
    value = {"seeds": list(seeds), "arms": arms}
    write_atomically(directory / "table.json", [(json.dumps(value, indent=2) + "\n").encode()])
    write_atomically(directory / "table.md", [markdown(rows_of(value)).encode()])
    return value


def _run(directory: Path, cfg: Any, label: str) -> None:
    began = time.monotonic()
    with Run.open(directory, cfg) as run:
        if run.complete:
            print(f"{label}: already complete", file=sys.stderr)
            return
        method_of(cfg)(cfg, run)
    print(f"{label}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _arm(arm: str, runs: Sequence[Path], iterations: int) -> dict[str, Any]:
    lines, by_prompt = [], []
    for t in range(1, iterations + 1):
        figures = [json.loads((run / f"iter_{t}" / "evaluation.json").read_text()) for run in runs]
        summaries = [json.loads((run / "summary.json").read_text())["iterations"][t - 1] for run in runs]
        by_prompt.append(np.asarray([figure["by_prompt"] for figure in figures]))
        lines.append(
            {
                "iteration": t,
                "quality": float(by_prompt[-1].mean()),
                "quality_of_seeds": by_prompt[-1].mean(axis=1).tolist(),
                "greedy": _mean(figure["greedy"] for figure in figures),
                "best_of_samples": _mean(figure["best_of_samples"] for figure in figures),
                "judge_agreement": _mean(figure["judge_agreement"] for figure in figures),
                "parse_rate": _mean(figure["parse_rate"] for figure in figures),
                "mean_length": _mean(figure["mean_length"] for figure in figures),
                "pairs": _mean(summary["pairs"] for summary in summaries),
                "seconds": _mean(sum(summary["seconds"].values()) for summary in summaries),
            }
        )
    mean, low, high = metrics.paired_bootstrap(by_prompt[-1], by_prompt[0])
    return {"arm": arm, "gain": {"mean": mean, "ci95": [low, high]}, "iterations": lines}


def _mean(values: Any) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def rows_of(value: Mapping[str, Any]) -> list[dict[str, str]]:
    """The table as texts: one row an arm and iteration; the gain stands in the row of the last."""
    rows = []
    for arm in value["arms"]:
        for line in arm["iterations"]:
            last = line is arm["iterations"][-1]
            low, high = arm["gain"]["ci95"]
            rows.append(
                {
                    "arm": arm["arm"],
                    "M": str(line["iteration"]),
                    "quality": _text(line["quality"]),
                    "gain (95 % interval)": f"{arm['gain']['mean']:+.2f} ({low:+.2f} to {high:+.2f})" if last else "",
                    "greedy": _text(line["greedy"]),
                    "best of samples": _text(line["best_of_samples"]),
                    "judge agreement": _text(line["judge_agreement"], 3),
                    "pairs": _text(line["pairs"], 0),
                    "length": _text(line["mean_length"], 1),
                    "seconds": _text(line["seconds"], 0),
                }
            )
    return rows


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _text(figure: float | None, digits: int = 2) -> str:
    return "-" if figure is None else f"{figure:.{digits}f}"
