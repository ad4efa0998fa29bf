"""``jaxsi bench``: the speed of one model (``generate``, ``score``, ``train``), alone or against transformers; and
``bench methods``, the table of all methods."""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxsi.cli.arguments import FixedDtype, KVCache, Model
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.stored import Mesh, mesh_for
from jaxsi.cli.tables import figures_table

COMMON = """MODEL is anything that `jaxsi generate` takes, or a shape with random weights: s (32M), l (153M),
qwen3-0.6b, llama-1b, llama-3-8b. Rates are shown as median [least..most] (repetitions); the first call, which compiles,
is not counted. The ceilings (bytes/s of memory, FLOP/s of matrix products) are measured in the same run.

--against hf lets transformers (torch) do the same work on the same weights and token ids. First the results are
compared, then the two take turns; a ratio above 1 means that jaxsi is faster. On a GPU set
XLA_PYTHON_CLIENT_PREALLOCATE=false, or JAX leaves torch no memory."""

GENERATE = f"""Speed of generation, from prompts of random tokens to outputs of fixed lengths.

{COMMON}

Examples:
  jaxsi bench generate s --dtype float32
  jaxsi bench generate Qwen/Qwen3-0.6B --prompts 256 --stop-lengths lognormal:10:128:48
  jaxsi bench generate s --judge 4:3:512 --against hf --hf-batching continuous
  jaxsi bench generate s --against hf --hf-cache static --hf-compile"""

SCORE = f"""Speed of scoring: the log-probabilities of all tokens of random texts.

{COMMON}

Examples:
  jaxsi bench score s --dtype float32
  jaxsi bench score runs/toy --batch 8 --length 256 --against hf --hf-compile"""

TRAIN = f"""Speed of training steps: supervised, or DPO with precomputed log-probabilities of the reference. Weights and
moments are float32; --dtype is the dtype of the computation. Recomputation by --remat is not counted as work.
--against trl lets TRL's trainers take the steps.

{COMMON}

Examples:
  jaxsi bench train s --dtype float32
  jaxsi bench train l --objective dpo --batch 8 --length 256 --remat none
  jaxsi bench train s --dtype float32 --against hf --hf-compile"""

METHODS = """Compares all methods on the embedded world, over several seeds. Each method has three arms: the method
itself, its control without a signal, and the exact grader in place of its judge or reward model. --ablations adds what
the papers leave out, for one seed. Every run resumes, and so does the whole bench; stages that arms have in common are
computed once. Writes table.json, table.md and, with matplotlib, quality.png and quality.svg.

Examples:
  jaxsi bench methods
  jaxsi bench methods --methods srt pit --seeds 1 --arms method exact --run-dir runs/quick
  jaxsi bench methods --ablations"""

