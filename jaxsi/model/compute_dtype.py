"""The dtype "auto": bfloat16 where the device computes in it at speed, else float32. It is measured, not guessed by the
name of the device: it also depends on the version of JAX. A run decides once, when it begins.
"""

import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxsi.runs.config_snapshot import AUTO, EARLIER_DTYPE, with_dtypes
from jaxsi.runs.first_process import from_first
from jaxsi.runs.run import Scope, stored_config

Config = TypeVar("Config")
Seconds = Callable[[int, str], float]

# Rows of a decoding step and of a short prompt, times weights that are too large for the caches of a processor, as
# those of a model are. With small weights bfloat16 looks better than it is: JAX 0.10 makes a float32 copy of them in
# each product, which is slow when it leaves the caches.
ROWS, INNER, OUTER = (8, 64), 2048, 4096
REPEATS = 3
# How many times as long products in bfloat16 may take. JAX 0.10 on a processor without a unit for it: 2.7; JAX 0.12 on
# the same one: 0.85. The limit is far from both, and above 1, since bfloat16 takes half the memory.
LIMIT = 1.5


class Measured(NamedTuple):
    """``dtype``: the fast one. ``ratio``: the time of products in bfloat16 over their time in float32."""

    dtype: str
    ratio: float


def fast_dtype() -> str:
    """ "bfloat16" or "float32", by `measured`. Process 0 decides for all, so all have to call it."""
    return from_first(_announced)


def actual(dtype: Any) -> Any:
    """``dtype`` itself, or `fast_dtype` in place of "auto"."""
    return fast_dtype() if isinstance(dtype, str) and dtype == AUTO else dtype


def settled(config: Config, directory: Path | str) -> Config:
    """``config`` with a real dtype in place of every "auto" in it: `fast_dtype` if ``directory`` holds no run, else the
    dtype with which the run began. A line on stderr says which, if there is an "auto".

    Args:
      config: a frozen dataclass, or a mapping; see `with_dtypes`.

    Raises: RunError if ``directory`` holds something that is not a run.
    """
    count = len(_stored_dtypes(config, None))
    if not count:
        return config

    def chosen() -> list[str]:
        stored = stored_config(Path(directory))
        if stored is None:
            return [_announced()] * count
        dtypes = [dtype or EARLIER_DTYPE for dtype in _stored_dtypes(config, stored)]
        print(f"dtype auto: {' and '.join(sorted(set(dtypes)))}, as this run began", file=sys.stderr, flush=True)
        return dtypes

    rest = iter(from_first(chosen))
    return with_dtypes(config, lambda _: next(rest))


def settled_in(scope: Scope, config: Config) -> Config:
    """``config`` with a real dtype in place of every "auto", for a stage that is called outside of a method. The scope
    keeps the dtype, so that a resumed run goes on in it."""
    if not _stored_dtypes(config, None):
        return config
    dtype = scope.value("dtype", fast_dtype)
    return with_dtypes(config, lambda _: dtype)


def _stored_dtypes(config: Any, stored: Any) -> list[str | None]:
    """What a stored config has in place of each "auto" of ``config``, in order."""
    found: list[str | None] = []

    def note(dtype: str | None) -> str:
        found.append(dtype)
        return AUTO

    with_dtypes(config, note, stored)
    return found


# --------------------------------------------------------------------------------------------------------- measurement


@functools.cache
def _announced() -> str:
    """The dtype of `measured`, once a process; a line on stderr says what was measured."""
    dtype, ratio = measured(product_seconds())
    times = f"products in bfloat16 take {ratio:.1f} times as long as in float32 on this device"
    print(f"dtype auto: {dtype} ({times})", file=sys.stderr, flush=True)
    return dtype


def measured(seconds: Seconds) -> Measured:
    """The fast dtype by timings: ``seconds(rows, dtype)`` is the time of one product with that many rows.

    The two dtypes take turns, and the shortest time counts: what else the machine does makes times longer.
    """
    ratios = []
    for rows in ROWS:
        turns = [(seconds(rows, "bfloat16"), seconds(rows, "float32")) for _ in range(REPEATS)]
        low, high = (min(times) for times in zip(*turns, strict=True))
        ratios.append(low / high)
    ratio = math.prod(ratios) ** (1 / len(ratios))
    return Measured("float32" if ratio > LIMIT else "bfloat16", ratio)


def product_seconds() -> Seconds:
    """Times products on the default device: [rows, INNER] x [INNER, OUTER].

    On a processor it is the time of this process on all cores, which other processes hardly change.
    """
    weights = {dtype: jnp.full((INNER, OUTER), 1 / INNER, dtype) for dtype in ("bfloat16", "float32")}
    multiply = jax.jit(jnp.matmul)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    @functools.cache
    def operand(rows: int, dtype: str) -> jax.Array:
        x = jnp.ones((rows, INNER), dtype)
        multiply(x, weights[dtype]).block_until_ready()  # compiles
        return x

    def seconds(rows: int, dtype: str) -> float:
        x = operand(rows, dtype)
        start = clock()
        multiply(x, weights[dtype]).block_until_ready()
        return clock() - start

    return seconds
