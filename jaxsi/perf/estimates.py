"""Estimates, by arithmetic, of what a run's programs cost a chip: for accelerators whose compiler is not installed, and
for a search among meshes before anything is compiled. Matrix products, caches and states are exact; other reads, writes
and temporaries of a layer are estimated.

Dimension letters are those of decoder.py.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxsi.model import decoder, kv_cache, lm_head, mesh as meshlib
from jaxsi.model.decoder import ModelConfig
from jaxsi.perf.hlo_cost import Cost, Traffic
from jaxsi.perf.machine_rates import attention_flops, body_weights, head_weights, seen
from jaxsi.perf.programs import GIB, MOVE, Memory, Sizes
from jaxsi.sampling.engine import CHUNK, power

AnyMesh = Mesh | AbstractMesh
SEQUENCES = {"sft": 1, "dpo": 2, "reward": 2, "gap reward": 4, "rl": 1, "value": 1}  # in an item of the batch
FORWARD = ("score", "rewards", "reference")
SCALAR = ("rewards", "reward", "gap reward", "value")


def estimate(name: str, config: ModelConfig, mesh: AnyMesh, sizes: Sizes) -> tuple[Memory, Cost]:
    """Memory and cost, on one chip, of the program ``name`` of `programs.programs`.

    Raises: KeyError: if the program has no estimate, because it only moves rows.
    """
    if name in SCALAR:
        config = dataclasses.replace(config, scalar_head=True)
    if name in SEQUENCES:
        return _training(name, config, mesh, sizes)
    if name in FORWARD:
        return _forward(name, config, mesh, sizes)
    return {MOVE: _move, "prefill": _prefill, "decode": _decode}[name](config, mesh, sizes)


def model_flops(name: str, config: ModelConfig, sizes: Sizes) -> float:
    """FLOPs of the model itself on all chips, without recomputation: the measure of MFU. 0 for programs that only move
    data."""
    if name in SEQUENCES:
        rows, T = SEQUENCES[name] * sizes.batch_size, sizes.max_length
        return 3 * (_body_flops(config, rows, T) + _head_flops(config, rows * _counted(name, T), name in SCALAR))
    if name in FORWARD:
        rows, T, counted = forward_rows(name, sizes)
        return _body_flops(config, rows, T) + _head_flops(config, rows * counted, name in SCALAR)
    prompt = power(sizes.prompt_length, 32)
    if name in ("prefill", "extend", "extend in place"):
        T = min(CHUNK, prompt)
        start = 0 if name == "prefill" else prompt - T
        keys = seen(config, start, start + T)
        return sizes.wave * (2.0 * body_weights(config) * T + attention_flops(config, keys))
    if name == "decode":
        keys = seen(config, prompt + sizes.max_new_tokens - 1, prompt + sizes.max_new_tokens)
        weights = body_weights(config) + head_weights(config)
        return sizes.slots * (2.0 * weights + attention_flops(config, keys))
    return _head_flops(config, sizes.slots, False) if name == "first tokens" else 0.0


def weight_bytes(config: ModelConfig, mesh: AnyMesh, itemsize: int, rules: meshlib.Rules) -> float:
    """Bytes of a chip's share of the weights in the layout of ``rules``."""

    def share(p: decoder.Parameter) -> float:
        return math.prod(p.shape) / math.prod(meshlib.axis_size(mesh, axis, rules) for axis in p.axes)

    tree = decoder.parameters(config)
    parameters = [p for p in tree.values() if isinstance(p, decoder.Parameter)] + list(tree["layers"].values())
    return itemsize * sum(map(share, parameters))


def canonical_gib(config: ModelConfig, mesh: AnyMesh) -> float:
    """GiB that float32 weights in the training layout take on each chip."""
    return weight_bytes(config, mesh, 4, meshlib.TRAINING_RULES) / GIB


def sampling_gib(config: ModelConfig, mesh: AnyMesh, dtype: str) -> float:
    """GiB that a copy for sampling takes on each chip."""
    return weight_bytes(config, mesh, jnp.dtype(dtype).itemsize, meshlib.SAMPLING_RULES) / GIB


# ------------------------------------------------------------------------------------------------------------ products


def _body_flops(config: ModelConfig, rows: float, T: int) -> float:
    return rows * (2.0 * body_weights(config) * T + attention_flops(config, seen(config, 0, T)))


def _head_flops(config: ModelConfig, tokens: float, scalar: bool) -> float:
    return 0.0 if scalar else 2.0 * head_weights(config) * tokens


