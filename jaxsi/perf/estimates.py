"""What a run's programs cost a chip, by arithmetic: for accelerators that no compiler is at hand for, and to search
among meshes before anything is compiled. Matrix products, caches and states are exact; what else a layer reads, writes
and keeps is estimated.

Dimension letters as in model.py.
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
SEQUENCES = {"sft": 1, "dpo": 2, "reward": 2, "gap reward": 4, "rl": 1, "value": 1}  # of an item of the batch
FORWARD = ("score", "rewards", "reference")
SCALAR = ("rewards", "reward", "gap reward", "value")


def estimate(name: str, config: ModelConfig, mesh: AnyMesh, sizes: Sizes) -> tuple[Memory, Cost]:
    """Memory and cost on one chip of the program that `programs.programs` has under ``name``.

    Raises: KeyError for a program that has no estimate: those that only move rows about.
    """
    if name in SCALAR:
        config = dataclasses.replace(config, scalar_head=True)
    if name in SEQUENCES:
        return _training(name, config, mesh, sizes)
    if name in FORWARD:
        return _forward(name, config, mesh, sizes)
    return {MOVE: _move, "prefill": _prefill, "decode": _decode}[name](config, mesh, sizes)


def model_flops(name: str, config: ModelConfig, sizes: Sizes) -> float:
    """FLOPs of all chips that the model itself asks for, nothing computed again: what MFU is measured by. 0 for
    programs that only move data."""
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
    """Bytes of a chip's share of the weights, laid out by ``rules``."""

    def share(p: decoder.Parameter) -> float:
        return math.prod(p.shape) / math.prod(meshlib.axis_size(mesh, axis, rules) for axis in p.axes)

    tree = decoder.parameters(config)
    every = [p for p in tree.values() if isinstance(p, decoder.Parameter)] + list(tree["layers"].values())
    return itemsize * sum(map(share, every))


def canonical_gib(config: ModelConfig, mesh: AnyMesh) -> float:
    """GiB of a chip that float32 weights in the training layout take."""
    return weight_bytes(config, mesh, 4, meshlib.TRAINING_RULES) / GIB


def sampling_gib(config: ModelConfig, mesh: AnyMesh, dtype: str) -> float:
    """GiB of a chip that a copy for sampling takes."""
    return weight_bytes(config, mesh, jnp.dtype(dtype).itemsize, meshlib.SAMPLING_RULES) / GIB


# ------------------------------------------------------------------------------------------------------------ products


def _body_flops(config: ModelConfig, rows: float, T: int) -> float:
    return rows * (2.0 * body_weights(config) * T + attention_flops(config, seen(config, 0, T)))


def _head_flops(config: ModelConfig, tokens: float, scalar: bool) -> float:
    return 0.0 if scalar else 2.0 * head_weights(config) * tokens


def _counted(name: str, T: int) -> int:
    """Tokens of a row that the head runs on: of pairs, as `programs` has them, half."""
    return T // 2 if name in ("dpo", "reference") else T


def forward_rows(name: str, sizes: Sizes) -> tuple[int, int, int]:
    """Rows that go through a program of FORWARD at a time, their tokens, and how many of these the head runs on."""
    if name == "reference":
        return 2 * sizes.batch_size // sizes.accumulate, sizes.max_length, _counted(name, sizes.max_length)
    return sizes.score_rows, sizes.max_length, sizes.max_length


# ------------------------------------------------------------------------------------------------------------ programs


