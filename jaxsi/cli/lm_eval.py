"""``jaxsi eval lm-eval``: tasks of lm-evaluation-harness."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxsi.cli.arguments import ChatOptions, Model
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.eval_judge import Computing, check_counts
from jaxsi.cli.eval_results import make_folder, write_file
from jaxsi.cli.stored import check_writes, mesh_for
from jaxsi.runs.metrics import table

DESCRIPTION = """Runs tasks of lm-evaluation-harness (pip install 'jaxsi[lm-eval]') on MODEL. A task is one of the
harness' own, or a YAML file in the folder --include-path. Data sets are fetched by the harness; HF_DATASETS_OFFLINE=1
keeps it off the network. DIR gets results.json. Nothing is kept of a command that is killed.

Examples:
  jaxsi eval lm-eval MODEL --tasks arc_easy hellaswag --limit 100
  jaxsi eval lm-eval runs/mine@2 --tasks gsm8k --num-fewshot 5 --apply-chat-template --json
  jaxsi eval lm-eval MODEL --tasks my_task --include-path my_tasks -o DIR"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harness(Computing, ChatOptions):
    model: Model
    tasks: tuple[str, ...]
    """Names of tasks or groups of tasks."""
    include_path: Path | None = None
    """A folder with tasks of your own."""
    num_fewshot: int | None = None
    limit: int | None = None
    """Only the first documents of each task."""
    apply_chat_template: bool = False
    """Write the prompts with MODEL's chat template."""
    fewshot_as_multiturn: bool = False
    """With the chat template: examples as turns of a conversation."""
    gen_kwargs: str | None = None
    """Settings of generation in place of the task's, as max_gen_toks=128,temperature=0."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """A folder for results.json: all results, with the configs of the tasks."""
    seed: int = 0
    """Of the responses."""
    batch_size: int = 64
    """Rows generated at the same time."""


def harness(argv: list[str]) -> Report:
    """Tasks of lm-evaluation-harness."""
    args = parse(Harness, argv, "jaxsi eval lm-eval", DESCRIPTION)
    if args.include_path is not None and not args.include_path.is_dir():
        raise UsageError(f"--include-path {args.include_path}: no such folder")
    if not args.tasks:
        raise UsageError("--tasks is empty; name at least one task")
    check_counts(limit=args.limit, batch_size=args.batch_size)
    out = None if args.out is None else make_folder(args.out, "--out")
    from jaxsi.evals.harness import harness_model, tasks_of
    from jaxsi.lm import load

    manager = tasks_of(args.tasks, args.include_path)
    lm = load(args.model, mesh_for(args.model, args.mesh), args.dtype, chat=args.model_chat)
    check_writes(lm, args.model)
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=harness_model(lm, batch_size=args.batch_size, seed=args.seed),
        tasks=list(args.tasks),
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        fewshot_as_multiturn=args.fewshot_as_multiturn,
        gen_kwargs=args.gen_kwargs,
        log_samples=False,
    )
    assert found is not None
    if out is not None:
        write_file(out / "results.json", [json.dumps(found, default=str, indent=1).encode()])
    results = {name: _plain(figures) for name, figures in found["results"].items()}
    value = {"model": args.model, "fingerprint": lm.fingerprint, "results": results}
    rows = [
        {"task": task, "metric": metric.replace(",none", ""), "value": figure, "±": figures.get(_error(metric))}
        for task, figures in results.items()
        for metric, figure in figures.items()
        if isinstance(figure, float) and "_stderr" not in metric
    ]
    return Report(value, table(rows))


def _error(metric: str) -> str:
    """The name of a metric's standard error: acc,none -> acc_stderr,none."""
    name, _, filter = metric.partition(",")
    return f"{name}_stderr,{filter}"


def _plain(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures as JSON values; the harness writes N/A for one that is not defined."""
    return {
        name: None if figure == "N/A" else float(figure) if isinstance(figure, int | float) else str(figure)
        for name, figure in figures.items()
    }
