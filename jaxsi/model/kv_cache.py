"""Keys and values of earlier tokens, exact or as int8: an array of keys and an array of values per layer.

Dimension letters as in decoder.py. Every array of a cache has rows, heads and columns as its first three axes, so that
code that moves columns need not know which kind it is.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp


class Int8(NamedTuple):
    """numbers [B, K, S, C] int8, to be multiplied by scales [B, K, S, 1] float32: half the bytes of bfloat16."""

    numbers: jax.Array
    scales: jax.Array


class Contents(NamedTuple):
    """What the columns of a cache hold.

    positions_BS int32: the text position of each column, -1 if it is empty. column: int32 scalar, the one that all rows
    write next.
    """

    positions_BS: jax.Array
    column: jax.Array


KVCache = Literal["exact", "int8"]
Stored = Any  # an array [B, K, S, C], or Int8
Cache = list[tuple[Stored, Stored]]  # (keys, values) of each layer


def quantized(x_BKSC: jax.Array) -> Int8:
    """Rounded to 255 symmetric levels; the largest magnitude of each token and head becomes 127."""
    x_BKSC = x_BKSC.astype(jnp.float32)
    scales_BKS1 = jnp.max(jnp.abs(x_BKSC), axis=-1, keepdims=True) / 127
    numbers_BKSC = jnp.round(x_BKSC / jnp.maximum(scales_BKS1, jnp.finfo(jnp.float32).tiny))
    return Int8(numbers_BKSC.astype(jnp.int8), scales_BKS1)


def stored_like(x_BKSC: jax.Array, stored: Stored) -> Stored:
    """New columns in the form of those in ``stored``."""
    return quantized(x_BKSC) if isinstance(stored, Int8) else x_BKSC.astype(stored.dtype)


def exact(stored: Stored, dtype: Any) -> jax.Array:
    """The columns [B, K, S, C] in ``dtype``."""
    return (stored.numbers * stored.scales).astype(dtype) if isinstance(stored, Int8) else stored


def split(stored: Stored, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """(numbers [B, K, S, C] in ``dtype``, scales [B, K, S] or None), so that no more bytes are read than are stored."""
    return (stored.numbers.astype(dtype), stored.scales[..., 0]) if isinstance(stored, Int8) else (stored, None)


def bytes_of_number(cache: KVCache, itemsize: int, head_dim: int) -> float:
    """Bytes per number of the keys or values, including its part of the scale; ``itemsize`` if the cache is exact."""
    return 1 + 4 / head_dim if cache == "int8" else itemsize


def columns_seen(tokens: int, window: int) -> int:
    """Columns that a layer with this window needs for a text of ``tokens``: all, or as many as its window, rounded up
    to a power of two."""
    return min(tokens, 1 << (window - 1).bit_length())


def columns(cache: Cache) -> int:
    """S of a cache whose layers all have the same number of columns."""
    return jax.tree.leaves(cache)[0].shape[2]