def _counted(name: str, T: int) -> int:
    """Tokens of a row that the head runs on: half of them for pairs, as in `programs`."""
    return T // 2 if name in ("dpo", "reference") else T


def forward_rows(name: str, sizes: Sizes) -> tuple[int, int, int]:
    """For a program in FORWARD: rows in one call, tokens in a row, and tokens of a row that the head runs on."""
    if name == "reference":
        return 2 * sizes.batch_size // sizes.accumulate, sizes.max_length, _counted(name, sizes.max_length)
    return sizes.score_rows, sizes.max_length, sizes.max_length


# ------------------------------------------------------------------------------------------------------------ programs


def _training(name: str, config: ModelConfig, mesh: AnyMesh, sizes: Sizes) -> tuple[Memory, Cost]:
    c, T, chips = config, sizes.max_length, mesh.size
    batch, tensor, fsdp = (meshlib.axis_size(mesh, axis) for axis in ("batch", "mlp", "embed"))
    rows = SEQUENCES[name] * sizes.batch_size
    tokens = rows * T / sizes.accumulate / batch  # on a chip at the same time
    weights = weight_bytes(c, mesh, 4, meshlib.TRAINING_RULES)
    recomputed = {"none": 0.0, "products": 0.1, "full": 1 - c.embed_dim * c.mlp_dim * c.num_layers / body_weights(c)}
    attention = rows * attention_flops(c, seen(c, 0, T))
    body = rows * T * 2.0 * body_weights(c)
    # Fused attention recomputes its scores in the backward pass: twice, because keys and queries have a kernel each.
    flops = body * (3 + recomputed[sizes.remat]) + attention * (4.5 + (sizes.remat == "full"))
    flops += 4 * _head_flops(c, rows * _counted(name, T), name in SCALAR)
    layers = 2.0 * body_weights(c) / tensor  # bytes of the layers' gathered weights in bfloat16
    passes = 3 if sizes.remat == "full" else 2
    layer = tokens * _width(c, tensor)
    hbm = 8 * weights + sizes.accumulate * ((2 * passes + 2) * layers + (passes + 2) * c.num_layers * 3 * layer)
    saved = tokens * c.embed_dim * 2 if sizes.remat == "full" else layer  # bytes that a layer keeps for its backward
    logits = 0 if name in SCALAR else 3 * min(lm_head.TILE_BYTES, tokens * c.vocab_size / tensor * 4)
    temporaries = weights * (2 if sizes.accumulate > 1 else 1) + c.num_layers * saved + 2 * layer + logits
    temporaries += 4 * layers / c.num_layers
    moved = 0.5 if sizes.optim.offload else 0.0  # about: one moment is transferred at a time
    state = weights * (1 if sizes.optim.offload else 3)
    wire = {
        "all-gather": Traffic(
            passes * c.num_layers * sizes.accumulate, passes * sizes.accumulate * layers * _ring(fsdp)
        ),
        "reduce-scatter": Traffic(c.num_layers * sizes.accumulate, sizes.accumulate * layers * _ring(fsdp)),
        "all-reduce": Traffic(
            5 * c.num_layers * sizes.accumulate,
            5 * c.num_layers * sizes.accumulate * tokens * c.embed_dim * 2 * 2 * _ring(tensor)
            + 2 * weights * _ring(mesh.shape["data"]),
        ),
    }
    memory = Memory(name, state / GIB, (temporaries + moved * weights) / GIB, 0.0)
    return memory, Cost(flops / chips, hbm, {kind: traffic for kind, traffic in wire.items() if traffic.wire})


def _forward(name: str, config: ModelConfig, mesh: AnyMesh, sizes: Sizes) -> tuple[Memory, Cost]:
    c = config
    rows, T, _ = forward_rows(name, sizes)
    tensor, fsdp = meshlib.axis_size(mesh, "mlp"), meshlib.axis_size(mesh, "embed")
    tokens = rows * T / meshlib.axis_size(mesh, "batch")
    weights = weight_bytes(c, mesh, 4, meshlib.TRAINING_RULES)
    layers, layer = 2.0 * body_weights(c) / tensor, tokens * _width(c, tensor)
    logits = 0 if name in SCALAR else 2 * min(lm_head.TILE_BYTES, tokens * c.vocab_size / tensor * 4)
    # XLA casts the stacked weights before the loop over the layers.
    memory = Memory(name, weights / GIB, (weights / 2 + 0.75 * layer + logits + 4 * layers / c.num_layers) / GIB, 0.0)
    wire = {
        "all-gather": Traffic(c.num_layers, layers * _ring(fsdp)),
        "all-reduce": Traffic(2 * c.num_layers, 2 * c.num_layers * tokens * c.embed_dim * 2 * 2 * _ring(tensor)),
    }
    hbm = weights * 1.5 + 2 * layers + 3 * c.num_layers * layer
    return memory, Cost(model_flops(name, c, sizes) / mesh.size, hbm, {k: t for k, t in wire.items() if t.wire})


