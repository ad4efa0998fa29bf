"""What evaluations ask of a judge on the command line: who judges, how, how often, and where its answers are kept."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxsi.cli.arguments import Dtype
from jaxsi.cli.command import UsageError
from jaxsi.cli.judges import is_judge, judge_of
from jaxsi.cli.stored import Mesh, check_writes, mesh_for

JUDGED = """Each answer of the judge is written to DIR/judge_answers.jsonl (--cache FILE) before it is used, by judge,
template, seed and content. If the command is killed, run it again: nothing is sampled or judged twice, and rows that
failed are asked again. Several commands may share one FILE at the same time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computing:
    """How models in this process compute."""

    dtype: Dtype = "auto"
    """Of the computation. auto: bfloat16 if this device computes in it at speed, else float32. A command that goes on
    keeps the dtype with which its responses and its judgments began."""
    mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedBy(Computing):
    """Who judges."""

    judge: str | None = None
    """A model, or another judge: self, model:, endpoint:, reward:, function:, verifier:."""
    judge_temperature: float = 0.0
    judge_tokens: int = 256
    """Most new tokens of a judgment."""
    judge_seeds: int = 1
    """Judge this many times, with other noise of the judge, and other coins for the order of responses where coins
    decide it. Prints how far the figures lie apart."""
    judge_batch: int = 16
    """Questions to the judge at a time. A kill loses at most one such part."""
    cache: Path | None = None
    """The file of the judge's answers. Default: judge_answers.jsonl in --out."""
    dry_run: bool = False
    """Only print how many calls and tokens it would take, from above. The judge's answers in the cache are not counted;
    of a MODEL, no response counts as there."""

    def judge_config(self, **changes: Any) -> Any:
        """How a judge's texts are sampled. Raises: UsageError."""
        from jaxsi.stages.verdicts import JudgeConfig

        check_counts(judge_seeds=self.judge_seeds, judge_batch=self.judge_batch, judge_tokens=self.judge_tokens)
        settings: dict[str, Any] = {"num_samples": 1, "temperature": self.judge_temperature, "top_p": 1.0}
        settings |= {"max_new_tokens": self.judge_tokens, "batch_size": self.judge_batch}
        try:
            return JudgeConfig(**(settings | changes))
        except ValueError as error:
            raise UsageError(f"--judge-...: {error}") from error

    def named_judge(self, model: str | None, out: Path) -> "NamedJudge":
        """The judge that --judge names; ``self`` is ``model``. Nothing is loaded yet. ``out`` is the folder for the
        answers of an endpoint.

        Raises: UsageError: if it names none.
        """
        word = self.judge
        if word is None:
            raise UsageError("--judge is missing; name who judges: a model, or another kind of --help")
        if word == "self":
            if model is None:
                raise UsageError("--judge self: there is no MODEL here; name the model that judges")
            word = model
        name = word if is_judge(word) else f"model:{word}"
        return NamedJudge(judge_of(word, out / "endpoint_answers.jsonl"), name.partition(",")[0])

    def bound_judge(self, named: "NamedJudge", out: Path) -> Any:
        """The judge, with its model loaded: of a model the writer of its texts, else the judge by its name.

        Raises: UsageError, and those of loading.
        """
        from jaxsi.lm import load
        from jaxsi.stages.judges import ModelJudge
        from jaxsi.stages.verdicts import LocalWriter

        judging = named.judging
        if isinstance(judging, ModelJudge):
            dtype = kept_dtype(self._answers(out)) if self.dtype == "auto" else self.dtype
            lm = load(judging.model, mesh_for(judging.model, self.mesh), dtype)
            check_writes(lm, judging.model)
            return LocalWriter(lm)
        return judging

    def answer_cache(self, out: Path) -> Any:
        """The file of the judge's answers. Raises: EvaluationError: if it cannot be used."""
        from jaxsi.evals.answer_cache import AnswerCache

        return AnswerCache(self._answers(out))

    def _answers(self, out: Path) -> Path:
        return self.cache or out / "judge_answers.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedByRubric(JudgedBy):
    """Who judges, and by which rubric."""

    rubric: str | None = None
    """The name of a shipped rubric, or a file."""
    judge_samples: int = 1
    """Judgments of each response, or of each pair in each order; the score is the mean of the valid ones."""
    expected: bool = False
    """Weigh all possible verdicts by their probabilities, in place of the one that the judge wrote."""

    def rubric_config(self, rubric: Any) -> Any:
        """How verdicts by ``rubric`` are sampled. Raises: UsageError."""
        from jaxsi.stages.prompts.comparison import RankingRubric

        check_counts(judge_samples=self.judge_samples)
        if self.expected and isinstance(rubric, RankingRubric):
            raise UsageError(
                f"--expected: the rubric {rubric.name} ranks, which gives no expected scores; leave it out"
            )
        return self.judge_config(num_samples=self.judge_samples, expected=self.expected)


@dataclasses.dataclass(frozen=True)
class NamedJudge:
    """A judge by its word: the function of all judges, which loads its model when it is called, and its name."""

    judging: Any
    name: str

    @property
    def file_name(self) -> str:
        """endpoint:gpt-4o -> gpt-4o, model:folder/judge -> judge."""
        return file_name(Path(self.name.partition(":")[2]).name)

    def check_writes(self) -> None:
        """Raises: UsageError: if it writes no text, such as a reward model or a function."""
        from jaxsi.stages.endpoint import EndpointJudge
        from jaxsi.stages.judges import ModelJudge

        if not isinstance(self.judging, ModelJudge | EndpointJudge):
            raise UsageError(
                f"--judge {self.name} writes no text, which this evaluation needs; name a model or endpoint:NAME"
            )


def kept_dtype(answers: Path) -> str:
    """What "auto" means for a judge whose answers are in this file: the dtype that was measured by the first command,
    kept in ANSWERS.dtype. Another one would be another judge, and measuring again may give another one: it depends on
    what else the machine does."""
    import sys

    from jaxsi.model.compute_dtype import fast_dtype
    from jaxsi.runs.first_process import from_first
    from jaxsi.runs.progress import processes
    from jaxsi.runs.records import write_atomically

    file = answers.with_name(f"{answers.name}.dtype")
    kept: str = from_first(lambda: file.read_text("utf-8").strip() if file.is_file() else "")
    if kept in ("bfloat16", "float32"):
        print(f"dtype auto: {kept}, as the judge's answers began", file=sys.stderr, flush=True)
        return kept
    dtype = fast_dtype()
    if processes()[0] == 0:
        write_atomically(file, [f"{dtype}\n".encode()])
    return dtype


def check_counts(**counts: int | None) -> None:
    """Raises: UsageError: if a count is below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def file_name(name: str) -> str:
    """The name of a model or judge as that of a file or folder."""
    return name.replace("/", "_").replace("@", "_at_")
