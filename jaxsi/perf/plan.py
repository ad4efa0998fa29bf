"""What a config needs on hardware that this machine does not have: the memory and roofline time of every program, and
the time of an iteration. Programs are compiled ahead of time (TPUs, with libtpu) or estimated by arithmetic (GPUs).

    plan(cfg, topology("v5p:4x4x4"), Assumptions(), architectures)

The roofline time of a program is the longest of three: its FLOPs at the chip's peak, its memory traffic at the memory's
rate, and the bytes that a chip sends at the rate of its links. Practice reaches none of these rates, so hours are a
lower bound. MFU is the model's own FLOPs, without recomputation, over the FLOPs that the chips could do in that time.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.decoder import ModelConfig
from jaxsi.model.mesh import MeshConfig
from jaxsi.perf import estimates
from jaxsi.perf.builds import Build, Shape, compile_all, estimate_all, refused_gib
from jaxsi.perf.hlo_cost import Cost
from jaxsi.perf.method_stages import iterations, stages
from jaxsi.perf.planned_stages import Assumptions, Held, Sampling, Scoring, Stage, Training
from jaxsi.perf.programs import MOVE, Sizes, tpu_devices
from jaxsi.perf.topologies import Topology
from jaxsi.runs.config_snapshot import parts_of
from jaxsi.sampling.engine import CHUNK, padded_rows, power, refill_threshold
from jaxsi.sampling.generate import bucket
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig

Architectures = Callable[[str], ModelConfig]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A program of a stage on one chip. ``gib``: memory of the program; ``held_gib``: memory of other models at that
    time. ``seconds``: time of a call (for "decode", of a step). ``flops``: of all chips. ``calls``: in the stage."""

    stage: Stage
    name: str
    shape: Shape
    build: Build
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
        """Orders rows by size. A program that the compiler refused is larger than any that it did not."""
        return self.build.refusal is not None, self.gib + self.held_gib


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
        """Hours of one iteration."""
        return sum(self.seconds_of(stage) for stage in self.stages if stage.each) / 3600

    @property
    def parameters(self) -> int:
        return decoder.count_parameters(self.config)

    @property
    def checkpoint_gib(self) -> float:
        """The checkpoint of an iteration: float32 weights and two moments."""
        return 12 * self.parameters / 2**30


def plan(
    cfg: Any,
    topology: Topology,
    assumptions: Assumptions,
    architectures: Architectures,
    *,
    mesh: MeshConfig | None = None,
    compiled: bool = True,
) -> Plan:
    """The plan of a method's config on a topology.

    Args:
      architectures: gives the ModelConfig of a MODEL. mesh: replaces the config's mesh. compiled: use the TPU's
      compiler; GPUs are always estimated.

    Raises: MeshError: if the mesh does not fit the topology or the model.
    """
    config = architectures(cfg.model)
    compiled = compiled and topology.chip.kind == "tpu"
    device_mesh = mesh_of(mesh or cfg.mesh, topology, compiled=compiled)
    decoder.weight_shardings(config, device_mesh)
    all_stages = stages(cfg, assumptions, config.max_positions)
    all_calls = [(stage, *call) for stage in all_stages for call in calls(stage, config, device_mesh, architectures)]
    shapes = list(dict.fromkeys(shape for _, shape, _ in all_calls))
    start = time.monotonic()
    builds = (compile_all if compiled else estimate_all)(shapes, device_mesh)
    rows = [_row(stage, shape, n, builds[shape], config, device_mesh, topology) for stage, shape, n in all_calls]
    data, fsdp, tensor = (device_mesh.shape[axis] for axis in meshlib.AXES)
    return Plan(
        topology=topology,
        mesh=(data, fsdp, tensor),
        config=config,
        rows=rows,
        stages=all_stages,
        iterations=iterations(cfg),
        advice=advise(rows, config, device_mesh, topology),
        compiled=compiled,
        compile_seconds=time.monotonic() - start,
    )


def mesh_of(config: MeshConfig, topology: Topology, *, compiled: bool) -> Any:
    """The mesh of a config on the topology's chips: a real one for the compiler, else an abstract one."""
    if compiled:
        return meshlib.make_mesh(config, tpu_devices(topology.name))
    return AbstractMesh(meshlib.sizes(config, topology.chips), meshlib.AXES, axis_types=(AxisType.Auto,) * 3)