def _move(config: ModelConfig, mesh: AnyMesh, sizes: Sizes) -> tuple[Memory, Cost]:
    """The move of one layer."""
    weights = weight_bytes(config, mesh, 4, meshlib.TRAINING_RULES)
    copy = weight_bytes(config, mesh, jnp.dtype(sizes.dtype).itemsize, meshlib.SAMPLING_RULES) / config.num_layers
    memory = Memory(MOVE, weights / GIB, copy / GIB, copy / GIB)
    sent = copy * _ring(meshlib.axis_size(mesh, "embed"))
    cost = Cost(0.0, weights / config.num_layers + 3 * copy, {"all-gather": Traffic(1, sent)} if sent else {})
    return memory, cost


def _prefill(config: ModelConfig, mesh: AnyMesh, sizes: Sizes) -> tuple[Memory, Cost]:
    c, tensor = config, meshlib.axis_size(mesh, "mlp")
    T = min(CHUNK, power(sizes.prompt_length, 32))
    tokens = sizes.wave * T / meshlib.axis_size(mesh, "batch")
    weights = weight_bytes(c, mesh, jnp.dtype(sizes.dtype).itemsize, meshlib.SAMPLING_RULES)
    layer, cache = tokens * _width(c, tensor), tokens * _cache_bytes(c, tensor, sizes)
    memory = Memory("prefill", weights / GIB, layer / GIB, cache / GIB)
    wire = 2 * c.num_layers * tokens * c.embed_dim * 2 * 2 * _ring(tensor)
    cost = Cost(model_flops("prefill", c, sizes) / mesh.size, weights + 3 * c.num_layers * layer + cache)
    return memory, _with_all_reduce(cost, 2 * c.num_layers, wire)


def _decode(config: ModelConfig, mesh: AnyMesh, sizes: Sizes) -> tuple[Memory, Cost]:
    """One decode step."""
    c, tensor = config, meshlib.axis_size(mesh, "mlp")
    rows = sizes.slots / meshlib.axis_size(mesh, "batch")
    weights = weight_bytes(c, mesh, jnp.dtype(sizes.dtype).itemsize, meshlib.SAMPLING_RULES)
    length = power(sizes.prompt_length, 32) + power(sizes.max_new_tokens, 16)
    columns = sum(min(window, length) for window in decoder.windows(c)) / c.num_layers
    cache = rows * columns * _cache_bytes(c, tensor, sizes)
    logits = rows * c.vocab_size * 4
    memory = Memory("decode", (weights + cache) / GIB, (6 * logits + rows * _width(c, tensor)) / GIB, 0.0)
    wire = 2 * c.num_layers * rows * c.embed_dim * 2 * 2 * _ring(tensor) + logits * _ring(tensor)
    cost = Cost(model_flops("decode", c, sizes) / mesh.size, weights + cache + 4 * logits)
    return memory, _with_all_reduce(cost, 2 * c.num_layers, wire)


# --------------------------------------------------------------------------------------------------------------- parts


def _with_all_reduce(cost: Cost, count: float, wire: float) -> Cost:
    return cost + Cost(collectives={"all-reduce": Traffic(count, wire)} if wire else {})


def _width(c: ModelConfig, tensor: int) -> float:
    """Bytes of a token inside a layer, in bfloat16: residual and norm, heads, and the three arrays of the MLP."""
    return 2.0 * (
        4 * c.embed_dim + (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim / tensor + 3 * c.mlp_dim / tensor
    )


def _cache_bytes(c: ModelConfig, tensor: int, sizes: Sizes) -> float:
    """Bytes of a token's keys and values in all layers on a chip."""
    number = kv_cache.bytes_of_number(sizes.cache, jnp.dtype(sizes.dtype).itemsize, c.head_dim)
    return 2 * c.num_layers * c.num_kv_heads / tensor * c.head_dim * number


def _ring(n: int) -> float:
    return (n - 1) / n
