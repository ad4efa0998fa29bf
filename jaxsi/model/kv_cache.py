"""Keys and values of earlier tokens, as they are or as int8: an array of keys and one of values a layer.

Dimension letters as in model.py. Every array of a cache has rows, heads and columns as its first three axes, so that
what moves columns about need not know which kind it is.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp


class Int8(NamedTuple):
    """numbers [B, K, S, C] int8, each times its column's scale [B, K, S, 1] float32: half the bytes of bfloat16."""

    numbers: jax.Array
    scales: jax.Array


class Held(NamedTuple):
    """What the columns of a cache hold. positions_BS int32: the text position of each, -1 for none. column: int32
    scalar, the one that all rows write next."""

    positions_BS: jax.Array
    column: jax.Array


KVCache = Literal["exact", "int8"]
Stored = Any  # an array [B, K, S, C], or Int8
Cache = list[tuple[Stored, Stored]]  # (keys, values) of each layer


def quantized(x_BKSC: jax.Array) -> Int8:
    """Rounded to 255 levels, symmetric, the largest magnitude of each token and head at 127."""
    x_BKSC = x_BKSC.astype(jnp.float32)
    scales_BKS1 = jnp.max(jnp.abs(x_BKSC), axis=-1, keepdims=True) / 127
    numbers_BKSC = jnp.round(x_BKSC / jnp.maximum(scales_BKS1, jnp.finfo(jnp.float32).tiny))
    return Int8(numbers_BKSC.astype(jnp.int8), scales_BKS1)


def stored_like(x_BKSC: jax.Array, stored: Stored) -> Stored:
    """New columns as those of ``stored`` are."""
    return quantized(x_BKSC) if isinstance(stored, Int8) else x_BKSC.astype(stored.dtype)


def exact(stored: Stored, dtype: Any) -> jax.Array:
    """The columns [B, K, S, C] in ``dtype``."""
    return (stored.numbers * stored.scales).astype(dtype) if isinstance(stored, Int8) else stored


def split(stored: Stored, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """(numbers [B, K, S, C] in ``dtype``, scales [B, K, S] or None): what is read is as small as what is stored."""
    return (stored.numbers.astype(dtype), stored.scales[..., 0]) if isinstance(stored, Int8) else (stored, None)


def bytes_of_number(cache: KVCache, itemsize: int, head_dim: int) -> float:
    """Bytes that a number of the keys or values takes, its part of the scale among them; ``itemsize``: when exact."""
    return 1 + 4 / head_dim if cache == "int8" else itemsize


def kept(tokens: int, window: int) -> int:
    """Columns of so many tokens, or of the last of them: a layer with this window sees no more than a power of two."""
    return min(tokens, 1 << (window - 1).bit_length())


def columns(cache: Cache) -> int:
    """S, of a cache whose layers have as many."""
    return jax.tree.leaves(cache)[0].shape[2]
