"""What the evaluations ask of a judge on the command line: who judges, how often, and where its answers are kept."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsi.cli.arguments import Dtype
from jaxsi.cli.command import Report, UsageError
from jaxsi.cli.judges import judge_of
from jaxsi.cli.stored import Mesh, mesh_for
from jaxsi.cli.tables import figures_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """The judge of an evaluation."""

    judge: str | None = None
    """Who judges: model:MODEL, endpoint:NAME[,base_url=URL], or another judge of `jaxsi judge --help`."""
    judge_temperature: float = 0.0
    judge_max_new_tokens: int = 2048
    judge_seeds: int = 1
    """Ask everything this often, each time with another seed, and show the spread."""
    dry_run: bool = False
    """Only count the calls and tokens, from above; nothing is asked."""
    batch_size: int = 64
    """Rows generated at the same time, here and by a judge in this process."""
    dtype: Dtype = "auto"
    """Of the computation. auto: bfloat16 if this device computes in it at speed, else float32."""
    mesh: Mesh = Mesh()

    def config(self, **changes: Any) -> Any:
        """How a judge's texts are sampled. Raises: UsageError."""
        from jaxsi.stages.verdicts import JudgeConfig

        if self.judge_seeds < 1:
            raise UsageError(f"--judge-seeds is {self.judge_seeds}; the least is 1")
        settings: dict[str, Any] = {"num_samples": 1, "temperature": self.judge_temperature, "top_p": 1.0}
        settings |= {"max_new_tokens": self.judge_max_new_tokens, "batch_size": self.batch_size}
        try:
            return JudgeConfig(**(settings | changes))
        except ValueError as error:
            raise UsageError(str(error)) from error

    def judging(self, folder: Path) -> Any:
        """The judge. The answers of an endpoint are kept in ``folder``. Raises: UsageError."""
        from jaxsi.stages.judge import judge as by_itself

        if self.judge is None:
            raise UsageError("--judge is missing; name a judge, such as model:MODEL or endpoint:NAME")
        judging = judge_of(self.judge, folder / "endpoint_answers.jsonl")
        if judging is by_itself:
            raise UsageError("--judge self: here it needs a name; give model:MODEL")
        return judging

    def writer(self, judging: Any) -> Any:
        """Who writes the judge's texts. Raises: EvaluationError: if it writes none."""
        from jaxsi.evals.judging import writer_of
        from jaxsi.stages.judges import ModelJudge

        if isinstance(judging, ModelJudge):
            return answerer(judging.model, Path(), self.mesh, self.dtype)[0]
        return writer_of(judging)


def new_folder(out: Path) -> Path:
    """The folder of an evaluation's files, made if it is not there. Raises: UsageError."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a folder")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    out.mkdir(exist_ok=True)
    return out


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON objects, one a line, in the first process; the file appears complete or not at all."""
    import json

    from jaxsi.runs.progress import processes
    from jaxsi.runs.records import write_atomically

    if processes()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, ((json.dumps(row) + "\n").encode() for row in rows))


def spread(scores: Sequence[float | None]) -> dict[str, Any]:
    """The figure of each judge seed, and its "mean", "low" and "high" over those that have it."""
    known = [score for score in scores if score is not None]
    return {
        "scores": list(scores),
        "mean": sum(known) / len(known) if known else None,
        "low": min(known, default=None),
        "high": max(known, default=None),
    }


def spread_text(seeds: Mapping[str, Any]) -> str:
    """The mean of a `spread`, and its range."""
    return f"{len(seeds['scores'])} judge seeds: {seeds['mean']:.4g} ({seeds['low']:.4g} to {seeds['high']:.4g})"


def costs(**counts: Mapping[str, int]) -> Report:
    """The report of a dry run: the calls and tokens of each part, and of all."""
    names = ("calls", "prompt_tokens", "completion_tokens")
    total = {name: sum(part[name] for part in counts.values()) for name in names}
    value = {"dry_run": True, **{part: dict(figures) for part, figures in counts.items()}, "total": total}
    lines = {f"{part} {name}": figures[name] for part, figures in [*counts.items(), ("all", total)] for name in names}
    return Report(value, figures_table(lines))


def answerer(model: str, out: Path, mesh: Mesh, dtype: str, chat: Any = None) -> tuple[Any, str]:
    """(who writes the answers that are evaluated, its name): MODEL in this process, or endpoint:NAME, whose answers are
    kept in ``out``. Raises: UsageError."""
    if model.startswith("endpoint:") and not Path(model).exists():
        judging = judge_of(model, out / "endpoint_answers.jsonl")
        return judging, judging.model
    from jaxsi.cli.stored import check_writes
    from jaxsi.lm import load
    from jaxsi.stages.verdicts import LocalWriter

    lm = load(model, mesh_for(model, mesh), dtype, chat=chat)
    check_writes(lm, model)
    return LocalWriter(lm), Path(model).name
