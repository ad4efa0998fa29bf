"""``jaxsi generate``, ``jaxsi judge`` and ``jaxsi export``: one model, files in, files out."""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tyro

from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.stored import Mesh, mesh_for, stored_config, stored_value
from jaxsi.cli.tables import figures_table
from jaxsi.runs.progress import processes

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Out = Annotated[Path, tyro.conf.arg(aliases=["-o"])]
Dtype = Literal["bfloat16", "float32", "float16"]
KVCache = Literal["exact", "int8"]
CHUNK = 256  # prompts or responses in a part: what a kill loses at most
Made = TypeVar("Made")

GENERATE = """Samples responses to the prompts of a file (JSONL with "prompt" or "messages", and optionally "id").
Finished parts are kept in OUT.shards/ until OUT is there: the same command goes on where a killed one stopped.

Examples:
  jaxsi generate runs/toy@3 --prompts prompts.jsonl -o responses.jsonl --num-samples 4
  jaxsi generate Qwen/Qwen3-0.6B --prompts prompts.jsonl -o out.jsonl --temperature 0 --max-new-tokens 512"""

JUDGE = """Lets MODEL judge responses (as `jaxsi generate` writes them): justification and score, several times each.
Finished parts are kept in OUT.shards/ until OUT is there: the same command goes on where a killed one stopped.

Examples:
  jaxsi judge runs/toy@3 --responses responses.jsonl --prompts prompts.jsonl -o judgments.jsonl
  jaxsi judge MODEL --responses responses.jsonl --prompts prompts.jsonl -o judgments.jsonl --expected"""

EXPORT = """Writes a Hugging Face folder: safetensors, config, generation config, tokenizer, chat template, model card.

Examples:
  jaxsi export runs/toy exported/toy
  jaxsi export runs/toy@2 exported/toy-2 --dtype float32"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    model: Model
    prompts: Path
    """JSONL (or .json, .gz) file of prompts."""
    out: Out
    """The responses, one JSON object a line."""
    num_samples: int = 1
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.9
    top_k: int = 0
    """0 is off."""
    max_new_tokens: int = 256
    seed: int = 0
    dtype: Dtype = "bfloat16"
    max_prompts: int | None = None
    """Only the first prompts of the file."""
    batch_size: int = 64
    """Rows in flight at a time; does not change the responses in float32, in bfloat16 they are the same in distribution
    only."""
    cache: KVCache = "exact"
    """Keys and values: exact in --dtype, or int8, half of bfloat16 and not the same responses."""
    mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    model: Model
    responses: Path
    """Responses as `jaxsi generate` writes them."""
    prompts: Path
    """The prompts they answer."""
    out: Out
    """The judgments, one JSON object a line."""
    rubric: str | None = None
    """A shipped rubric's name, or a text file with {prompt} and {response} in it; default: the run's own where MODEL is
    in a run, else self_rewarding_judge."""
    num_samples: int = 3
    """Judgments of each response; the score is the mean of the valid ones."""
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256
    expected: bool = False
    """Score by the expectation over the score strings in place of the number that was written."""
    seed: int = 0
    dtype: Dtype = "bfloat16"
    mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    model: Model
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A folder that does not exist yet."""
    dtype: Dtype = "bfloat16"
    mesh: Mesh = Mesh()


def generate(argv: list[str]) -> Report:
    """Samples responses to a file of prompts."""
    args = parse(Generate, argv, "jaxsi generate", GENERATE)
    _check_out(args.out)
    from jaxsi.cli.preflight import check_lengths
    from jaxsi.lm import load
    from jaxsi.runs.records import Prompt, Response, read_prompts
    from jaxsi.sampling import generate as sampling

    prompts = read_prompts(args.prompts, args.max_prompts)
    settings: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("num_samples", "temperature", "top_p", "top_k", "max_new_tokens", "batch_size", "cache")
    }
    try:
        sampling.SamplingConfig(**settings, dtype=args.dtype)
    except ValueError as error:
        raise UsageError(str(error)) from error
    lm = load(args.model, mesh_for(args.model, args.mesh), args.dtype)
    limit = lm.config.max_positions - args.max_new_tokens
    why = f"the model has {lm.config.max_positions} positions, of which --max-new-tokens takes {args.max_new_tokens}"
    check_lengths(args.prompts, prompts, lm.tokenizer, limit, why)
    began = time.monotonic()
    sampled = 0  # tokens, by this command: a part may be of one before it

    def sample(part: Sequence[Prompt]) -> list[Response]:
        nonlocal sampled
        made = sampling.generate(lm, part, seed=args.seed, **settings)
        sampled += sum(len(response.token_ids) for response in made)
        return made

    parts = Parts(
        prompts=_digest(prompts), responses=None, model=lm.fingerprint, settings=settings | {"dtype": args.dtype},
        seed=args.seed,
    )  # fmt: skip
    responses = _in_parts(args.out, parts, prompts, sample, of=Response)
    seconds = time.monotonic() - began
    tokens = sum(len(response.token_ids) for response in responses)
    value = {
        "out": str(args.out),
        "prompts": len(prompts),
        "responses": len(responses),
        "tokens": tokens,
        "mean_length": tokens / len(responses),
        "cut_off": sum(response.finish_reason == "length" for response in responses),
        "seconds": round(seconds, 3),
        "tokens_per_second": sampled / seconds,
    }
    return Report(value, figures_table(value))


