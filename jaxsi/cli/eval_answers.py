"""What commands of ``jaxsi eval`` share: a model's responses, in a folder that resumes, and a judge by its name."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsi.cli.arguments import ChatOptions, Dtype
from jaxsi.cli.command import UsageError
from jaxsi.cli.judge_options import new_folder
from jaxsi.cli.judges import is_judge, judge_of
from jaxsi.cli.output_file import Parts, digest
from jaxsi.cli.stored import Mesh, check_writes, mesh_for

JUDGED = """Each answer of the judge is written to DIR/judge_answers.jsonl (--cache FILE) before it is used, by judge,
template, seed and content. If the command is killed, run it again: nothing is sampled or judged twice, and rows that
failed are asked again. Several commands may share one FILE at the same time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering(ChatOptions):
    """How a model responds."""

    temperature: float = 0.7
    """Of the responses. 0 is greedy."""
    top_p: float = 0.9
    max_new_tokens: int = 1024
    """Most new tokens of a response."""
    seed: int = 0
    """Of the responses."""
    batch_size: int = 64
    """Rows generated at the same time."""
    dtype: Dtype = "auto"
    """Of the computation. auto: bfloat16 if this device computes in it at speed, else float32. A command that goes on
    keeps the dtype with which it began."""
    mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedBy:
    """Who judges."""

    judge: str | None = None
    """A model, or another judge: self, model:, endpoint:, reward:, function:, verifier:."""
    judge_seeds: int = 1
    """Judge this many times: by other coins for the order of the responses and other noise of the judge. Prints how far
    the figures lie apart."""
    judge_batch: int = 16
    """Questions to the judge at a time. A kill loses at most one such part."""
    cache: Path | None = None
    """The file of the judge's answers. Default: judge_answers.jsonl in --out."""
    dry_run: bool = False
    """Only print how many calls and tokens the judge would take. The answers in the cache are not counted."""


def check_counts(**counts: int | None) -> None:
    """Raises: UsageError: if a count is below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def make_folder(out: Path | None, why: str) -> Path:
    """The folder of a command's results, made if need be. Raises: UsageError: if it was not given, or is a file."""
    if out is None:
        raise UsageError(f"{why} needs a folder: -o DIR")
    return new_folder(out)


def name_of(model: str, chosen: str | None = None) -> str:
    """A model's name in tables: the one that the user gives, else the end of its path or hub name."""
    return chosen or Path(model.rstrip("/")).name


def responses_of(model: str, prompts: Sequence[Any], args: Answering, folder: Path) -> list[Any]:
    """A response to each prompt. ``folder`` is a run directory: a command that is killed goes on there, and one with
    other prompts, another model or other settings is refused. Its config has the chat template.

    Raises: RunConfigError, UsageError, and those of loading and sampling.
    """
    from jaxsi.lm import load
    from jaxsi.model.compute_dtype import settled
    from jaxsi.runs.records import Response
    from jaxsi.runs.run import Run
    from jaxsi.sampling.generate import SamplingConfig, generate

    settings = {
        "temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
    }  # fmt: skip
    try:
        SamplingConfig(**settings, num_samples=1, dtype=args.dtype)
    except ValueError as error:
        raise UsageError(str(error)) from error
    dtype = settled({"settings": {"dtype": args.dtype}}, folder)["settings"]["dtype"]
    lm = load(model, mesh_for(model, args.mesh), dtype, chat=args.model_chat)
    check_writes(lm, model)
    parts = Parts(
        prompts=digest(prompts, "prompts"),
        responses=None,
        model=lm.fingerprint,
        settings=settings | {"dtype": dtype, "template": lm.template_hash, "chat": lm.tokenizer.chat_template},
        seed=args.seed,
    )

    def sample(part: Sequence[Any]) -> list[Response]:
        return generate(lm, part, seed=args.seed, **settings)

    with Run.open(folder, parts) as run:
        return run.at("answers").sharded("responses", prompts, sample, of=Response, by=lm, shard_size=args.batch_size)


@dataclasses.dataclass(frozen=True)
class BoundJudge:
    """A judge as a function, its writer if it writes texts, and its name."""

    judging: Any
    writer: Any
    name: str


def bound_judge(word: str, model: str | None, args: Answering, answers: Path) -> BoundJudge:
    """The judge that a word names; ``self`` is ``model``. ``answers`` is the file for those of an endpoint.

    Raises: UsageError: if it names none.
    """
    import functools

    from jaxsi.lm import load
    from jaxsi.stages.endpoint import EndpointJudge
    from jaxsi.stages.judge import judge as by_itself
    from jaxsi.stages.judges import ModelJudge
    from jaxsi.stages.verdicts import LocalWriter

    if word == "self":
        if model is None:
            raise UsageError("--judge self: there is no MODEL here; name the model that judges")
        word = f"model:{model}"
    judging = judge_of(word, answers)
    name = word if is_judge(word) else f"model:{word}"
    if isinstance(judging, ModelJudge):
        lm = load(judging.model, mesh_for(judging.model, args.mesh), args.dtype)
        check_writes(lm, judging.model)
        return BoundJudge(_Bound(functools.partial(by_itself, lm)), LocalWriter(lm), name)
    return BoundJudge(judging, judging if isinstance(judging, EndpointJudge) else None, name.partition(",")[0])


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A judge of one model, in the form of all judges: the model that is judged does not judge."""

    function: Any

    def __call__(self, lm: Any, *rest: Any) -> Any:
        return self.function(*rest)


def spreads(figures: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """How far figures of several seeds lie apart: {name: {"mean", "sd", "low", "high"}}."""
    from jaxsi.evals.alpaca_eval import spread

    return {
        name: spread([one[name] for one in figures])
        for name in names
        if all(isinstance(one.get(name), int | float) for one in figures)
    }
