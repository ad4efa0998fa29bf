"""What a config needs of a topology that is not here: every program compiled ahead of time (TPUs, with libtpu) or
estimated by arithmetic (GPUs), its memory, its time by the roofline, and what an iteration of the method takes.

    plan(cfg, topology("v5p:4x4x4"), Assumed())

The roofline time of a program is the longest of three: its FLOPs at the chip's peak, the bytes of its memory traffic
at the memory's rate, and the bytes a chip sends at the rate of its links; none of them is reached in practice, so hours
are a lower bound. MFU is the model's own FLOPs (nothing computed again) over what the chips could do in that time.
"""

import concurrent.futures
import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.decoder import ModelConfig
from jaxsi.model.mesh import MeshConfig
from jaxsi.perf import estimates, hlo_cost
from jaxsi.perf.hlo_cost import Cost
from jaxsi.perf.method_stages import Assumed, Held, Sampling, Scoring, Stage, Training, iterations, stages
from jaxsi.perf.programs import (
    MOVE,
    Memory,
    Program,
    Sizes,
    memory_of,
    sampling_programs,
    tpu_devices,
    training_programs,
)
from jaxsi.perf.topologies import Topology
from jaxsi.runs.config_snapshot import parts_of
from jaxsi.runs.progress import progress
from jaxsi.sampling.engine import CHUNK, few, fitting, power
from jaxsi.sampling.generate import bucket
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig

COMPILERS = 2  # programs compiled at a time: a 70B's takes 2 to 5 GiB of memory
SAMPLING = (MOVE, "prefill", "extend", "extend in place", "first tokens", "fill", "refill", "grow", "shrink", "decode")
Architectures = Callable[[str], ModelConfig]


class Shape(NamedTuple):
    """A program by what it is compiled for: equal ones are compiled once."""

    name: str
    config: ModelConfig
    sizes: Sizes


class Made(NamedTuple):
    """A program compiled, or estimated (``compile_seconds`` None). ``memory`` None: the compiler refused it, by
    ``refusal``, for lack of memory."""

    memory: Memory | None
    cost: Cost | None
    compile_seconds: float | None = None
    refusal: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A program of a stage on one chip. ``gib``: what it takes, ``held_gib``: models beside it. ``seconds``: of a call,
    for "decode" of a step. ``flops`` of all chips. ``calls`` in the stage."""

    stage: Stage
    name: str
    shape: Shape
    made: Made
    held_gib: float
    gib: float
    fits: bool
    flops: float
    seconds: float
    bound: str
    mfu: float | None
    calls: float

    @property
    def size(self) -> tuple[bool, float]:
        """By which rows are compared: what the compiler refused is larger than all that it did not."""
        return self.made.refusal is not None, self.gib + self.held_gib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    topology: Topology
    mesh: tuple[int, int, int]
    config: ModelConfig
    rows: list[Row]
    stages: list[Stage]
    iterations: int
    advice: list[str]
    compiled: bool
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return all(row.fits for row in self.rows)

    def seconds_of(self, stage: Stage) -> float:
        return sum(row.seconds * row.calls for row in self.rows if row.stage is stage)

    @property
    def hours_once(self) -> float:
        return sum(self.seconds_of(stage) for stage in self.stages if not stage.each) / 3600

    @property
    def hours(self) -> float:
        """Of one iteration."""
        return sum(self.seconds_of(stage) for stage in self.stages if stage.each) / 3600

    @property
    def parameters(self) -> int:
        return decoder.count_parameters(self.config)

    @property
    def checkpoint_gib(self) -> float:
        """Of an iteration: float32 weights and two moments."""
        return 12 * self.parameters / 2**30


def plan(
    cfg: Any, topology: Topology, assumed: Assumed, architectures: Architectures, *,
    mesh: MeshConfig | None = None, compiled: bool = True,
) -> Plan:  # fmt: skip
    """The plan of a method's config on a topology.

    Args:
      architectures: the ModelConfig of a MODEL. mesh: in place of the config's. compiled: by the TPU's compiler; GPUs
      are always estimated.

    Raises: MeshError: a mesh that does not fit the topology or the model.
    """
    config = architectures(cfg.model)
    compiled = compiled and topology.chip.kind == "tpu"
    mesh_ = mesh_of(mesh or cfg.mesh, topology, compiled=compiled)
    decoder.weight_shardings(config, mesh_)
    every = stages(cfg, assumed, config.max_positions, packs=topology.chip.kind != "gpu")
    asked = [(stage, *entry) for stage in every for entry in calls(stage, config, mesh_, architectures)]
    shapes = list(dict.fromkeys(shape for _, shape, _ in asked))
    began = time.monotonic()
    made = (compile_all if compiled else estimate_all)(shapes, mesh_)
    rows = [_row(stage, shape, n, made[shape], config, mesh_, topology) for stage, shape, n in asked]
    sizes = tuple(mesh_.shape[axis] for axis in meshlib.AXES)
    return Plan(
        topology=topology, mesh=(sizes[0], sizes[1], sizes[2]), config=config, rows=rows, stages=every,
        iterations=iterations(cfg), advice=advise(rows, config, mesh_, topology), compiled=compiled,
        compile_seconds=time.monotonic() - began,
    )  # fmt: skip


def mesh_of(config: MeshConfig, topology: Topology, *, compiled: bool) -> Any:
    """The mesh of a config on the topology's chips: for the compiler, or abstract."""
    if compiled:
        return meshlib.make_mesh(config, tpu_devices(topology.name))
    return AbstractMesh(meshlib.sizes(config, topology.chips), meshlib.AXES, axis_types=(AxisType.Auto,) * 3)