def _training(name: str, config: ModelConfig, mesh: AnyMesh, sizes: Sizes) -> tuple[Memory, Cost]:
    c, T, chips = config, sizes.max_length, mesh.size
    batch, tensor, fsdp = (
        meshlib.axis_size(mesh, "batch"),
        meshlib.axis_size(mesh, "mlp"),
        meshlib.axis_size(mesh, "embed"),
    )
    rows = SEQUENCES[name] * sizes.batch_size
    tokens = rows * T / sizes.accumulate / batch  # of a chip at a time
    weights = weight_bytes(c, mesh, 4, meshlib.TRAINING_RULES)
    again = {"none": 0.0, "products": 0.1, "full": 1 - c.embed_dim * c.mlp_dim * c.num_layers / body_weights(c)}
    attention = rows * attention_flops(c, seen(c, 0, T))
    body = rows * T * 2.0 * body_weights(c)
    # Fused attention computes its scores again in the backward pass, twice where keys and queries have a kernel each.
    flops = body * (3 + again[sizes.remat]) + attention * (4.5 + (sizes.remat == "full"))
    flops += 4 * _head_flops(c, rows * _counted(name, T), name in SCALAR)
    layers = 2.0 * body_weights(c) / tensor  # bytes of the layers' weights, gathered, in bfloat16
    passes = 3 if sizes.remat == "full" else 2
    layer = tokens * _width(c, tensor)
    hbm = 8 * weights + sizes.accumulate * ((2 * passes + 2) * layers + (passes + 2) * c.num_layers * 3 * layer)
    kept = tokens * c.embed_dim * 2 if sizes.remat == "full" else layer
    logits = 0 if name in SCALAR else 3 * min(lm_head.TILE_BYTES, tokens * c.vocab_size / tensor * 4)
    temporaries = weights * (2 if sizes.accumulate > 1 else 1) + c.num_layers * kept + 2 * layer + logits
    temporaries += 4 * layers / c.num_layers
    moved = 0.5 if sizes.optim.offload else 0.0  # one moment's transfers at a time, about
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
    # XLA casts the stacked weights before the loop over layers.
    memory = Memory(name, weights / GIB, (weights / 2 + 0.75 * layer + logits + 4 * layers / c.num_layers) / GIB, 0.0)
    wire = {
        "all-gather": Traffic(c.num_layers, layers * _ring(fsdp)),
        "all-reduce": Traffic(2 * c.num_layers, 2 * c.num_layers * tokens * c.embed_dim * 2 * 2 * _ring(tensor)),
    }
    hbm = weights * 1.5 + 2 * layers + 3 * c.num_layers * layer
    return memory, Cost(model_flops(name, c, sizes) / mesh.size, hbm, {k: t for k, t in wire.items() if t.wire})


def _move(config: ModelConfig, mesh: AnyMesh, sizes: Sizes) -> tuple[Memory, Cost]:
    """One layer."""
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
    """One step."""
    c, tensor = config, meshlib.axis_size(mesh, "mlp")
    rows = sizes.slots / meshlib.axis_size(mesh, "batch")
    weights = weight_bytes(c, mesh, jnp.dtype(sizes.dtype).itemsize, meshlib.SAMPLING_RULES)
    length = power(sizes.prompt_length, 32) + power(sizes.max_new_tokens, 16)
    kept = sum(min(window, length) for window in decoder.windows(c)) / c.num_layers
    cache = rows * kept * _cache_bytes(c, tensor, sizes)
    logits = rows * c.vocab_size * 4
    memory = Memory("decode", (weights + cache) / GIB, (6 * logits + rows * _width(c, tensor)) / GIB, 0.0)
    wire = 2 * c.num_layers * rows * c.embed_dim * 2 * 2 * _ring(tensor) + logits * _ring(tensor)
    cost = Cost(model_flops("decode", c, sizes) / mesh.size, weights + cache + 4 * logits)
    return memory, _with_all_reduce(cost, 2 * c.num_layers, wire)


# --------------------------------------------------------------------------------------------------------------- parts


def _with_all_reduce(cost: Cost, count: float, wire: float) -> Cost:
    return cost + Cost(collectives={"all-reduce": Traffic(count, wire)} if wire else {})


def _width(c: ModelConfig, tensor: int) -> float:
    """Bytes that a token takes inside a layer, in bfloat16: residual and norm, heads, and the three of the MLP."""
    return 2.0 * (
        4 * c.embed_dim + (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim / tensor + 3 * c.mlp_dim / tensor
    )


def _cache_bytes(c: ModelConfig, tensor: int, sizes: Sizes) -> float:
    """Bytes of a token's keys and values of all layers on a chip."""
    number = kv_cache.bytes_of_number(sizes.cache, jnp.dtype(sizes.dtype).itemsize, c.head_dim)
    return 2 * c.num_layers * c.num_kv_heads / tensor * c.head_dim * number


def _ring(n: int) -> float:
    return (n - 1) / n