# method -> the config files of its arms, in configs/<method>/
ARMS = {
    "self_rewarding": {
        "method": "toy.py",
        "control": "toy_permuted.py",
        "exact": "toy_exact.py",
        "paper loss": "toy_paper_loss.py",
    },
    "srt": {"method": "toy.py", "control": "toy_coin.py", "exact": "toy_exact.py"},
    "seft": {"method": "toy.py", "control": "toy_coin.py", "exact": "toy_exact.py"},
    "pit": {"method": "toy.py", "control": "toy_permuted.py", "exact": "toy_exact.py"},
    "spin": {"method": "toy.py"},
    "grpo": {"method": "toy.py", "control": "toy_permuted.py", "exact": "toy_exact.py"},
    "online_dpo": {"method": "toy.py", "control": "toy_permuted.py", "exact": "toy_exact.py"},
    "cream": {"method": "toy.py", "control": "toy_permuted.py", "exact": "toy_exact.py"},
    "temporal": {"method": "toy.py", "control": "toy_permuted.py", "exact": "toy_exact.py"},
    "meta_rewarding": {"method": "toy.py", "control": "toy_permuted.py", "exact": "toy_exact.py"},
}
ARM_NAMES = ("method", "control", "exact", "paper loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    model: Model
    prompts: int = 32
    """With --judge: the number of instructions."""
    prompt_length: str = "16:128"
    """LOW:HIGH tokens of a prompt, drawn uniformly."""
    new: int = 128
    """New tokens of each row."""
    stop_lengths: str | None = None
    """lognormal:LOW:HIGH:MEAN instead of --new: each row ends at its own length, the same on both sides."""
    judge: str | None = None
    """N:K:RUBRIC: each prompt is a rubric of RUBRIC tokens, an instruction and one of its N responses; K outputs for
    each prompt."""
    share: bool = True
    """Compute prefixes that prompts share only once; --no-share shows how much that saves."""
    batch_size: int = 32
    """Rows generated at the same time, on both sides."""
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.9
    cache: KVCache = "exact"
    """Keys and values: exact in --dtype, or int8. The opponent's cache stays exact."""
    dtype: FixedDtype = "bfloat16"
    reps: int = 5
    seed: int = 0
    """Seed of the prompts and lengths."""
    against: Literal["hf"] | None = None
    pairs: int = 5
    """Turns of each side."""
    hf_cache: Literal["dynamic", "static"] = "dynamic"
    hf_batching: Literal["static", "continuous"] = "static"
    hf_compile: bool = False
    """Use torch.compile; needs a static cache or continuous batching."""
    hf_page: int = 256
    """Tokens in a page of the continuous cache; only whole pages of a prefix are shared."""
    mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    model: Model
    batch: int = 8
    """Rows in a batch."""
    length: int = 256
    """Tokens in a row."""
    steps: int = 4
    """Batches in a repetition."""
    dtype: FixedDtype = "bfloat16"
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
    """Rows in a batch; for dpo two rows are a pair."""
    length: int = 256
    """Tokens in a row."""
    steps: int = 4
    """Optimizer steps in a repetition."""
    remat: Literal["none", "products", "full"] = "full"
    """What the backward pass recomputes: nothing, everything except products with weights, or whole layers. Torch
    recomputes whole layers for both "products" and "full"."""
    dtype: FixedDtype = "bfloat16"
    reps: int = 5
    seed: int = 0
    against: Literal["hf", "trl"] | None = None
    pairs: int = 5
    """Turns of each side."""
    hf_compile: bool = False
    mesh: Mesh = Mesh()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Methods:
    methods: tuple[str, ...] = tuple(ARMS)
    seeds: int = 3
    """Seeds 0, 1, ... of each arm."""
    arms: tuple[str, ...] = ARM_NAMES
    ablations: bool = False
    """Also run the configs of toy_ablations.py, with seed 0."""
    run_dir: Path = Path("runs/bench")
    """Holds <method>/<arm>/<seed>, the tables and the figure."""
    configs: Path = Path("configs")
    """The folder that holds a folder of configs for each method."""


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
        options: dict[str, Any] = {
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
    work = dataclasses.replace(generate_work(lm.config, **options), cache=args.cache)
    work = work if args.share else work.apart()
    value = bench_speed.measure_generate(lm, work, args.reps)
    if args.against is not None:
        from jaxsi.perf.bench_against import Options, against_generate

        opponent = Options(cache=args.hf_cache, batching=args.hf_batching, compile=args.hf_compile, page=args.hf_page)
        value["against"] = _in_folder(lambda folder: against_generate(lm, work, opponent, args.pairs, folder))
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
        value["against"] = _in_folder(lambda folder: against_score(lm, rows, args.batch, options, args.pairs, folder))
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
        objective=args.objective,
        rows=texts(lm.config, args.batch, args.length, args.seed),
        dtype=args.dtype,
        remat=args.remat,
        steps=args.steps,
    )
    value = bench_speed.measure_train(lm, work, args.reps)
    if args.against is not None:
        from jaxsi.perf.bench_against import Options
        from jaxsi.perf.bench_against_train import against_train, against_trl

        options = Options(compile=args.hf_compile)
        compare = against_trl if args.against == "trl" else against_train
        value["against"] = _in_folder(lambda folder: compare(lm, work, options, args.pairs, folder))
    return _report(args, lm, value | conditions)


def methods(argv: list[str]) -> Report:
    """The table of methods x arms x seeds."""
    args = parse(Methods, argv, "jaxsi bench methods", METHODS)
    if args.seeds < 1 or not args.arms or set(args.arms) - set(ARM_NAMES) or set(args.methods) - set(ARMS):
        raise UsageError(
            f"--seeds {args.seeds} --arms {' '.join(args.arms)} --methods {' '.join(args.methods)}: give at least 1 "
            f"seed, arms of {', '.join(ARM_NAMES)}, methods of {', '.join(ARMS)}"
        )
    from jaxsi.runs.config_file import load_config, load_configs
    from jaxsi.runs.metrics import table
    from jaxsi.toyworld.methods_table import Arm, bench_methods, judge_rows_of, rows_of

    arms = []
    for method in args.methods:
        for name, file in ARMS[method].items():
            if name in args.arms:
                arms.append(Arm(method, name, load_config(args.configs / method / file), tuple(range(args.seeds))))
        ablations = args.configs / method / "toy_ablations.py"
        if args.ablations and ablations.exists():
            arms += [Arm(method, name, cfg, (0,)) for name, cfg in load_configs(ablations).items()]
    args.run_dir.mkdir(parents=True, exist_ok=True)
    value = bench_methods(args.run_dir, arms, _provenance(" ".join(["jaxsi bench methods", *argv])))
    lines = [table(rows_of(value)), ""]
    if judged := judge_rows_of(value):
        lines += ["The models as judges of human rankings:", table(judged), ""]
    for claim in value["claims"]:
        lines.append("{0}: {method}: {claim}: {measured}".format("held" if claim["held"] else "NOT HELD", **claim))
    if importlib.util.find_spec("matplotlib") is None:
        lines.append("matplotlib is not installed, so no figure was drawn: pip install 'jaxsi[plots]'")
    else:
        from jaxsi.toyworld.methods_plot import plot

        files = [args.run_dir / "quality.png", args.run_dir / "quality.svg"]
        plot(value, files)
        lines.append(f"figure: {files[0]}")
    return Report(value | {"run_dir": str(args.run_dir)}, "\n".join(lines))


def _check(args: Any) -> None:
    """Refuses arguments that are wrong for every model. Raises: UsageError."""
    if args.reps < 1 or args.pairs < 1:
        raise UsageError(f"--reps {args.reps} --pairs {args.pairs}: each must be at least 1")
    if not isinstance(args, Generate) and min(args.batch, args.steps, args.length - 1) < 1:
        raise UsageError(
            f"--batch {args.batch} --steps {args.steps} --length {args.length}: the least are 1, 1 and 2 tokens"
        )
    if isinstance(args, Train) and args.objective == "dpo" and args.batch % 2:
        raise UsageError(f"dpo needs an even --batch, because two rows are a pair; got {args.batch}")


def _conditions(name: str, argv: list[str]) -> dict[str, Any]:
    """The conditions of the measurement, and how busy the machine was before it."""
    import os

    from jaxsi.perf.bench_against import cores

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return _provenance(" ".join([f"jaxsi bench {name}", *argv])) | {"cores": cores(), "load_before": load}


def _provenance(command: str) -> dict[str, str]:
    """The command, commit, versions and devices that produced the figures."""
    import platform

    import jax

    from jaxsi.runs import provenance

    return {
        "command": command,
        "commit": provenance.commit() or "not in a repository",
        "versions": f"JAX {jax.__version__}, Python {platform.python_version()}",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _in_folder(compare: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Calls ``compare`` with a temporary folder for the exported model."""
    with tempfile.TemporaryDirectory(prefix="jaxsi-bench-") as folder:
        return compare(Path(folder) / "model")


def _report(args: Any, lm: Any, value: Mapping[str, Any]) -> Report:
    from jaxsi.model.decoder import count_parameters

    value = {"model": args.model, "parameters": count_parameters(lm.config), "dtype": args.dtype, **value}
    return Report(value, figures_table(dict(_lines(value))))


def _lines(value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The rows of the table: a spread in one cell, and units for bytes, rates and FLOP/s."""
    lines: list[tuple[str, Any]] = []
    for name, figure in value.items():
        label = name.replace("_per_second", "/s").replace("_", " ")
        if name == "against":
            lines += [(f"{figure['opponent'].split()[0]} {label}", cell) for label, cell in _lines(figure)]
        elif name == "peak_memory":
            lines.append((label, f"{figure['bytes'] / 1e9:.3g} GB, {figure['of']}"))
        elif isinstance(figure, dict) and set(figure) == {"median", "min", "max", "n"}:
            lines.append((label, f"{figure['median']:.4g} [{figure['min']:.4g}..{figure['max']:.4g}] ({figure['n']})"))
        elif name == "ceilings":
            lines.append(("bandwidth", f"{figure['bandwidth'] / 1e9:.4g} GB/s"))
            for part, words in (("gemm_rows", "products of these rows"), ("gemm_peak", "best products")):
                lines.append((words, f"{figure[part] / 1e9:.4g} GFLOP/s"))
        elif isinstance(figure, dict):
            lines.append((label, _listed(figure)))
        else:
            lines.append((label, figure))
    return lines


def _listed(figures: Mapping[str, Any]) -> str:
    parts = []
    for name, value in figures.items():
        shown = _listed(value) if isinstance(value, dict) else f"{value:.3g}" if isinstance(value, float) else value
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return ", ".join(parts)
