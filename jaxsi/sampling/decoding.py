"""The decoder one step at a time: prompts go into a cache of keys and values, then each step gives one token per row.

Dimension letters as in decoder.py; weights are unstacked (``LM.sampling_weights``).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsi.model import decoder, kv_cache
from jaxsi.model.attention import attend, attend_causally, attend_last
from jaxsi.model.decoder import ModelConfig, Weights
from jaxsi.model.kv_cache import Cache, Contents, Stored


def prefill(
    weights: Weights,
    config: ModelConfig,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    *,
    dtype: Any,
    lengths_B: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs prompts through unstacked weights; rows are right-padded, or hold several prompts.

    Returns the normalised hidden states [B, T, D], and the cache with one column per token.
    """
    x_BTD = decoder.embed(weights, tokens_BT, dtype)
    cache: Cache = []
    for layer, window in zip(weights["layers"], decoder.windows(config), strict=True):
        q_BTHC, k_BKSC, v_BKSC = decoder.qkv(layer, config, x_BTD, positions_BT)
        attended_BTHC = attend_causally(
            q_BTHC, k_BKSC, v_BKSC, segments_BT, positions_BT, window, lengths_B=lengths_B, mesh=mesh
        )
        x_BTD = decoder.after_attention(layer, config, x_BTD, attended_BTHC)
        cache.append((k_BKSC, v_BKSC))
    return decoder.rms_norm(x_BTD, weights["final_norm"], config.norm_eps), cache


def extend(
    weights: Weights,
    config: ModelConfig,
    tokens_BT: jax.Array,
    counts_B: jax.Array,
    cache: Cache,
    lengths_B: jax.Array,
    *,
    dtype: Any,
) -> tuple[jax.Array, Cache]:
    """Appends ``counts_B`` more tokens (right-padded to T) to the ``lengths_B`` tokens of each row's cache.

    Returns the hidden state [B, D] of each row's last token, and the cache. The cache keeps its length and must have
    room for all tokens: column s of a row is its token s.
    """
    columns_S = jnp.arange(kv_cache.columns(cache), dtype=jnp.int32)
    positions_BT = lengths_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    source_BS = columns_S[None] - lengths_B[:, None]  # the number of the new token that each column gets
    is_new_B1S1 = ((source_BS >= 0) & (source_BS < counts_B[:, None]))[:, None, :, None]
    source_B1S1 = jnp.clip(source_BS, 0, tokens_BT.shape[1] - 1)[:, None, :, None]
    distance_BTS = positions_BT[:, :, None] - columns_S[None, None]

    def merge(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(is_new_B1S1, jnp.take_along_axis(new, source_B1S1, axis=2), old)

    def append(stored: Stored, new_BKTC: jax.Array) -> Stored:
        return jax.tree.map(merge, stored, kv_cache.stored_like(new_BKTC, stored))

    x_BTD = decoder.embed(weights, tokens_BT, dtype)
    longer: Cache = []
    for layer, window, (keys, values) in zip(weights["layers"], decoder.windows(config), cache, strict=True):
        q_BTHC, k_new, v_new = decoder.qkv(layer, config, x_BTD, positions_BT)
        keys, values = append(keys, k_new), append(values, v_new)
        k_BKSC, v_BKSC = kv_cache.exact(keys, dtype), kv_cache.exact(values, dtype)
        attended_BTHC = attend(q_BTHC, k_BKSC, v_BKSC, (distance_BTS >= 0) & (distance_BTS < window))
        x_BTD = decoder.after_attention(layer, config, x_BTD, attended_BTHC)
        longer.append((keys, values))
    last_BD = jnp.take_along_axis(x_BTD, (counts_B - 1)[:, None, None], axis=1)[:, 0]
    return decoder.rms_norm(last_BD, weights["final_norm"], config.norm_eps), longer


def decode(
    weights: Weights,
    config: ModelConfig,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    cache: Cache,
    contents: Mapping[int, Contents],
    *,
    dtype: Any,
) -> tuple[jax.Array, Cache]:
    """Runs one token per row through unstacked weights.

    Returns the hidden states [B, D], and the cache with one column written.

    Args:
      contents: by the window of a layer, what its cache holds, including the new tokens, and the column that gets them.
        (All rows share this column, because their prompts are right-padded.)
    """
    x_BTD = decoder.embed(weights, tokens_B[:, None], dtype)

    def sees(window: int, positions_BS: jax.Array) -> jax.Array:
        distance_BS = positions_B[:, None] - positions_BS
        return (positions_BS >= 0) & (distance_BS >= 0) & (distance_BS < window)

    def write(column: jax.Array, old: Stored, new_BKTC: jax.Array) -> Stored:
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=column, axis=2)
        return jax.tree.map(update, old, kv_cache.stored_like(new_BKTC, old))

    masks = {window: sees(window, columns.positions_BS) for window, columns in contents.items()}
    new_cache: Cache = []
    for layer, window, (keys, values) in zip(weights["layers"], decoder.windows(config), cache, strict=True):
        q_BTHC, k_new, v_new = decoder.qkv(layer, config, x_BTD, positions_B[:, None])
        column = contents[window].column
        keys, values = write(column, keys, k_new), write(column, values, v_new)
        attended_BHC = attend_last(q_BTHC[:, 0], keys, values, masks[window])
        x_BTD = decoder.after_attention(layer, config, x_BTD, attended_BHC[:, None])
        new_cache.append((keys, values))
    return decoder.rms_norm(x_BTD[:, 0], weights["final_norm"], config.norm_eps), new_cache
