"""The responses of a MODEL that is evaluated: in a folder that goes on after a kill, and refuses other settings."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxsi.cli.arguments import ChatOptions
from jaxsi.cli.command import UsageError
from jaxsi.cli.eval_judge import Computing, check_counts
from jaxsi.cli.judges import judge_of
from jaxsi.cli.output_file import Parts, digest
from jaxsi.cli.stored import check_writes, mesh_for

Respond = Callable[[str, Sequence[Any], float], list[str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answering(Computing, ChatOptions):
    """How a model responds."""

    top_p: float = 0.9
    """Of the responses."""
    max_new_tokens: int = 1024
    """Most new tokens of a response."""
    seed: int = 0
    """Of the responses."""
    batch_size: int = 64
    """Rows generated at the same time."""


def name_of(model: str, chosen: str | None = None) -> str:
    """A model's name in tables: the one that the user gives, else the end of its path or hub name."""
    if chosen is None and is_endpoint(model):
        return model.partition(":")[2].partition(",")[0]
    return chosen or Path(model.rstrip("/")).name


def is_endpoint(model: str) -> bool:
    """Whether MODEL is endpoint:NAME, and no path."""
    return model.startswith("endpoint:") and not Path(model).exists()


def responses_of(model: str, prompts: Sequence[Any], args: Answering, folder: Path, temperature: float) -> list[str]:
    """A response to each prompt, as `responding`."""
    with responding(model, prompts, args, folder, temperature) as respond:
        return respond("responses", prompts, temperature)


@contextlib.contextmanager
def responding(
    model: str, prompts: Sequence[Any], args: Answering, folder: Path, temperature: float | None
) -> Iterator[Respond]:
    """Gives a function (name of the part, prompts, temperature) of the responses' texts, without thoughts. MODEL is one
    of this process, or endpoint:NAME. ``prompts`` is all that is asked, apart from earlier responses; ``temperature``
    is None if it differs between them.

    ``folder`` is a run directory: a command that is killed goes on there, and one with other prompts, another model or
    other settings is refused. Its config has the chat template.

    Raises: RunConfigError, UsageError, and those of loading and sampling.
    """
    from jaxsi.runs.records import Response
    from jaxsi.runs.run import Run
    from jaxsi.sampling.generate import SamplingConfig

    check_counts(batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    settings: dict[str, Any] = {
        "temperature": temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
    }  # fmt: skip
    try:
        SamplingConfig(**settings | {"temperature": temperature or 0.0}, num_samples=1, dtype=args.dtype)
    except ValueError as error:
        raise UsageError(str(error)) from error
    asked = digest(prompts, "prompts")
    who = (_endpoint if is_endpoint(model) else _local)(model, args, settings, folder)
    who.check(prompts)  # before the folder keeps these settings
    parts = Parts(prompts=asked, responses=None, model=who.identity, settings=settings | who.settings, seed=args.seed)
    with Run.open(folder, parts) as run:
        scope = run.at("answers")

        def respond(name: str, prompts: Sequence[Any], temperature: float) -> list[str]:
            def sample(part: Sequence[Any]) -> list[Response]:
                return who.sample(part, temperature)

            who.check(prompts)
            records = scope.sharded(name, prompts, sample, of=Response, by=who.by, shard_size=args.batch_size)
            return [response.text for response in records]

        yield respond


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Who:
    """Who responds: its identity, settings of its own, the model for `Scope.sharded`, and how it samples. ``check``
    refuses prompts before any is sampled."""

    identity: str
    settings: dict[str, Any]
    by: Any
    check: Callable[[Sequence[Any]], None]
    sample: Callable[[Sequence[Any], float], list[Any]]


def _local(model: str, args: Answering, settings: dict[str, Any], folder: Path) -> _Who:
    from jaxsi.lm import load
    from jaxsi.model.compute_dtype import settled
    from jaxsi.sampling.generate import generate
    from jaxsi.stages.answers import with_room

    dtype = settled({"settings": {"dtype": args.dtype}}, folder)["settings"]["dtype"]
    lm = load(model, mesh_for(model, args.mesh), dtype, chat=args.model_chat)
    check_writes(lm, model)

    def check(prompts: Sequence[Any]) -> None:
        fitting = {prompt.id for prompt in with_room(lm, prompts, args.max_new_tokens)}
        _check_room([prompt.id for prompt in prompts if prompt.id not in fitting], model, args)

    def sample(part: Sequence[Any], temperature: float) -> list[Any]:
        return generate(lm, part, seed=args.seed, **settings | {"temperature": temperature})

    own = {"dtype": dtype, "template": lm.template_hash, "chat": lm.tokenizer.chat_template}
    return _Who(identity=lm.fingerprint, settings=own, by=lm, check=check, sample=sample)


def _endpoint(model: str, args: Answering, settings: dict[str, Any], folder: Path) -> _Who:
    """What an endpoint answered is kept beside ``folder``, even if the responses are refused later."""
    import jax

    from jaxsi.stages.verdicts import JudgeConfig

    if args.model_chat is not None:
        raise UsageError(f"--chat.*: {model} has its own chat template; leave these options out")
    writer = judge_of(model, folder.parent / "endpoint_answers.jsonl")

    def sample(part: Sequence[Any], temperature: float) -> list[Any]:
        cfg = JudgeConfig(num_samples=1, **settings | {"temperature": temperature})
        written = writer.write(part, cfg, jax.random.key(args.seed), 1, first=args.seed)
        _check_room([prompt.id for prompt in part if prompt.id not in written], model, args)
        return [written[prompt.id][0] for prompt in part]

    own = {"sends_temperature": writer.sends_temperature}
    return _Who(identity=f"endpoint:{writer.model}", settings=own, by=None, check=lambda prompts: None, sample=sample)


def _check_room(too_long: Sequence[str], model: str, args: Answering) -> None:
    """Raises: EvaluationError: if prompts have no room in the model's context."""
    if too_long:
        from jaxsi.evals.answer_cache import EvaluationError

        raise EvaluationError(
            f"prompt {too_long[0]!r:.80} and --max-new-tokens {args.max_new_tokens} do not fit into the context of "
            f"{model} ({len(too_long)} such prompts); give fewer new tokens (in another folder, if there are responses "
            "in this one), or a model with a longer context"
        )
