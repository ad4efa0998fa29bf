"""The programs of a run without its data. Their arguments are abstract arrays on a mesh, so they can be lowered and
compiled ahead of time, even for a TPU that this machine does not have.

    mesh = make_mesh(MeshConfig(fsdp=4, tensor=4), tpu_devices("v5e:4x4"))
    program = programs(config, mesh, Sizes())["dpo"]
    memory_of("dpo", program.lower().compile())        # in GiB per chip

Dimension letters are those of decoder.py and slots.py.
"""

import dataclasses
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsi import lm
from jaxsi.model import decoder, kv_cache, mesh as meshlib
from jaxsi.model.decoder import ModelConfig, Remat, Weights
from jaxsi.model.kv_cache import KVCache
from jaxsi.sampling import scoring, slots
from jaxsi.sampling.engine import CHUNK, power, refill_threshold
from jaxsi.sampling.token_sampling import MAX_MARKER, MAX_STOPS, Settings
from jaxsi.training import losses, optim, ppo, reference, reward, rl, train
from jaxsi.training.batches import GroupBatch, PairBatch, TokenBatch
from jaxsi.training.optim import OptimConfig

GIB = 2**30
MOVE = "a layer's sampling weights"  # the program that moves them; it runs once for each layer
shape_of: Any = jax.ShapeDtypeStruct  # stands for an array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes that determine the shapes of a run's programs.

    Sampling: ``slots`` responses at the same time, of at most ``max_new_tokens``, to prompts of at most
    ``prompt_length`` tokens; ``wave`` prompts are computed together. Scoring and training: rows of ``max_length``
    tokens, ``score_rows`` scored together; ``batch_size`` rows (pairs for preferences, groups for rewards) in an
    optimizer step, in ``accumulate`` parts. ``dtype``: of the computation. ``cache``: of keys and values.
    """

    slots: int = 64
    wave: int = 16
    prompt_length: int = 1024
    max_new_tokens: int = 1024
    max_length: int = 2048
    score_rows: int = 32
    batch_size: int = 64
    accumulate: int = 8
    remat: Remat = "full"
    dtype: str = "bfloat16"
    cache: KVCache = "exact"
    optim: OptimConfig = OptimConfig(learning_rate=1e-6)


class Program(NamedTuple):
    """A jitted function and its arguments, with shapes instead of arrays."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(*self.arguments, **self.options)


def programs(config: ModelConfig, mesh: Mesh, sizes: Sizes) -> dict[str, Program]:
    """The programs of a run by name, each at its largest shapes.

    Raises: MeshError: if the mesh does not divide a dimension of the model.
    """
    return sampling_programs(config, mesh, sizes) | training_programs(config, mesh, sizes)


