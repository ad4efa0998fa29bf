"""``jaxsi bench generate``, ``score`` and ``train``: speed of one model, alone or against transformers."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxsi.cli.bench import made_by
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.models import Dtype, KVCache, Model
from jaxsi.cli.stored import Mesh, mesh_for
from jaxsi.cli.tables import figures_table

COMMON = """MODEL is what `jaxsi generate` takes, or random weights of a shape: s (32M), l (153M), qwen3-0.6b,
llama-1b, llama-3-8b. Rates are median [least..most] (how many); the first call, which compiles, is not among them. The
ceilings, bytes/s and FLOP/s of matrix products, are measured in the same run.

--against hf lets transformers (torch) do the same on the same weights and token ids: what comes out is compared first,
then the two take turns, and ratios above 1 say that jaxsi is the faster. On a GPU set
XLA_PYTHON_CLIENT_PREALLOCATE=false, or JAX leaves it no memory."""

GENERATE = f"""Speed of generation: prompts of random tokens, and outputs of given lengths.

{COMMON}

Examples:
  jaxsi bench generate s --dtype float32
  jaxsi bench generate Qwen/Qwen3-0.6B --prompts 256 --stop-lengths lognormal:10:128:48
  jaxsi bench generate s --judge 4:3:512 --against hf --hf-batching continuous
  jaxsi bench generate s --against hf --hf-cache static --hf-compile"""

SCORE = f"""Speed of scoring: log-probabilities of all tokens of given texts.

{COMMON}

Examples:
  jaxsi bench score s --dtype float32
  jaxsi bench score runs/toy --batch 8 --length 256 --against hf --hf-compile"""

TRAIN = f"""Speed of training steps, supervised or DPO with the reference's log-probabilities given. Weights and moments
are float32, --dtype is that of the computation; what --remat computes again is not counted as work. --against trl lets
TRL's trainers take the steps.

{COMMON}

Examples:
  jaxsi bench train s --dtype float32
  jaxsi bench train l --objective dpo --batch 8 --length 256 --remat none
  jaxsi bench train s --dtype float32 --against hf --hf-compile"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    model: Model
    prompts: int = 32
    """With --judge: instructions."""
    prompt_length: str = "16:128"
    """Tokens of a prompt, LOW:HIGH, drawn evenly."""
    new: int = 128
    """New tokens of each row."""
    stop_lengths: str | None = None
    """lognormal:LOW:HIGH:MEAN: each row ends at a length of its own, the same on both sides, in place of --new."""
    judge: str | None = None
    """N:K:RUBRIC: the prompts are a rubric of so many tokens, an instruction and one of its N responses; K outputs of
    each."""
    share: bool = True
    """Computes what prompts begin with in common once; --no-share shows what that is worth."""
    batch_size: int = 32
    """Rows in the making at a time, on both sides."""
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.9
    cache: KVCache = "exact"
    """Keys and values: exact in --dtype, or int8; ours alone."""
    dtype: Dtype = "bfloat16"
    reps: int = 5
    seed: int = 0
    """Of prompts and lengths."""
    against: Literal["hf"] | None = None
    pairs: int = 5
    """Turns of each side."""
    hf_cache: Literal["dynamic", "static"] = "dynamic"
    hf_batching: Literal["static", "continuous"] = "static"
    hf_compile: bool = False
    """torch.compile, of static caches or of continuous batching."""
    hf_page: int = 256
    """Tokens of a page of the continuous cache; beginnings are shared in whole pages."""
    mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    model: Model
    batch: int = 8
    """Rows of a batch."""
    length: int = 256
    """Tokens of a row."""
    steps: int = 4
    """Batches of a repetition."""
    dtype: Dtype = "bfloat16"
    reps: int = 5
    seed: int = 0
    against: Literal["hf"] | None = None
    pairs: int = 5
    """Turns of each side."""
    hf_compile: bool = False
    mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    model: Model
    objective: Literal["sft", "dpo"] = "sft"
    batch: int = 8
    """Rows of a batch; for dpo two are a pair."""
    length: int = 256
    """Tokens of a row."""
    steps: int = 4
    """Optimizer steps of a repetition."""
    remat: Literal["none", "products", "full"] = "full"
    """What the backward pass computes again: nothing, all but the products with weights, or whole layers (torch: whole
    layers where it is not none)."""
    dtype: Dtype = "bfloat16"
    reps: int = 5
    seed: int = 0
    against: Literal["hf", "trl"] | None = None
    pairs: int = 5
    """Turns of each side."""
    hf_compile: bool = False
    mesh: Mesh = Mesh()


def generate(argv: list[str]) -> Report:
    """Speed of generation."""
    args = parse(Generate, argv, "jaxsi bench generate", GENERATE)
    _check(args)
    if args.hf_compile and args.against and (args.hf_cache, args.hf_batching) == ("dynamic", "static"):
        raise UsageError("--hf-compile: a dynamic cache is never compiled; add --hf-cache static")
    from jaxsi.perf import bench_speed
    from jaxsi.perf.bench_shapes import model_to_measure
    from jaxsi.perf.bench_work import WorkError, generate_work, read_judge, read_lengths, read_range

    try:
        asked: dict[str, Any] = {
            "prompts": args.prompts,
            "prompt_length": read_range(args.prompt_length, "--prompt-length"),
            "new": args.new,
            "stop_lengths": None if args.stop_lengths is None else read_lengths(args.stop_lengths),
            "judge": None if args.judge is None else read_judge(args.judge),
            "slots": args.batch_size,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "seed": args.seed,
        }
    except WorkError as error:
        raise UsageError(str(error)) from error
    conditions = _conditions("generate", argv)
    lm = model_to_measure(args.model, mesh_for(args.model, args.mesh), args.dtype, args.dtype)
    work = dataclasses.replace(generate_work(lm.config, **asked), cache=args.cache)
    work = work if args.share else work.apart()
    value = bench_speed.measure_generate(lm, work, args.reps)
    if args.against is not None:
        from jaxsi.perf.bench_against import Options, against_generate

        options = Options(cache=args.hf_cache, batching=args.hf_batching, compile=args.hf_compile, page=args.hf_page)
        value["against"] = _in_folder(lambda folder: against_generate(lm, work, options, args.pairs, folder))
    return _report(args, lm, value | conditions)


