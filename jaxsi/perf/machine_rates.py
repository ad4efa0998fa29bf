"""The rates of the hardware, measured in the same run, and the least cost of a model's work. Together they turn a speed
into a share of what was possible.

A rate is that of the whole mesh: measured on one device and multiplied by the number of devices (fake CPU devices share
one CPU).
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsi.model import mesh as meshlib
from jaxsi.model.decoder import ModelConfig, windows

IN_A_CALL = 4  # products, each forth and back
MOST_ROWS = 2048  # of a product: more rows are not faster
CPU_SQUARES, SQUARES = (1024, 2048), (4096, 8192)  # large enough for the best rate, small enough to be quick
READ_BYTES = 2**29  # far more than any cache holds
MEASURED_SECONDS, REPEATS = 0.15, 3  # the length of a timing; the number of timings, of which the fastest counts
# FLOP/s of dense bfloat16, by words in the name of the device: NVIDIA's datasheets of the SXM modules.
DATASHEETS = {("H100", "HBM3"): 989e12, ("H200",): 989e12}


class Ceilings(NamedTuple):
    """``bandwidth``: bytes/s, reading (CPU) or copying. ``gemm_rows``: FLOP/s of the model's own matrix products, with
    as many rows as decode together. ``gemm_peak``: FLOP/s of the best matrix product."""

    bandwidth: float
    gemm_rows: float
    gemm_peak: float


# ------------------------------------------------------------------------------------------------------------- measured


def measure(config: ModelConfig, mesh: Mesh, dtype: Any, *, rows: int, tokens: int) -> Ceilings:
    """The ceilings at the sizes of the model.

    Args:
      dtype: of the products. rows: the number that decode together. tokens: the number that go through the model at
      once in training, in scoring or in the prompts. The peak is the best of the products with that many rows and of
      large square ones.
    """
    batch, mlp = meshlib.axis_size(mesh, "batch"), meshlib.axis_size(mesh, "mlp")
    device = jax.local_devices()[0] if jax.process_count() > 1 else mesh.devices.flat[0]
    share = 1 if device.platform == "cpu" else mesh.size
    shapes = products(config)

    def rate(n: int, shape: tuple[int, int]) -> float:
        return gemm(device, dtype, max(1, min(n, MOST_ROWS) // batch), shape[0], shape[1] // mlp)

    few = {shape: rate(rows, shape) for shape in shapes}
    many = {shape: rate(tokens, shape) for shape in shapes if tokens != rows}
    squares = [gemm(device, dtype, n, n, n) for n in (CPU_SQUARES if device.platform == "cpu" else SQUARES)]
    weights = sum(count * math.prod(shape) for shape, count in shapes.items())
    seconds = sum(count * math.prod(shape) / few[shape] for shape, count in shapes.items())
    # The peak is the best of all: a product of few rows may be the fastest, because it stays in a cache.
    peak = max(*few.values(), *many.values(), *squares)
    return Ceilings(share * bandwidth(device), share * weights / seconds, share * peak)


def bandwidth(device: jax.Device, size: int = READ_BYTES) -> float:
    """Bytes/s of one device when it reads a large matrix (times a vector), as decoding does. On an accelerator, the
    bytes/s of a copy in both directions if that is more; a CPU copies in place faster than it reads."""
    n = max(128, int((size // 4) ** 0.5) // 128 * 128)
    matrix_nn = jax.device_put(jnp.full((n, n), 1 / n, jnp.float32), device)
    vector_n = jax.device_put(jnp.ones((n,), jnp.float32), device)

    @jax.jit
    def read(times: int, matrix_nn: jax.Array, vector_n: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x_n: matrix_nn @ x_n, vector_n)

    @jax.jit
    def copy(times: int, matrix_nn: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x_nn: x_nn * 0.999, matrix_nn)

    reading = _fastest(lambda times: read(times, matrix_nn, vector_n))
    copying = _fastest(lambda times: copy(times, matrix_nn))
    if device.platform == "cpu":
        return matrix_nn.nbytes / reading
    return max(matrix_nn.nbytes / reading, 2 * matrix_nn.nbytes / copying)


def gemm(device: jax.Device, dtype: Any, rows: int, inner: int, outer: int) -> float:
    """FLOP/s of one device for a chain of products [rows, inner] x [inner, outer] and back. The faster of a loop on the
    device, which has no overhead of calls, and of calls, in which XLA:CPU does large products faster."""

    @jax.jit
    def chain(times: int, x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: (x @ up) @ down, x)

    @jax.jit
    def some(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        for _ in range(IN_A_CALL):
            x = (x @ up) @ down
        return x

    # Entries that preserve the norm: no product overflows, and none is slow because of tiny numbers.
    a, b, c = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(a, (rows, inner), dtype)
    up = jax.random.normal(b, (inner, outer), dtype) * inner**-0.5
    down = jax.random.normal(c, (outer, inner), dtype) * outer**-0.5
    x, up, down = jax.device_put((x, up, down), device)

    def calls(times: int) -> jax.Array:
        y = x
        for _ in range(times):
            y = some(y, up, down)
        return y

    seconds = min(_fastest(lambda times: chain(times, x, up, down)), _fastest(calls) / IN_A_CALL)
    return 4 * rows * inner * outer / seconds


def _fastest(run: Callable[[int], Any]) -> float:
    """Seconds of one iteration; ``run`` makes the number of iterations that it is called with."""

    def seconds(times: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(times))
        return time.perf_counter() - start

    seconds(1)  # compiles
    times = 1
    while (took := seconds(times)) < MEASURED_SECONDS:
        times = max(2 * times, int(1.2 * times * MEASURED_SECONDS / max(took, 1e-6)))
    return min([took, *(seconds(times) for _ in range(REPEATS - 1))]) / times


def datasheet_flops(mesh: Mesh, dtype: Any) -> float | None:
    """FLOP/s from the datasheet of the devices; None if the device or the dtype is not in the table."""
    kind = mesh.devices.flat[0].device_kind
    for words, flops in DATASHEETS.items():
        if all(word in kind for word in words) and jnp.dtype(dtype) == jnp.bfloat16:
            return flops * mesh.size
    return None


# ----------------------------------------------------------------------------------------------------------------- cost


def products(config: ModelConfig) -> dict[tuple[int, int], int]:
    """The number of matrices of each shape (embed, other) that a token is multiplied with, without norms and biases."""
    c = config
    counts: dict[tuple[int, int], int] = {}
    for other, count in (
        (c.num_heads * c.head_dim, 2 * c.num_layers),
        (c.num_kv_heads * c.head_dim, 2 * c.num_layers),
        (c.mlp_dim, 3 * c.num_layers),
        (c.vocab_size, 1),
    ):
        counts[c.embed_dim, other] = counts.get((c.embed_dim, other), 0) + count
    return counts


def body_weights(config: ModelConfig) -> int:
    """Weights of the layers that a token is multiplied with."""
    total = sum(count * math.prod(shape) for shape, count in products(config).items())
    return total - head_weights(config)


def head_weights(config: ModelConfig) -> int:
    """Weights of the head, tied or not."""
    return config.embed_dim * config.vocab_size


def seen(config: ModelConfig, start: int, stop: int) -> int:
    """The number of keys that tokens ``start`` to ``stop`` - 1 of a text attend to, including themselves, summed over
    all layers."""

    def until(tokens: int, window: int) -> int:
        whole = min(tokens, window)
        return whole * (whole + 1) // 2 + (tokens - whole) * window

    return sum(until(stop, window) - until(start, window) for window in windows(config))


def forward_flops(config: ModelConfig, lengths: Sequence[int]) -> float:
    """FLOPs of a forward pass over texts of these lengths, with the head at every token. The backward pass takes twice
    as many."""
    weights = body_weights(config) + head_weights(config)
    return 2.0 * weights * sum(lengths) + sum(attention_flops(config, seen(config, 0, n)) for n in lengths)


def attention_flops(config: ModelConfig, keys: int) -> float:
    """FLOPs of scores and values, for queries that attend to ``keys`` keys in total."""
    return 4.0 * config.num_heads * config.head_dim * keys


def floor_of_prompts(config: ModelConfig, tokens: int, rows: int, ceilings: Ceilings) -> float:
    """The least seconds that any engine needs for ``tokens`` tokens of prompts (shared prefixes counted once) and the
    first new token of each row. Attention is left out."""
    flops = 2.0 * (body_weights(config) * tokens + head_weights(config) * rows)
    return flops / ceilings.gemm_peak


def floor_of_decoding(
    config: ModelConfig,
    spans: Sequence[tuple[int, int]],
    slots: int,
    itemsize: int,
    ceilings: Ceilings,
    *,
    cached: float | None = None,
) -> tuple[float, int]:
    """The least seconds that any engine needs to decode in ``slots`` slots, and the number of steps.

    A step reads every weight of the model and multiplies its rows with them, and takes the longer of the two. Then it
    reads the cache that it attends to; this cannot overlap, because the next product depends on it. All of this happens
    at the measured rates.

    Args:
      spans: for each row, the text positions whose tokens are decoded (start, stop). itemsize: bytes of a weight.
      cached: bytes of a number in the cache; None: as many as of a weight.
    """
    tokens = sum(stop - start for start, stop in spans)
    steps = max(-(-tokens // slots), *(stop - start for start, stop in spans), 0)
    if steps == 0:
        return 0.0, 0
    weights = body_weights(config) + head_weights(config)
    keys = sum(seen(config, start, stop) for start, stop in spans)
    cache = keys * 2 * config.num_kv_heads * config.head_dim * (itemsize if cached is None else cached)
    step_seconds = max(2.0 * weights * tokens / steps / ceilings.gemm_rows, weights * itemsize / ceilings.bandwidth)
    attention_seconds = max(attention_flops(config, keys) / ceilings.gemm_peak, cache / ceilings.bandwidth)
    return steps * step_seconds + attention_seconds, steps