def sampling_programs(config: ModelConfig, mesh: Mesh, sizes: Sizes) -> dict[str, Program]:
    """The program that moves a layer's weights into the sampling layout, then the programs of the engine."""
    P, dtype = sizes.wave, jnp.dtype(sizes.dtype)
    fixed = slots.Fixed(config, mesh, dtype, int8=sizes.cache == "int8")
    _, move_layer = lm.sampling_movers(config, mesh, dtype)
    canonical = decoder.abstract_weights(config, mesh)
    layers, number = canonical["layers"], shape_of((), jnp.int32)
    unstacked = [jax.eval_shape(move_layer, layers, number)] * config.num_layers
    top = {name: shape_of(w.shape, dtype) for name, w in canonical.items() if name != "layers"}
    weights = jax.tree.map(_with_sharding, top | {"layers": unstacked}, lm.sampling_layout(config, mesh))
    ring = power(kv_cache.columns_seen(sizes.max_new_tokens, max(decoder.windows(config))), 16)
    prompt = power(sizes.prompt_length, 32)
    chunk = min(CHUNK, prompt)
    full = on_mesh(_slots(fixed, sizes.slots, ring, prompt), mesh)
    settings = abstract_settings()
    parts = meshlib.axis_size(mesh, "batch")

    def ids(*shape: int) -> jax.ShapeDtypeStruct:
        return on_mesh(host(*shape), mesh)

    def host(*shape: int) -> jax.ShapeDtypeStruct:  # integers from the host, without a layout on the mesh
        return shape_of(shape, jnp.int32)

    def wave(rows: int, length: int) -> slots.Wave:
        keys = shape_of((rows, config.num_kv_heads, length, config.head_dim), dtype)
        layer = jax.eval_shape(kv_cache.quantized, keys) if fixed.int8 else keys
        hidden_PD = shape_of((rows, config.embed_dim), dtype)
        n_P = shape_of((rows,), jnp.int32)
        return on_mesh(slots.Wave([(layer, layer)] * config.num_layers, n_P, n_P, n_P, hidden_PD), mesh)

    def refill(rows: int) -> Program:
        keys_n2 = shape_of((rows, 2), jnp.uint32)
        arguments = (full, wave(P, prompt), host(rows), host(rows), keys_n2, host(rows), host(rows), settings)
        return Program(slots.refill_slots, arguments, {"fixed": fixed, "ring": ring, "width": prompt})

    def first(rows: int) -> Program:
        arguments = (weights, wave(P, prompt).hidden_PD, host(rows), shape_of((rows, 2), jnp.uint32), settings)
        return Program(slots.first_tokens, arguments, {"fixed": fixed})

    def extend(rows_P: Any) -> Program:
        arguments = (weights, ids(P, chunk), ids(P), wave(P, prompt), rows_P)
        return Program(slots.extend_prompts, arguments, {"fixed": fixed, "length": prompt})

    def resize(before: int, rows_b: Any) -> Program:
        options = {"fixed": fixed, "ring": before, "new_ring": ring, "new_prompt": prompt}
        return Program(slots.resize_slots, (on_mesh(_slots(fixed, sizes.slots, before, prompt), mesh), rows_b), options)

    packed = slots.Packed(*[ids(P, chunk)] * 3, *[ids(P)] * 3)
    return {
        MOVE: Program(move_layer, (layers, number), {}),
        "prefill": Program(slots.prefill_prompts, (weights, packed), {"fixed": fixed}),
        "extend": extend(ids(P)),
        "extend in place": extend(None),
        "first tokens": first(sizes.slots),
        "fill": refill(sizes.slots),
        "refill": refill(2 * refill_threshold(sizes.slots, parts)),
        "grow": resize(ring // 2, None),
        "shrink": resize(ring, host(parts * max(1, sizes.slots // (4 * parts)))),
        "decode": Program(
            slots.decode_slots, (weights, full, settings, host(), host()), {"fixed": fixed, "ring": ring}
        ),
    }


def training_programs(config: ModelConfig, mesh: Mesh, sizes: Sizes) -> dict[str, Program]:
    """Scoring, then a step of each kind of training, and the log-probabilities of the preferences' reference."""
    B, T = sizes.batch_size, sizes.max_length
    weights = decoder.abstract_weights(config, mesh)
    state = abstract_state(weights, sizes.optim)
    common = (config, mesh, sizes.dtype, sizes.remat)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return on_mesh(shape_of(shape, dtype), mesh)

    def ids(*shape: int) -> jax.ShapeDtypeStruct:
        return array(jnp.int32, *shape)

    numbers, mask = array(jnp.float32, B, T), array(bool, B, T)

    def pairs(rows: int, *, shared: bool = False) -> PairBatch:
        """Pairs whose prompts take half a row. ``shared``: a pair has its prompt once, and both responses."""
        tokens = ids(rows, 1, 3 * T // 2) if shared else ids(rows, 2, T)
        counted = ids(rows, 2, T // 2)
        refs_B2 = array(jnp.float32, rows, 2)
        return PairBatch(tokens, tokens, tokens, counted, counted, refs_B2, array(bool, rows))

    scalar = dataclasses.replace(config, scalar_head=True)
    common_scalar = (scalar, *common[1:])

    def step(batch: Any, loss: Any, state: train.State = state) -> Program:
        options = {"loss": loss, "optimizer": sizes.optim, "accumulate": sizes.accumulate}
        return Program(train.train_step, (state, batch, shape_of((), jnp.float32)), options)

    def groups(rows: int) -> GroupBatch:
        return GroupBatch(ids(B, rows, T), ids(B, rows, T), array(bool, B))

    scalar_weights = decoder.abstract_weights(scalar, mesh)
    scalar_state = abstract_state(scalar_weights, sizes.optim)
    rollouts = rl.RolloutBatch(ids(B, T), ids(B, T), mask, *[numbers] * 4)
    rows, preference = sizes.score_rows, train.PairLoss(*common, losses.dpo, 0.1, 0.0)
    options = {"dtype": jnp.dtype(sizes.dtype), "mesh": mesh}
    return {
        "score": Program(scoring.score_batch, (weights, ids(rows, T), ids(rows)), {"config": config, **options}),
        "rewards": Program(
            reward.score_rewards, (scalar_weights, ids(rows, T), ids(rows)), {"config": scalar, **options}
        ),
        "sft": step(TokenBatch(*[ids(B, T)] * 5), train.SFTLoss(*common)),
        "reference": Program(
            reference.reference_pair_logps,
            (weights, pairs(B // sizes.accumulate)),
            {"config": config, "mesh": mesh, "dtype": sizes.dtype, "remat": sizes.remat},
        ),
        "dpo": step(pairs(B), preference),
        "dpo, prompt shared": step(pairs(B, shared=True), preference),
        "reward": step(groups(2), reward.RewardLoss(*common_scalar, reward.BRADLEY_TERRY), scalar_state),
        "gap reward": step(groups(4), reward.RewardLoss(*common_scalar, reward.GAP), scalar_state),
        "rl": step(rollouts, rl.PolicyLoss(*common, 0.2)),
        "value": step(rollouts, ppo.ValueLoss(*common_scalar, 0.2), scalar_state),
    }


# ----------------------------------------------------------------------------------------------------------- arguments


def _with_sharding(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    return shape_of(shape.shape, shape.dtype, sharding=sharding)


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the layout of a run: arrays are split by rows, [B, K, S, C] also by heads; scalars are replicated."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = ("batch", "kv_heads", None, None) if x.ndim == 4 else ("batch", *[None] * (x.ndim - 1))
        return _with_sharding(x, meshlib.sharding(mesh, axes[: x.ndim]))

    return jax.tree.map(place, tree)


def _slots(fixed: slots.Fixed, size: int, ring: int, prompt: int) -> slots.Slots:
    return jax.eval_shape(lambda: slots.empty_slots(fixed=fixed, size=size, ring=ring, prompt=prompt))


def abstract_settings() -> Settings:
    """The shapes of sampling settings."""
    number, integer = (shape_of((), dtype) for dtype in (jnp.float32, jnp.int32))
    stops, marker = (shape_of((length,), jnp.int32) for length in (MAX_STOPS, MAX_MARKER))
    return Settings(number, number, integer, stops, marker, integer)


def abstract_state(weights: Weights, optimizer: OptimConfig) -> train.State:
    """The shapes of a training state, with shardings."""
    init = optim.make_optimizer(optimizer).init
    number = shape_of((), jnp.int32)
    shapes = train.State(weights, jax.eval_shape(init, weights), number, number)
    return jax.tree.map(_with_sharding, shapes, train.state_layout(weights, optimizer))


# -------------------------------------------------------------------------------------------------------------- memory


class Memory(NamedTuple):
    """The memory of a program on each chip, in GiB. ``outputs`` leaves out those that are written over arguments."""

    program: str
    arguments: float
    temporaries: float
    outputs: float

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries + self.outputs


def memory_of(name: str, compiled: jax.stages.Compiled) -> Memory:
    """The memory of a compiled program, as its compiler counts it."""
    m: Any = compiled.memory_analysis()
    outputs = m.output_size_in_bytes - m.alias_size_in_bytes
    return Memory(name, *(size / GIB for size in (m.argument_size_in_bytes, m.temp_size_in_bytes, outputs)))


def tpu_devices(topology: str) -> list[jax.Device]:
    """The chips of a TPU such as "v5e:4x4" or "v5p:2x2x2". Programs can be compiled for them, but not run. Needs
    libtpu."""
    from jax.experimental import topologies

    # Without these, libtpu looks for a metadata server and complains at length that it cannot find one.
    variables = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    variables["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no process has a chip, so several may compile at the same time
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    # JAX uses both cores of a v4 chip as one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)  # the default is 2x2, from which older libtpu cannot take one chip
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
