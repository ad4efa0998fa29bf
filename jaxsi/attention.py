"""Attention over whole sequences and over a cache. Dimension letters as in model.py."""

import math

import jax
import jax.numpy as jnp

QUERY_TILE = 512  # queries whose scores exist at a time: memory grows with T, not with T squared


def attend(q_BTHC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention, softmax in float32 -> [B, T, H, C]. Every query must see at least one key."""
    B, T, H, C = q_BTHC.shape
    K = k_BKSC.shape[1]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores_BKGTS = jnp.einsum("BTKGC,BKSC->BKGTS", q_BTKGC, k_BKSC, preferred_element_type=jnp.float32) / math.sqrt(C)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    shares_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSC.dtype)
    return jnp.einsum("BKGTS,BKSC->BTKGC", shares_BKGTS, v_BKSC).reshape(B, T, H, C)


def attend_causally(
    q_BTHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    window: jax.Array | int,
    *,
    tile: int = QUERY_TILE,
) -> jax.Array:
    """Attention [B, T, H, C] of sequences to themselves (S = T): each token sees its own segment up to itself, at most
    ``window`` positions back. Padding is a segment of its own (id 0).

    More than ``tile`` queries go through in tiles, each recomputed in the backward pass.
    """
    T = q_BTHC.shape[1]

    def attend_from(start: jax.Array | int, size: int) -> jax.Array:
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)  # noqa: E731
        same_BTS = cut(segments_BT)[:, :, None] == segments_BT[:, None, :]
        distance_BTS = cut(positions_BT)[:, :, None] - positions_BT[:, None, :]
        earlier_TS = (start + jnp.arange(size))[:, None] >= jnp.arange(T)[None, :]
        return attend(cut(q_BTHC), k_BKSC, v_BKSC, same_BTS & earlier_TS[None] & (distance_BTS < window))

    if tile >= T:
        return attend_from(0, T)
    whole = T // tile * tile
    starts = jnp.arange(0, whole, tile)
    one_tile = jax.checkpoint(lambda _, start: (None, attend_from(start, tile)))
    _, tiles = jax.lax.scan(one_tile, None, starts)
    attended_BTHC = tiles.swapaxes(0, 1).reshape(q_BTHC.shape[0], whole, *q_BTHC.shape[2:])
    if whole == T:
        return attended_BTHC
    return jnp.concatenate([attended_BTHC, attend_from(whole, T - whole)], axis=1)