# --------------------------------------------------------------------------------------------------------------- calls


def calls(stage: Stage, config: ModelConfig, mesh: Any, architectures: Architectures) -> list[tuple[Shape, float]]:
    """The programs of a stage, and how often the stage calls each (for "decode", the number of steps)."""
    match stage:
        case Sampling():
            return _sampling_calls(stage, config if stage.model is None else architectures(stage.model), mesh)
        case Scoring():
            sizes = Sizes(score_rows=_rows(stage.batch_size, mesh), max_length=bucket(stage.length), dtype=stage.dtype)
            name = "rewards" if stage.name.endswith("rewards") else "score"
            return [(Shape(name, config, sizes), -(-stage.rows // sizes.score_rows))]
        case Training():
            return _training_calls(stage, config, mesh)
    raise TypeError(f"{type(stage)} is not a stage; give Sampling, Scoring or Training")


def _rows(batch_size: int, mesh: Any) -> int:
    parts = meshlib.axis_size(mesh, "batch")
    return max(parts, batch_size // parts * parts)


def _sampling_calls(stage: Sampling, config: ModelConfig, mesh: Any) -> list[tuple[Shape, float]]:
    """The calls of engine.run for as many prompts as it takes at once, multiplied by the number of its runs."""
    parts = meshlib.axis_size(mesh, "batch")
    in_call = min(stage.prompts, stage.at_once)
    runs = stage.prompts / in_call
    responses = in_call * stage.samples
    slots = min(_rows(stage.batch_size, mesh), padded_rows(responses, parts))
    wave = padded_rows(min(-(-slots // stage.samples), in_call), parts)
    sizes = Sizes(
        slots=slots,
        wave=wave,
        prompt_length=stage.shared_tokens + stage.prompt_tokens,
        max_new_tokens=stage.new_tokens,
        dtype=stage.dtype,
        cache=stage.cache,
    )
    waves, chunks = -(-in_call // wave), -(-stage.prompt_tokens // CHUNK)
    free = refill_threshold(slots, parts)
    counts = {
        MOVE: config.num_layers / runs,
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
    return [(Shape(name, config, _relevant(name, sizes)), n * runs) for name, n in counts.items() if n]


def _relevant(name: str, sizes: Sizes) -> Sizes:
    """The sizes that a sampling program depends on; the others have their defaults, so that equal programs compare
    equal."""
    prompt, new = power(sizes.prompt_length, 32), power(sizes.max_new_tokens, 16)
    rounded = {"slots": sizes.slots, "wave": sizes.wave, "prompt_length": prompt, "max_new_tokens": new}
    fields = {
        MOVE: (),
        "prefill": ("wave",),
        "extend": ("wave", "prompt_length"),
        "extend in place": ("wave", "prompt_length"),
        "first tokens": ("wave", "slots"),
        "grow": ("slots", "prompt_length", "max_new_tokens"),
        "shrink": ("slots", "prompt_length", "max_new_tokens"),
        "decode": ("slots", "prompt_length", "max_new_tokens"),
    }.get(name, tuple(rounded))
    relevant: dict[str, Any] = {field: rounded[field] for field in fields}
    if name == "prefill":
        relevant["prompt_length"] = min(CHUNK, prompt)
    return Sizes(dtype=sizes.dtype, cache=sizes.cache, **relevant)


def _training_calls(stage: Training, config: ModelConfig, mesh: Any) -> list[tuple[Shape, float]]:
    part = stage.settings
    # Compiled for the longest rows that may occur, because these must fit in the memory; most batches are shorter.
    longest = part.max_length if isinstance(part, TrainConfig) else bucket(stage.length)
    sizes = Sizes(
        batch_size=part.batch_size,
        accumulate=part.accumulate,
        max_length=longest,
        remat=part.remat,
        dtype=part.dtype,
        optim=part.optim,
    )
    part.check(mesh)
    steps = stage.steps * min(1.0, bucket(stage.length) / longest)
    training = (Shape(stage.objective, config, sizes), steps)
    if stage.objective != "dpo":
        return [training]
    return [(Shape("reference", config, sizes), steps / part.epochs * part.accumulate), training]


# --------------------------------------------------------------------------------------------------------------- rows


def _row(stage: Stage, shape: Shape, n: float, build: Build, config: ModelConfig, mesh: Any, topology: Topology) -> Row:
    held = held_gib(stage.held, config, mesh, shape.sizes.dtype)
    if shape.name == MOVE:  # the last layer finds the copies of all others; the model itself is an argument
        held += estimates.sampling_gib(shape.config, mesh, shape.sizes.dtype)
        held = max(0.0, held - estimates.canonical_gib(shape.config, mesh))
    gib = build.memory.total if build.memory is not None else refused_gib(build.refusal or "")
    cost = build.cost or Cost()
    times = roofline(cost, topology, mesh)
    seconds = max(times.values())
    useful = estimates.model_flops(shape.name, shape.config, shape.sizes)
    peak = topology.chip.flops * mesh.size
    return Row(
        stage=stage,
        name=shape.name,
        shape=shape,
        build=build,
        held_gib=held,
        gib=gib,
        fits=build.refusal is None and held + gib <= topology.chip.usable_gib,
        flops=cost.flops * mesh.size,
        seconds=seconds,
        bound=max(times, key=times.__getitem__) if seconds else "-",
        mfu=useful / (peak * seconds) if useful and seconds else None,
        calls=n,
    )


def roofline(cost: Cost, topology: Topology, mesh: Any) -> dict[str, float]:
    """Seconds for a program's FLOPs, memory traffic and messages, each at the chip's best rate. GPUs on several hosts
    send over the network."""
    return {
        "compute": cost.flops / topology.chip.flops,
        "memory": cost.hbm_bytes / topology.chip.bandwidth,
        "interconnect": cost.wire_bytes / topology.wire(mesh.size),
    }


def held_gib(held: Held, config: ModelConfig, mesh: Any, dtype: str) -> float:
    """GiB that held models take on each chip."""
    models = held.models * estimates.canonical_gib(config, mesh)
    return models + (held.copies * estimates.sampling_gib(config, mesh, dtype) if held.copies else 0)


# -------------------------------------------------------------------------------------------------------------- advice


def advise(rows: Sequence[Row], config: ModelConfig, mesh: Any, topology: Topology) -> list[str]:
    """The largest program of each stage that does not fit, with the smallest change that would make it fit."""
    worst: dict[str, Row] = {}
    for row in rows:
        before = worst.get(row.stage.name)
        if not row.fits and (before is None or row.size > before.size):
            worst[row.stage.name] = row
    excesses: dict[str, list[str]] = {}  # by remedy
    for row in worst.values():
        excesses.setdefault(_remedy(row, config, mesh, topology), []).append(_excess(row))
    room = f"{topology.chip.usable_gib:.1f} GiB"
    return [f"{', '.join(names)}; a {topology.chip.name} has {room}. {remedy}" for remedy, names in excesses.items()]


def _excess(row: Row) -> str:
    name = f"{row.stage.name}: {row.name}"
    others = f"{row.held_gib:.1f} of other models" if row.held_gib >= 0.05 else ""
    if row.build.refusal is not None:
        return f"{name} {row.build.refusal}{others and ' beside ' + others}"
    return f"{name} takes {row.gib + row.held_gib:.1f} GiB{others and ' with ' + others}"


def _remedy(row: Row, config: ModelConfig, mesh: Any, topology: Topology) -> str:
    if row.name in estimates.SEQUENCES:
        return _remedy_of_training(row, mesh, topology)
    room, tensor, most = topology.chip.usable_gib, mesh.shape["tensor"], config.num_kv_heads
    sizes, shards = row.shape.sizes, mesh.shape["fsdp"] * mesh.shape["tensor"]
    if row.held_gib > 0.7 * room and row.name != MOVE:
        return (
            f"Most of it is other models that the method holds, split over fsdp x tensor = {shards}: use "
            f"{power(int(row.held_gib * mesh.size / (0.5 * room)) + 1, 1)} chips of this kind, or raise fsdp."
        )
    if row.name in estimates.FORWARD:
        rows, length, _ = estimates.forward_rows(row.name, sizes)
        setting = "raise that training's accumulate" if row.name == "reference" else "lower that batch"
        return f"{rows} rows of {length} tokens are scored at once: {setting}, or raise fsdp or tensor."
    copy = estimates.sampling_gib(row.shape.config, mesh, sizes.dtype)
    if copy + row.held_gib > 0.8 * room:
        fitting_ones = [t for t in range(tensor + 1, most + 1) if most % t == 0 and copy * tensor / t < 0.6 * room]
        change = f"even tensor = {most}, the most that {most} kv heads allow, is too little: use chips with more memory"
        if fitting_ones:
            change = f"tensor = {fitting_ones[0]} would fit"
        return f"Sampling splits its weights over tensor = {tensor} chips only, {copy:.1f} GiB on each: {change}."
    return (
        f"The cache of {sizes.slots} slots is too large: lower that stage's batch_size or max_new_tokens, use "
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
        total_gib = (state + row.held_gib) * shards
        chips = power(int(total_gib / (0.6 * topology.chip.usable_gib)) + 1, 1)
        offload = "" if sizes.optim.offload else "; or set optim.offload, which keeps the moments in the hosts' memory"
        return (
            f"Weights, gradients, moments and other models take {state + row.held_gib:.1f} GiB of each chip with "
            f"fsdp x tensor = {shards}: use about {chips} chips of this kind{offload}."
        )
    parts = meshlib.axis_size(mesh, "batch")
    accumulate = sizes.accumulate
    while sizes.batch_size % (2 * accumulate * parts) == 0:
        accumulate *= 2
        if total(accumulate=accumulate) < room:
            return f"Activations are too large: accumulate = {accumulate} would fit (it is {sizes.accumulate})."
    if sizes.remat != "full" and total(remat="full", accumulate=accumulate) < room:
        return f'Activations are too large: remat "full" with accumulate = {accumulate} would fit.'
    length = sizes.max_length
    while length > 256 and total(max_length=length, accumulate=accumulate, remat="full") > room:
        length //= 2
    return (
        f"Activations are too large even with accumulate = {accumulate}: raise tensor, or lower max_length to about "
        f"{length} (it is {sizes.max_length})."
    )


# -------------------------------------------------------------------------------------------------------------- search


def meshes(cfg: Any, config: ModelConfig, topology: Topology) -> list[MeshConfig]:
    """Every mesh of the topology that divides the model's dimensions and the config's batches."""
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
    cfg: Any,
    topology: Topology,
    assumptions: Assumptions,
    architectures: Architectures,
    *,
    compiled: bool = True,
    tries: int = 3,
) -> list[tuple[MeshConfig, Plan]]:
    """Every mesh with its estimated plan: those that fit come first, and faster ones before slower ones. On a TPU the
    first ``tries`` are then compiled, until one fits; a mesh that fits when compiled comes before all others.

    Raises: MeshError: if no mesh of the topology divides the model and the batches.
    """
    config = architectures(cfg.model)
    candidates = meshes(cfg, config, topology)
    if not candidates:
        raise meshlib.MeshError(
            f"no mesh of {topology.chips} chips divides the model's heads ({config.num_heads}, {config.num_kv_heads} "
            "kv heads) and the config's batches (batch_size / accumulate by data x fsdp); change one of them"
        )

    def make(mesh: MeshConfig, *, compiled: bool) -> Plan:
        return plan(cfg, topology, assumptions, architectures, mesh=mesh, compiled=compiled)

    def rank(entry: tuple[MeshConfig, Plan]) -> tuple[bool, float]:
        result = entry[1]
        return not result.fits, result.hours + result.hours_once / max(1, result.iterations)

    plans = sorted(((mesh, make(mesh, compiled=False)) for mesh in candidates), key=rank)
    if not compiled or topology.chip.kind != "tpu":
        return plans
    for number, (mesh, estimate) in enumerate(plans[:tries]):
        if estimate.fits:
            plans[number] = mesh, make(mesh, compiled=True)
            if plans[number][1].fits:
                break
    return sorted(plans, key=lambda entry: (not (entry[1].compiled and entry[1].fits), rank(entry)))
