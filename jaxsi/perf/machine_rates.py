"""What the hardware gives, measured in the same run, and what a model's work costs at the least: with the two a speed
becomes a share of what was possible.

Rates are per second of the whole mesh; measured on one device, times the number of devices (those of a CPU share it).
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

IN_A_CALL = 4  # products and back
MOST_ROWS = 2048  # of a product: more are no faster
CPU_SQUARES, SQUARES = (1024, 2048), (4096, 8192)  # large enough for the best rate, and done in a moment
READ_BYTES = 2**29  # far more than any cache holds
MEASURED_SECONDS, REPEATS = 0.15, 3  # of one timing, and of how many the fastest counts
# FLOP/s of dense bfloat16, by the words of the device's kind that name it: NVIDIA's datasheets of the SXM modules.
DATASHEETS = {("H100", "HBM3"): 989e12, ("H200",): 989e12}


class Ceilings(NamedTuple):
    """Bytes/s read (by a processor) or copied, and FLOP/s of matrix products: of the model's own with as many rows as
    decode together, and the best."""

    bandwidth: float
    gemm_rows: float
    gemm_peak: float


# ------------------------------------------------------------------------------------------------------------- measured


def measure(config: ModelConfig, mesh: Mesh, dtype: Any, *, rows: int, tokens: int) -> Ceilings:
    """Both ceilings, at the sizes of the model.

    Args:
      dtype: of the products. rows: that decode together. tokens: that go through the model at once in training, in
      scoring or in the prompts; the peak is the best of these products and of large square ones.
    """
    batch, mlp = meshlib.axis_size(mesh, "batch"), meshlib.axis_size(mesh, "mlp")
    device = jax.local_devices()[0] if jax.process_count() > 1 else mesh.devices.flat[0]
    share = 1 if device.platform == "cpu" else mesh.size
    shapes = products(config)
    rate = lambda n, shape: gemm(device, dtype, max(1, min(n, MOST_ROWS) // batch), shape[0], shape[1] // mlp)  # noqa: E731
    few = {shape: rate(rows, shape) for shape in shapes}
    many = {shape: rate(tokens, shape) for shape in shapes if tokens != rows}
    squares = [gemm(device, dtype, n, n, n) for n in (CPU_SQUARES if device.platform == "cpu" else SQUARES)]
    weights = sum(count * math.prod(shape) for shape, count in shapes.items())
    seconds = sum(count * math.prod(shape) / few[shape] for shape, count in shapes.items())
    # The peak is of all of them: a few rows, whose product stays in a cache, may be the fastest.
    peak = max(*few.values(), *many.values(), *squares)
    return Ceilings(share * bandwidth(device), share * weights / seconds, share * peak)


def bandwidth(device: jax.Device, size: int = READ_BYTES) -> float:
    """Bytes/s of one device: of reading a large matrix (times a vector), as decoding does; but for processors, which
    copy in place faster than they read, the copy's (both ways) if that is more."""
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
    """FLOP/s of one device: of products [rows, inner] x [inner, outer] and back, one behind the other, in a loop on the
    device (no call costs anything) or in calls (XLA on a processor does large products faster there)."""

    @jax.jit
    def chain(times: int, x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: (x @ up) @ down, x)

    @jax.jit
    def some(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        for _ in range(IN_A_CALL):
            x = (x @ up) @ down
        return x

    # Entries that keep the size of what they multiply: no product overflows, and none is slow for being tiny.
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
    """Seconds of one of the iterations that ``run`` makes."""

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
    """FLOP/s that the maker of the devices states; None where the device, or the dtype, is not in the table."""
    kind = mesh.devices.flat[0].device_kind
    for words, flops in DATASHEETS.items():
        if all(word in kind for word in words) and jnp.dtype(dtype) == jnp.bfloat16:
            return flops * mesh.size
    return None


# ----------------------------------------------------------------------------------------------------------------- cost


def products(config: ModelConfig) -> dict[tuple[int, int], int]:
    """How many matrices of each shape (embed, other) a token is multiplied with, norms and biases left out."""
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
    every = sum(count * math.prod(shape) for shape, count in products(config).items())
    return every - head_weights(config)


def head_weights(config: ModelConfig) -> int:
    """Weights of the head, be it tied or not."""
    return config.embed_dim * config.vocab_size


def seen(config: ModelConfig, start: int, stop: int) -> int:
    """How many keys the tokens ``start`` to ``stop`` (not included) of a text look at, themselves included, over all
    layers."""

    def until(tokens: int, window: int) -> int:
        whole = min(tokens, window)
        return whole * (whole + 1) // 2 + (tokens - whole) * window

    return sum(until(stop, window) - until(start, window) for window in windows(config))


def forward_flops(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Of one pass over texts of these lengths, with the head at every token; backward costs twice as much again."""
    weights = body_weights(config) + head_weights(config)
    return 2.0 * weights * sum(lengths) + sum(attention_flops(config, seen(config, 0, n)) for n in lengths)


def attention_flops(config: ModelConfig, keys: int) -> float:
    """Of scores and values of queries that look at so many keys in all."""
    return 4.0 * config.num_heads * config.head_dim * keys


def floor_of_prompts(config: ModelConfig, tokens: int, rows: int, ceilings: Ceilings) -> float:
    """Seconds that no engine can do with less for ``tokens`` of prompts, what they share counted once, and the first
    new token of each row. Attention is left out."""
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
    """Seconds that no engine can do with less for decoding in so many slots, and the steps in which it would be done.

    A step reads every weight of the model and multiplies its rows by them, and takes as long as the longer of the two;
    and, as what is multiplied next depends on it, reads what it sees of the cache, all at the rates measured.

    Args:
      spans: for each row, the text positions whose tokens are decoded (start, stop). itemsize: bytes of a weight.
      cached: bytes of a number of the cache, where it is another than that.
    """
    tokens = sum(stop - start for start, stop in spans)
    steps = max(-(-tokens // slots), *(stop - start for start, stop in spans), 0)
    if steps == 0:
        return 0.0, 0
    weights = body_weights(config) + head_weights(config)
    keys = sum(seen(config, start, stop) for start, stop in spans)
    cache = keys * 2 * config.num_kv_heads * config.head_dim * (itemsize if cached is None else cached)
    multiplying = max(2.0 * weights * tokens / steps / ceilings.gemm_rows, weights * itemsize / ceilings.bandwidth)
    attending = max(attention_flops(config, keys) / ceilings.gemm_peak, cache / ceilings.bandwidth)
    return steps * multiplying + attending, steps
