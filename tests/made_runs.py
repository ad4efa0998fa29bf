"""Small run directories made by hand, for tests of what reads runs: no model is needed."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxsi.methods.lifecycle import report
from jaxsi.runs.run import Run
from jaxsi.sampling.generate import SamplingConfig

HOSTILE = (
    "<script>document.title = 'taken'</script>",
    "</script><img src=x onerror=alert(1)>",
    "bell\x07 escape\x1b[31m null\x00 delete\x7f",
    "right to left \u202eevil\u202c, zero\u200bwidth, \ufeff, \u2028 and \u2029",
    "half \ud800 of a pair \udfff",
    "<!-- <script> &lt;b&gt; {{ 7 * 7 }}",
)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_value(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def response(prompt_id: str, sample: int, text: str, *, tokens: int = 3, finish: str = "stop") -> dict[str, Any]:
    return {
        "id": f"{prompt_id}#{sample}", "prompt_id": prompt_id, "sample": sample, "text": text,
        "token_ids": list(range(tokens)), "logps": [-0.5] * tokens, "finish_reason": finish, "fingerprint": "f",
        "template": "t",
    }  # fmt: skip


def judgment(prompt_id: str, sample: int, *scores: float | None, text: str = "fine") -> dict[str, Any]:
    valid = [score for score in scores if score is not None]
    return {
        "id": f"{prompt_id}#{sample}", "prompt_id": prompt_id, "scores": list(scores),
        "score": sum(valid) / len(valid) if valid else None, "texts": [f"{text} Score: {score}" for score in scores],
        "fingerprint": "f", "template": "t",
    }  # fmt: skip


def entry(scope: str, stage: str, event: str, seconds: float = 0.0, **further: Any) -> dict[str, Any]:
    time = "2026-11-27T18:00:00.000+00:00"
    return {
        "time": time, "scope": scope, "stage": stage, "event": event, "seconds": seconds, "records": None,
        "process": 1, **further,
    }  # fmt: skip


def made_run(
    folder: Path,
    *,
    prompts: int = 6,
    texts: tuple[str, ...] = ("red", "blue"),
    complete: bool = True,
    gain: float = 10.0,
) -> Path:
    """A run of Self-Rewarding with iterations 1 and 2; in the second one a stage of judging raised an alarm."""
    ids, it = [f"iter2-{n:06d}" for n in range(prompts)], folder / "iter_2"
    asked = [
        {"role": "user", "content": f"Which colour is number {n}? {texts[n % len(texts)]}"} for n in range(prompts)
    ]
    responses = [[response(id, k, texts[(n + k) % len(texts)]) for k in range(2)] for n, id in enumerate(ids)]
    config = {"__type__": "methods.self_rewarding.Config", "model": "some/model", "iterations": 2, "dpo": {"beta": 0.1}}
    write_value(folder / "config.json", config)
    qualities = {1: (60.0, [58.0, 62.0]), 2: (60.0 + gain, [58.0 + gain, 62.0 + gain])}
    lines = [
        {
            "iteration": t, "quality": {"mean": mean, "ci95": ci}, "judge_agreement": 0.8, "parse_rate": 0.9,
            "pairs": prompts - 1 if t == 2 else None, "ties": 1 if t == 2 else None, "mean_length": 3.0,
            "alarms": ["one_score"] if t == 2 else None, "fingerprint": f"model{t}", "seconds": {"dpo": 2.0},
            "judge_quality": {"accuracy": 0.7, "spearman": 0.6},
        }
        for t, (mean, ci) in qualities.items()
    ]  # fmt: skip
    done = lines if complete else lines[:1]
    write_value(
        folder / "summary.json",
        {
            "status": "complete" if complete else "running",
            "method": "self_rewarding",
            "iterations": done,
            "commit": "abc",
        },
    )
    for t in (1, 2):
        write_lines(
            folder / f"iter_{t}" / "eval_prompts.jsonl",
            [{"id": "q", "messages": [{"role": "user", "content": "Evaluated?"}]}],
        )
        write_lines(folder / f"iter_{t}" / "eval_responses.jsonl", [response("q", 0, f"answer of M_{t}")])
        write_value(folder / f"iter_{t}" / "evaluation.json", {"by_prompt": [40.0 * t], "best_of_samples": 70.0 + t})
        write_lines(folder / f"iter_{t}" / "train.jsonl", [train_line(step, 6) for step in (2, 4, 6)])
    write_lines(it / "prompts.jsonl", [{"id": id, "messages": [ask]} for id, ask in zip(ids, asked, strict=True)])
    write_lines(it / "candidates.jsonl", [one for pair in responses for one in pair])
    write_lines(
        it / "judgments.jsonl", [judgment(id, k, 5.0 - 4 * k, 5.0 - 4 * k, None) for id in ids for k in range(2)]
    )
    pairs = [
        {"id": id, "messages": [ask], "chosen": two[0], "rejected": two[1], "chosen_score": 5.0, "rejected_score": 1.0}
        for id, ask, two in zip(ids[1:], asked[1:], responses[1:], strict=True)
    ]
    write_lines(it / "pairs.jsonl", pairs)
    judge = {"parse_rate": 0.67, "tie_rate": 0.1, "histogram": {"1": 0.2, "5": 0.8}, "alarms": ["one_score"]}
    write_value(
        it / "pairs_counts.json", {"prompts": prompts, "pairs": prompts - 1, "ties": 1, "gap": 4.0, "judge": judge}
    )
    journal = []
    for scope, stage, seconds, records in (
        ("iter_1", "sft", 4.0, None), ("iter_2", "prompts", 1.0, prompts), ("iter_2", "candidates", 2.0, 2 * prompts),
        ("iter_2", "judgments", 3.0, 2 * prompts), ("iter_2", "dpo", 6.0, None),
    ):  # fmt: skip
        tokens = {"sampled": 6 * prompts} if stage == "candidates" else {}
        journal += [entry(scope, stage, "start"), entry(scope, stage, "done", seconds, records=records, tokens=tokens)]
    write_lines(folder / "journal.jsonl", journal if complete else journal[:-1])
    return folder


def train_line(step: int, of: int, **further: Any) -> dict[str, Any]:
    return {
        "step": step, "of": of, "learning_rate": 1e-3, "loss": 0.7 - 0.01 * step, "margin": 0.5 * step,
        "chosen_logps": -1.0, "rejected_logps": -2.0 - step, "skipped": 0.0, **further,
    }  # fmt: skip


def lines_of_models(run: Run, evaluation: Any, scopes: Sequence[str], sampling: SamplingConfig) -> list[dict[str, Any]]:
    """The lines in the summary of ``run`` of models 0, 1, ... in ``scopes``, as a method reports them. A model is a
    stand-in with its number."""
    cfg = SimpleNamespace(sampling=sampling, model="given", evaluate=evaluation)
    for t, name in enumerate(scopes):
        number: Any = "base" if name == "base" else int(name.removeprefix("iter_"))
        model: Any = SimpleNamespace(fingerprint=str(t), number=t, tokenizer=SimpleNamespace(template_hash="t"))
        report(cfg, run, run.at(name), number, model)
    summary = run.summary
    return [*([summary["base"]] if "base" in summary else []), *summary["iterations"]]