def score(argv: list[str]) -> Report:
    """Speed of scoring."""
    args = parse(Score, argv, "jaxsi bench score", SCORE)
    _check(args)
    from jaxsi.perf import bench_speed
    from jaxsi.perf.bench_shapes import model_to_measure
    from jaxsi.perf.bench_work import texts

    conditions = _conditions("score", argv)
    lm = model_to_measure(args.model, mesh_for(args.model, args.mesh), args.dtype, args.dtype)
    rows = texts(lm.config, args.batch * args.steps, args.length, args.seed)
    value = bench_speed.measure_score(lm, rows, args.batch, args.reps)
    if args.against is not None:
        from jaxsi.perf.bench_against import Options, against_score

        options = Options(compile=args.hf_compile)
        value["against"] = _in_folder(lambda to: against_score(lm, rows, args.batch, options, args.pairs, to))
    return _report(args, lm, value | conditions)


def train(argv: list[str]) -> Report:
    """Speed of training steps."""
    args = parse(Train, argv, "jaxsi bench train", TRAIN)
    _check(args)
    from jaxsi.perf import bench_speed
    from jaxsi.perf.bench_shapes import model_to_measure
    from jaxsi.perf.bench_work import texts

    conditions = _conditions("train", argv)
    lm = model_to_measure(args.model, mesh_for(args.model, args.mesh), args.dtype, "float32")
    work = bench_speed.TrainWork(
        objective=args.objective, rows=texts(lm.config, args.batch, args.length, args.seed), dtype=args.dtype,
        remat=args.remat, steps=args.steps,
    )  # fmt: skip
    value = bench_speed.measure_train(lm, work, args.reps)
    if args.against is not None:
        from jaxsi.perf.bench_against import Options
        from jaxsi.perf.bench_against_train import against_train, against_trl

        options = Options(compile=args.hf_compile)
        play = against_trl if args.against == "trl" else against_train
        value["against"] = _in_folder(lambda folder: play(lm, work, options, args.pairs, folder))
    return _report(args, lm, value | conditions)


def _check(args: Any) -> None:
    """What is wrong without a look at the model."""
    if args.reps < 1 or args.pairs < 1:
        raise UsageError(f"--reps {args.reps} --pairs {args.pairs}: each is at least 1")
    if not isinstance(args, Generate) and min(args.batch, args.steps, args.length - 1) < 1:
        raise UsageError(
            f"--batch {args.batch} --steps {args.steps} --length {args.length}: at least 1, 1 and 2 tokens"
        )
    if isinstance(args, Train) and args.objective == "dpo" and args.batch % 2:
        raise UsageError(f"--batch {args.batch} rows are no pairs for dpo; give an even number")


def _conditions(name: str, argv: list[str]) -> dict[str, Any]:
    """What the figures depend on, and how busy the machine was before."""
    import os

    from jaxsi.perf.bench_against import cores

    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return made_by(" ".join([f"jaxsi bench {name}", *argv])) | {"cores": cores(), "load_before": busy}


def _in_folder(play: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="jaxsi-bench-") as folder:
        return play(Path(folder) / "model")


def _report(args: Any, lm: Any, value: Mapping[str, Any]) -> Report:
    from jaxsi.model.decoder import count_parameters

    value = {"model": args.model, "parameters": count_parameters(lm.config), "dtype": args.dtype, **value}
    return Report(value, figures_table(dict(_lines(value))))


def _lines(value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The figures as they are read: spreads in one cell, seconds, shares and bytes with their units."""
    shown = []
    for name, figure in value.items():
        label = name.replace("_per_second", "/s").replace("_", " ")
        if name == "against":
            shown += [(f"{figure['opponent'].split()[0]} {label}", cell) for label, cell in _lines(figure)]
        elif name == "peak_memory":
            shown.append((label, f"{figure['bytes'] / 1e9:.3g} GB, {figure['of']}"))
        elif isinstance(figure, dict) and set(figure) == {"median", "min", "max", "n"}:
            shown.append((label, f"{figure['median']:.4g} [{figure['min']:.4g}..{figure['max']:.4g}] ({figure['n']})"))
        elif name == "ceilings":
            shown.append(("bandwidth", f"{figure['bandwidth'] / 1e9:.4g} GB/s"))
            for part, words in (("gemm_rows", "products of these rows"), ("gemm_peak", "best products")):
                shown.append((words, f"{figure[part] / 1e9:.4g} GFLOP/s"))
        elif isinstance(figure, dict):
            shown.append((label, _listed(figure)))
        else:
            shown.append((label, figure))
    return shown


def _listed(figures: Mapping[str, Any]) -> str:
    parts = []
    for name, value in figures.items():
        shown = _listed(value) if isinstance(value, dict) else f"{value:.3g}" if isinstance(value, float) else value
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return ", ".join(parts)