# --------------------------------------------------------------------------------------------------------------- calls


def calls(stage: Stage, config: ModelConfig, mesh: Any, architectures: Architectures) -> list[tuple[Shape, float]]:
    """The programs of a stage, and how often it calls each ("decode": steps)."""
    match stage:
        case Sampling():
            return _sampling_calls(stage, config if stage.model is None else architectures(stage.model), mesh)
        case Scoring():
            sizes = Sizes(score_rows=_rows(stage.batch_size, mesh), max_length=bucket(stage.length), dtype=stage.dtype)
            name, of = ("rewards", config) if stage.name.endswith("rewards") else ("score", config)
            return [(Shape(name, of, sizes), -(-stage.rows // sizes.score_rows))]
        case Training():
            return _training_calls(stage, config, mesh)
    raise TypeError(f"{type(stage)} is no stage")


def _rows(batch_size: int, mesh: Any) -> int:
    parts = meshlib.axis_size(mesh, "batch")
    return max(parts, batch_size // parts * parts)


def _sampling_calls(stage: Sampling, config: ModelConfig, mesh: Any) -> list[tuple[Shape, float]]:
    """As engine.run does it for one part of the stage's prompts, times the parts."""
    parts = meshlib.axis_size(mesh, "batch")
    in_call = min(stage.prompts, stage.at_once)
    times = stage.prompts / in_call
    responses = in_call * stage.samples
    slots = min(_rows(stage.batch_size, mesh), fitting(responses, parts))
    wave = fitting(min(-(-slots // stage.samples), in_call), parts)
    sizes = Sizes(
        slots=slots, wave=wave, prompt_length=stage.shared_tokens + stage.prompt_tokens,
        max_new_tokens=stage.new_tokens, dtype=stage.dtype, cache=stage.cache,
    )  # fmt: skip
    waves, chunks = -(-in_call // wave), -(-stage.prompt_tokens // CHUNK)
    free = few(slots, parts)
    counts = {
        MOVE: config.num_layers / times,
        "prefill": 1 if stage.shared_tokens else waves,
        "extend": waves if stage.shared_tokens else 0,
        "extend in place": waves * (chunks - 1),
        "first tokens": responses / slots,
        "fill": 1,
        "refill": max(0, responses - slots) / free,
        "grow": max(0, power(stage.new_tokens, 16).bit_length() - 7),
        "shrink": 2,
        "decode": max(stage.new_tokens, responses / slots * stage.new_tokens),
    }
    return [(Shape(name, config, _relevant(name, sizes)), n * times) for name, n in counts.items() if n]


def _relevant(name: str, sizes: Sizes) -> Sizes:
    """The sizes that a sampling program depends on; the others are the default, so that equal programs are equal."""
    prompt, new = power(sizes.prompt_length, 32), power(sizes.max_new_tokens, 16)
    every = {"slots": sizes.slots, "wave": sizes.wave, "prompt_length": prompt, "max_new_tokens": new}
    of = {
        MOVE: (),
        "prefill": ("wave",),
        "extend": ("wave", "prompt_length"),
        "extend in place": ("wave", "prompt_length"),
        "first tokens": ("wave", "slots"),
        "grow": ("slots", "prompt_length", "max_new_tokens"),
        "shrink": ("slots", "prompt_length", "max_new_tokens"),
        "decode": ("slots", "prompt_length", "max_new_tokens"),
    }.get(name, tuple(every))
    kept: dict[str, Any] = {field: every[field] for field in of}
    if name == "prefill":
        kept["prompt_length"] = min(CHUNK, prompt)
    return Sizes(dtype=sizes.dtype, cache=sizes.cache, **kept)


def _training_calls(stage: Training, config: ModelConfig, mesh: Any) -> list[tuple[Shape, float]]:
    part = stage.settings
    # Compiled, and held against the memory, at the longest rows there may be; most batches are shorter.
    longest = part.max_length if isinstance(part, TrainConfig) else bucket(stage.length)
    sizes = Sizes(
        batch_size=part.batch_size, accumulate=part.accumulate, max_length=longest, remat=part.remat, dtype=part.dtype,
        optim=part.optim,
    )  # fmt: skip
    part.check(mesh)
    steps = stage.steps * min(1.0, bucket(stage.length) / longest)
    made = [(Shape(stage.objective, config, sizes), steps)]
    if stage.objective == "dpo":
        made.insert(0, (Shape("reference", config, sizes), steps / part.epochs * part.accumulate))
    return made


# ------------------------------------------------------------------------------------------------------------ programs


def estimate_all(shapes: Sequence[Shape], mesh: Any) -> dict[Shape, Made]:
    """By arithmetic; what only moves rows about is left out."""
    made = {}
    for shape in shapes:
        try:
            made[shape] = Made(*estimates.estimate(shape.name, shape.config, mesh, shape.sizes))
        except KeyError:
            made[shape] = Made(None, None)
    return made


def compile_all(shapes: Sequence[Shape], mesh: Mesh) -> dict[Shape, Made]:
    """By the compiler of the mesh's devices, COMPILERS at a time, the longest first."""
    heavy = sorted(shapes, key=lambda shape: shape.name not in estimates.SEQUENCES)
    made = {}
    kept = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)  # which cannot load programs of chips that are not here
    try:
        with concurrent.futures.ThreadPoolExecutor(COMPILERS) as threads, progress("compiling", len(shapes)) as advance:
            waiting = {threads.submit(_compile, shape, mesh): shape for shape in heavy}
            try:
                for done in concurrent.futures.as_completed(waiting):
                    made[waiting[done]] = done.result()
                    advance(1, True)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)  # else the others are compiled first
                raise
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
    return made


def _compile(shape: Shape, mesh: Mesh) -> Made:
    began = time.monotonic()
    try:
        compiled = program_of(shape, mesh).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Made(None, None, time.monotonic() - began, refusal_of(str(error)))
    memory, text = memory_of(shape.name, compiled), compiled.as_text()
    return Made(memory, hlo_cost.read(text or ""), time.monotonic() - began)


def program_of(shape: Shape, mesh: Mesh) -> Program:
    family = sampling_programs if shape.name in SAMPLING else training_programs
    return family(shape.config, mesh, shape.sizes)[shape.name]


def refused_gib(refusal: str) -> float:
    """The GiB that a refusal names; 0 where it names none."""
    found = re.match(r"needs ([\d.]+)([KMGT])iB", refusal)
    return float(found[1]) * 1024.0 ** ("KMGT".index(found[2]) - 2) if found else 0.0


def refusal_of(message: str) -> str:
    """What the compiler says of memory: the sizes, where it gives them."""
    found = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
    if found is None:
        found = re.search(r"[Uu]sed ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", message)
    return f"needs {found[1]}iB of {found[2]}iB" if found else message.splitlines()[0][:160]


# --------------------------------------------------------------------------------------------------------------- rows


def _row(stage: Stage, shape: Shape, n: float, made: Made, config: ModelConfig, mesh: Any, topology: Topology) -> Row:
    held = held_gib(stage.held, config, mesh, shape.sizes.dtype)
    if shape.name == MOVE:  # beside the copies of the layers before it; the model itself is its argument
        held += estimates.sampling_gib(shape.config, mesh, shape.sizes.dtype)
        held = max(0.0, held - estimates.canonical_gib(shape.config, mesh))
    taken = made.memory.total if made.memory is not None else refused_gib(made.refusal or "")
    cost = made.cost or Cost()
    times = roofline(cost, topology, mesh)
    seconds = max(times.values())
    useful = estimates.model_flops(shape.name, shape.config, shape.sizes)
    peak = topology.chip.flops * mesh.size
    return Row(
        stage=stage, name=shape.name, shape=shape, made=made, held_gib=held, gib=taken,
        fits=made.refusal is None and held + taken <= topology.chip.usable_gib, flops=cost.flops * mesh.size,
        seconds=seconds, bound=max(times, key=times.__getitem__) if seconds else "-",
        mfu=useful / (peak * seconds) if useful and seconds else None, calls=n,
    )  # fmt: skip


def roofline(cost: Cost, topology: Topology, mesh: Any) -> dict[str, float]:
    """Seconds that a program's FLOPs, memory traffic and messages take, each at the chip's best rate; GPUs of several
    hosts send over the network."""
    return {
        "compute": cost.flops / topology.chip.flops,
        "memory": cost.hbm_bytes / topology.chip.bandwidth,
        "interconnect": cost.wire_bytes / topology.wire(mesh.size),
    }


def held_gib(held: Held, config: ModelConfig, mesh: Any, dtype: str) -> float:
    """Of a chip."""
    models = held.models * estimates.canonical_gib(config, mesh)
    return models + (held.copies * estimates.sampling_gib(config, mesh, dtype) if held.copies else 0)


# -------------------------------------------------------------------------------------------------------------- advice


def advise(rows: Sequence[Row], config: ModelConfig, mesh: Any, topology: Topology) -> list[str]:
    """What does not fit, of each stage its largest program, and the smallest change that would make it fit."""
    worst: dict[str, Row] = {}
    for row in rows:
        before = worst.get(row.stage.name)
        if not row.fits and (before is None or row.size > before.size):
            worst[row.stage.name] = row
    said: dict[str, list[str]] = {}
    for row in worst.values():
        said.setdefault(_remedy(row, config, mesh, topology), []).append(_excess(row))
    room = f"{topology.chip.usable_gib:.1f} GiB of a {topology.chip.name}"
    return [f"{', '.join(names)}, of {room}. {remedy}" for remedy, names in said.items()]


def _excess(row: Row) -> str:
    held = f" with {row.held_gib:.1f} of other models" if row.held_gib >= 0.05 else ""
    if row.made.refusal is not None:
        return f"{row.stage.name}: {row.name} {row.made.refusal}{held and ' beside' + held.removeprefix(' with')}"
    return f"{row.stage.name}: {row.name} takes {row.gib + row.held_gib:.1f} GiB{held}"


def _remedy(row: Row, config: ModelConfig, mesh: Any, topology: Topology) -> str:
    if row.name in estimates.SEQUENCES:
        return _remedy_of_training(row, mesh, topology)
    room, tensor, most = topology.chip.usable_gib, mesh.shape["tensor"], config.num_kv_heads
    sizes, shards = row.shape.sizes, mesh.shape["fsdp"] * mesh.shape["tensor"]
    if row.held_gib > 0.7 * room and row.name != MOVE:
        return (
            f"Models that the method holds meanwhile take most of it, cut over fsdp x tensor = {shards}: take "
            f"{power(int(row.held_gib * mesh.size / (0.5 * room)) + 1, 1)} chips of this kind, or more fsdp."
        )
    if row.name in estimates.FORWARD:
        rows, length, _ = estimates.forward_rows(row.name, sizes)
        setting = "raise that training's accumulate" if row.name == "reference" else "lower that batch"
        return f"{rows} rows of {length} tokens are scored at a time: {setting}, or raise fsdp or tensor."
    copy = estimates.sampling_gib(row.shape.config, mesh, sizes.dtype)
    if copy + row.held_gib > 0.8 * room:
        fitting_ones = [t for t in range(tensor + 1, most + 1) if most % t == 0 and copy * tensor / t < 0.6 * room]
        way = f"tensor = {fitting_ones[0]} would do" if fitting_ones else (
            f"tensor = {most}, the most that {most} kv heads allow, is too little: take chips with more memory"
        )  # fmt: skip
        return f"Weights for sampling lie whole on each tensor = {tensor} chips, {copy:.1f} GiB of each: {way}."
    return (
        f"The cache of {sizes.slots} slots takes the room: lower batch_size or max_new_tokens of that stage, take "
        f'cache "int8", or raise tensor (at most {most}).'
    )


def _remedy_of_training(row: Row, mesh: Any, topology: Topology) -> str:
    room = 0.95 * topology.chip.usable_gib - row.held_gib
    sizes, shards = row.shape.sizes, mesh.shape["fsdp"] * mesh.shape["tensor"]

    def total(**changes: Any) -> float:
        changed = dataclasses.replace(sizes, **changes)
        return estimates.estimate(row.name, row.shape.config, mesh, changed)[0].total

    weights = estimates.canonical_gib(row.shape.config, mesh)
    state = weights * ((1 if sizes.optim.offload else 3) + (2 if sizes.accumulate > 1 else 1))
    if state + row.held_gib > 0.85 * topology.chip.usable_gib:
        everything = (state + row.held_gib) * shards
        chips = power(int(everything / (0.6 * topology.chip.usable_gib)) + 1, 1)
        rest = (
            "" if sizes.optim.offload else "; optim.offload, which keeps the moments in the hosts' memory, takes less"
        )
        return (
            f"Weights, gradients, moments and the other models take {state + row.held_gib:.1f} GiB of a chip over "
            f"fsdp x tensor = {shards}: they need some {chips} chips of this kind{rest}."
        )
    parts = meshlib.axis_size(mesh, "batch")
    accumulate = sizes.accumulate
    while sizes.batch_size % (2 * accumulate * parts) == 0:
        accumulate *= 2
        if total(accumulate=accumulate) < room:
            return f"Activations take the room: accumulate = {accumulate} would do (it is {sizes.accumulate})."
    if sizes.remat != "full" and total(remat="full", accumulate=accumulate) < room:
        return f'Activations take the room: remat "full" with accumulate = {accumulate} would do.'
    length = sizes.max_length
    while length > 256 and total(max_length=length, accumulate=accumulate, remat="full") > room:
        length //= 2
    return (
        f"Activations take the room even with accumulate = {accumulate}: raise tensor, or lower max_length to some "
        f"{length} (it is {sizes.max_length})."
    )


# -------------------------------------------------------------------------------------------------------------- search


def meshes(cfg: Any, config: ModelConfig, topology: Topology) -> list[MeshConfig]:
    """Every mesh of the topology that the model's dimensions and the config's batches divide by."""
    found = []
    n = topology.chips
    for tensor in (t for t in range(1, n + 1) if n % t == 0):
        for fsdp in (f for f in range(1, n // tensor + 1) if n // tensor % f == 0):
            mesh = MeshConfig(data=n // tensor // fsdp, fsdp=fsdp, tensor=tensor)
            abstract = mesh_of(mesh, topology, compiled=False)
            try:
                decoder.weight_shardings(config, abstract)
                for _, part in parts_of(cfg):
                    if isinstance(part, TrainConfig | RLConfig):
                        part.check(abstract)
            except meshlib.MeshError:
                continue
            found.append(mesh)
    return found


def search(
    cfg: Any, topology: Topology, assumed: Assumed, architectures: Architectures, *, compiled: bool = True,
    tries: int = 3,
) -> list[tuple[MeshConfig, Plan]]:  # fmt: skip
    """Every mesh with its plan by arithmetic, those that fit first, the fastest before the others; on a TPU the first
    ``tries`` of these are then compiled, until one fits, and the order is of what was found.

    Raises: MeshError: no mesh of the topology divides the model and the batches.
    """
    config = architectures(cfg.model)
    candidates = meshes(cfg, config, topology)
    if not candidates:
        raise meshlib.MeshError(
            f"no mesh of {topology.chips} chips divides the model's heads ({config.num_heads}, {config.num_kv_heads} "
            "of keys) and the config's batches (batch_size / accumulate by data x fsdp); change one of them"
        )
    make = lambda mesh, how: plan(cfg, topology, assumed, architectures, mesh=mesh, compiled=how)  # noqa: E731
    by_time = lambda entry: (not entry[1].fits, entry[1].hours + entry[1].hours_once / max(1, entry[1].iterations))  # noqa: E731
    plans = sorted(((mesh, make(mesh, False)) for mesh in candidates), key=by_time)
    if not compiled or topology.chip.kind != "tpu":
        return plans
    for number, (mesh, estimated) in enumerate(plans[:tries]):
        if estimated.fits:
            plans[number] = mesh, make(mesh, True)
            if plans[number][1].fits:
                break
    return sorted(plans, key=lambda entry: (not (entry[1].compiled and entry[1].fits), by_time(entry)))