def judge(argv: list[str]) -> Report:
    """Judges responses."""
    args = parse(Judge, argv, "jaxsi judge", JUDGE)
    _check_out(args.out)
    import jax

    from jaxsi.lm import load
    from jaxsi.runs.records import Judgment, RecordError, Response, read_jsonl, read_prompts
    from jaxsi.stages import judge as feedback

    cfg = _judge_config(args)
    prompts = read_prompts(args.prompts)
    responses = read_jsonl(args.responses, Response)
    known = {prompt.id for prompt in prompts}
    for line, response in enumerate(responses, start=1):
        if response.prompt_id not in known:
            raise RecordError(
                args.responses, line, f"prompt {response.prompt_id!r} is not in {args.prompts}; give its file"
            )
    if not responses:
        raise RecordError(args.responses, None, "no responses in this file; jaxsi generate writes them")
    rubric = _rubric(args.rubric, args.model)
    lm = load(args.model, mesh_for(args.model, args.mesh), args.dtype)
    began = time.monotonic()
    parts = Parts(
        prompts=_digest(prompts), responses=_digest(responses), model=lm.fingerprint,
        settings={"rubric": rubric, "judge": cfg, "dtype": args.dtype}, seed=args.seed,
    )  # fmt: skip

    def judged(part: Sequence[Response]) -> list[Judgment]:
        return feedback.judge(lm, prompts, part, rubric, cfg, jax.random.key(args.seed))

    judgments = _in_parts(args.out, parts, responses, judged, of=Judgment)
    statistics = feedback.judgment_statistics(judgments, low=rubric.low, high=rubric.high)
    value = {"out": str(args.out), "rubric": rubric.name, **statistics, "seconds": round(time.monotonic() - began, 3)}
    if statistics["unscored"] == len(judgments):
        value["warning"] = (
            "not one verdict could be read: this model writes no scores under this rubric; --expected needs none, and "
            "--max-new-tokens may be too small"
        )
    return Report(value, figures_table({name: figure for name, figure in value.items() if name != "histogram"}))


def export(argv: list[str]) -> Report:
    """Writes a Hugging Face folder."""
    args = parse(Export, argv, "jaxsi export", EXPORT)
    from jaxsi import lm as lmlib
    from jaxsi.model.decoder import count_parameters

    lm = lmlib.load(args.model, mesh_for(args.model, args.mesh), args.dtype, weights_dtype="float32")
    card = f"""# {args.out.name}

Exported by jaxsi from `{args.model}` (weights {lm.fingerprint}) in {args.dtype}.

* architecture: {lm.config.family}, {count_parameters(lm.config):,} parameters, {lm.config.max_positions} positions
* made by a self-improvement method from another model: that model's licence and limits hold for this one too
"""
    lmlib.export(lm, args.out, dtype=args.dtype, extras=lambda folder: _write(folder / "README.md", card))
    files = sorted(path.name for path in args.out.iterdir())
    value = {"out": str(args.out), "dtype": args.dtype, "fingerprint": lm.fingerprint, "files": files}
    return Report(value, figures_table(value | {"files": ", ".join(files)}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What decides the parts of a file on its way, in their folder's config.json: the same command goes on in it,
    another is refused. ``prompts`` and ``responses`` are digests of their contents, ``model`` is a fingerprint."""

    prompts: str
    responses: str | None
    model: str
    settings: dict[str, Any]
    seed: int

    RESUMABLE: ClassVar[frozenset[str]] = frozenset({"settings.batch_size"})


def _in_parts(
    out: Path, parts: Parts, items: Sequence[Any], stage: Callable[[Sequence[Any]], Iterable[Made]], of: type[Made]
) -> list[Made]:
    """``stage`` of all items, in OUT. Parts of CHUNK items are kept beside it, and go when it is complete."""
    from jaxsi.runs.config_snapshot import RunConfigError
    from jaxsi.runs.records import write_jsonl
    from jaxsi.runs.run import Run

    folder = out.with_name(f"{out.name}.shards")
    try:
        run = Run.open(folder, parts)
    except RunConfigError as error:
        raise RunConfigError(
            f"{folder} holds parts of {out.name} from a command with other settings (only settings.batch_size may "
            "change); give the stored ones, give another --out, or delete that folder. Stored -> given:",
            error.differences,
        ) from None
    with run:
        made = run.at("parts").sharded("records", items, stage, of=of, shard_size=CHUNK)
        if processes()[0] == 0:
            write_jsonl(out, made)
    if processes()[0] == 0:
        shutil.rmtree(folder)
    return made


def _digest(records: Sequence[Any]) -> str:
    from jaxsi.runs.records import to_json

    rows = json.dumps([to_json(record) for record in records])
    return f"{len(records)} records, {hashlib.sha256(rows.encode()).hexdigest()[:16]}"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _check_out(out: Path) -> None:
    """Before the work, not after it."""
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of a file")


def _judge_config(args: Judge) -> Any:
    from jaxsi.stages.judge import JudgeConfig

    try:
        return JudgeConfig(
            num_samples=args.num_samples, temperature=args.temperature, top_p=args.top_p,
            max_new_tokens=args.max_new_tokens, expected=args.expected,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error


def _rubric(given: str | None, model: str) -> Any:
    from jaxsi.stages.prompts import Rubric, load_rubric

    if given is None:
        stored = stored_config(model)
        if stored is None or "rubric" not in stored:  # a run of a method without a judge
            return load_rubric()
        return stored_value(Rubric, stored["rubric"])
    path = Path(given)
    if path.is_file():
        return Rubric(name=path.stem, template=path.read_text(encoding="utf-8").removesuffix("\n"))
    return load_rubric(given)
