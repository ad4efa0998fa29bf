"""Attention over whole sequences and over a cache. Dimension letters as in decoder.py."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsi.model import fused_attention, kv_cache, mesh as meshlib
from jaxsi.model.cpu_matmul import settle
from jaxsi.model.kv_cache import Stored
from jaxsi.model.tiles import over_tiles

QUERY_TILE = 512  # queries whose scores exist at a time, so that memory grows with T and not with T squared
SHARED = -1  # the segment that every token after it in its row sees
UNSEEN = -1e30  # the score of a hidden key; finite, because the padded queries of the last tile see no key at all


def attend(q_BTHC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention, softmax in float32 -> [B, T, H, C]. Every query must see at least one key."""
    B, T, H, C = q_BTHC.shape
    K = k_BKSC.shape[1]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores_BKGTS = jnp.einsum("BTKGC,BKSC->BKGTS", q_BTKGC, k_BKSC, preferred_element_type=jnp.float32) / math.sqrt(C)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf)
    shares_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSC.dtype)
    return jnp.einsum("BKGTS,BKSC->BTKGC", shares_BKGTS, v_BKSC).reshape(B, T, H, C)


def attend_last(q_BHC: jax.Array, keys: Stored, values: Stored, mask_BS: jax.Array) -> jax.Array:
    """``attend`` for one query per row -> [B, H, C].

    Keys and values are read in place. (With a query axis of length 1, XLA would copy both into another layout at every
    step.) The scales of an int8 cache multiply the scores and the shares, not the columns.
    """
    B, H, C = q_BHC.shape
    (k_BKSC, by_key_BKS), (v_BKSC, by_value_BKS) = (kv_cache.split(stored, q_BHC.dtype) for stored in (keys, values))
    K = k_BKSC.shape[1]
    q_BKGC = q_BHC.reshape(B, K, H // K, C)
    scores_BKGS = jnp.einsum("BKGC,BKSC->BKGS", q_BKGC, k_BKSC, preferred_element_type=jnp.float32)
    if by_key_BKS is not None:
        scores_BKGS *= by_key_BKS[:, :, None]
    scores_BKGS = jnp.where(mask_BS[:, None, None], scores_BKGS / math.sqrt(C), -jnp.inf)
    shares_BKGS = jax.nn.softmax(scores_BKGS, axis=-1)
    if by_value_BKS is not None:
        shares_BKGS *= by_value_BKS[:, :, None]
    return jnp.einsum("BKGS,BKSC->BKGC", shares_BKGS.astype(v_BKSC.dtype), v_BKSC).reshape(B, H, C)


def attend_causally(
    q_BTHC: jax.Array,
    k_BKSC: jax.Array,
    v_BKSC: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    window: jax.Array | int,
    *,
    lengths_B: jax.Array | None = None,
    forked: bool = False,
    mesh: Mesh | None = None,
    tile: int = QUERY_TILE,
) -> jax.Array:
    """Attention [B, T, H, C] of sequences to themselves (S = T).

    Each token sees its own segment and the segment ``SHARED``, up to itself and at most ``window`` positions back.
    Padding is a segment of its own (id 0), whose output is undefined.

    On a mesh of TPUs this is Splash attention, on a mesh of GPUs cuDNN's, if these take the shapes and the window is an
    ``int``. Otherwise, and without a mesh, it is XLA's, by tiles if there are more than ``tile`` queries. The mesh
    decides, not the backend: programs for other machines are compiled ahead of time. The scores are never kept for the
    backward pass.

    Args:
      positions_BT: count up by one within a segment.
      lengths_B: int32; the number of tokens in each row, if every row is one segment with padding behind it. cuDNN has
        no segments and is used only with these.
      forked: whether rows consist of the segments ``SHARED``, 1 and 2, in this order.
    """
    if mesh is not None and isinstance(window, int) and fused_attention.divides(q_BTHC, k_BKSC, mesh):
        platform = meshlib.platform(mesh)
        # Splash measures windows in columns, and the second branch's columns are not its positions.
        unbroken = not forked or window >= q_BTHC.shape[1]
        if platform == "tpu" and fused_attention.splash_takes(q_BTHC) and unbroken:
            kernel = functools.partial(fused_attention.splash, window=window)
            splash = functools.partial(each_branch, kernel) if forked else kernel
            return fused_attention.on_mesh(splash, mesh)(q_BTHC, k_BKSC, v_BKSC, segments_BT)
        if platform == "gpu" and lengths_B is not None and fused_attention.cudnn_takes(q_BTHC, window):
            return fused_attention.on_mesh(fused_attention.cudnn, mesh)(q_BTHC, k_BKSC, v_BKSC, lengths_B)
    B, T, H, C = q_BTHC.shape
    K = k_BKSC.shape[1]
    tile = min(tile, T)
    padded = -(-T // tile) * tile
    places = _Places(segments_BT, positions_BT, jnp.asarray(window, jnp.int32))
    q_BKTGC = q_BTHC.reshape(B, T, K, H // K, C).swapaxes(1, 2)
    q_BKTGC = jnp.pad(q_BKTGC, ((0, 0), (0, 0), (0, padded - T), (0, 0), (0, 0)))
    attended_BKTGC = _attend(q_BKTGC, k_BKSC, v_BKSC, places, tile)
    return attended_BKTGC[:, :, :T].swapaxes(1, 2).reshape(B, T, H, C)


def each_branch(
    attention: Callable[..., jax.Array], q_BTHC: jax.Array, k_BKTC: jax.Array, v_BKTC: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Attention on forked rows by a kernel that only compares segments: it runs once per branch, each time with the
    shared tokens."""

    def seen_with(branch: int) -> jax.Array:
        belongs_BT = (segments_BT == SHARED) | (segments_BT == branch)
        return attention(q_BTHC, k_BKTC, v_BKTC, jnp.where(belongs_BT, branch, 0))

    return jnp.where((segments_BT == 2)[:, :, None, None], seen_with(2), seen_with(1))


class _Places(NamedTuple):
    """Where the tokens are, which decides what each of them sees."""

    segments_BS: jax.Array
    positions_BS: jax.Array
    window: jax.Array

    def seen_from(self, start: Any, size: int) -> jax.Array:
        """[B, size, S] bool: the keys that ``size`` queries from ``start`` on see."""
        S = self.segments_BS.shape[1]

        def cut(x_BS: jax.Array) -> jax.Array:
            padded_BS = jnp.pad(x_BS, ((0, 0), (0, -S % size)))
            return jax.lax.dynamic_slice_in_dim(padded_BS, start, size, axis=1)[:, :, None]

        same_BtS = (cut(self.segments_BS) == self.segments_BS[:, None]) | (self.segments_BS == SHARED)[:, None]
        distance_BtS = cut(self.positions_BS) - self.positions_BS[:, None]
        earlier_tS = (start + jnp.arange(size))[:, None] >= jnp.arange(S)[None]
        return same_BtS & earlier_tS[None] & (distance_BtS < self.window)


def _scores(q_BKtGC: jax.Array, k_BKSC: jax.Array, places: _Places, start: Any) -> jax.Array:
    """[B, K, t, G, S] float32."""
    B, K, t, G, C = q_BKtGC.shape
    q_BKTC = q_BKtGC.reshape(B, K, t * G, C)
    scores_BKTS = jnp.einsum("BKTC,BKSC->BKTS", q_BKTC, k_BKSC, preferred_element_type=jnp.float32) / math.sqrt(C)
    seen_BtS = settle(places.seen_from(start, t))  # computed once, not for every head
    return jnp.where(seen_BtS[:, None, :, None], scores_BKTS.reshape(B, K, t, G, -1), UNSEEN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BKTGC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, places: _Places, tile: int) -> jax.Array:
    """[B, K, T, G, C], by tiles of queries."""
    return _forward(q_BKTGC, k_BKSC, v_BKSC, places, tile)[0]


def _forward(q_BKTGC: jax.Array, k_BKSC: jax.Array, v_BKSC: jax.Array, places: _Places, tile: int) -> Any:
    def step(_: None, start: Any, q_BKtGC: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        scores_BKtGS = _scores(q_BKtGC, k_BKSC, places, start)
        mass_BKtG = jax.nn.logsumexp(scores_BKtGS, axis=-1)
        shares_BKtGS = jax.nn.softmax(scores_BKtGS, axis=-1).astype(v_BKSC.dtype)
        B, K, t, G, S = shares_BKtGS.shape
        attended = jnp.einsum("BKTS,BKSC->BKTC", shares_BKtGS.reshape(B, K, t * G, S), v_BKSC)
        return None, (attended.reshape(q_BKtGC.shape), mass_BKtG)

    _, (attended_BKTGC, mass_BKTG) = over_tiles(step, None, q_BKTGC, tile, axis=2)
    return attended_BKTGC, (q_BKTGC, k_BKSC, v_BKSC, places, attended_BKTGC, mass_BKTG)


def _backward(tile: int, saved: Any, by_attended_BKTGC: jax.Array) -> Any:
    """The gradient of softmax attention.

    With the shares P and the gradient dO of the output: dV = P' dO, dS = P (dO V' - rowsum(dO O)), dQ = dS K,
    dK = dS' Q.
    """
    q_BKTGC, k_BKSC, v_BKSC, places, attended_BKTGC, mass_BKTG = saved
    q_BKTGC, k_BKSC, v_BKSC, by_attended_BKTGC = settle((q_BKTGC, k_BKSC, v_BKSC, by_attended_BKTGC))
    product_BKTG = jnp.sum(attended_BKTGC.astype(jnp.float32) * by_attended_BKTGC.astype(jnp.float32), axis=-1)

    def step(sums: Any, start: Any, tiles: Any) -> Any:
        q_BKtGC, by_BKtGC, product_BKtG, mass_BKtG = tiles
        B, K, t, G, C = q_BKtGC.shape

        def flat(x: jax.Array) -> jax.Array:
            return x.reshape(B, K, t * G, x.shape[-1])

        shares_BKtGS = jnp.exp(_scores(q_BKtGC, k_BKSC, places, start) - mass_BKtG[..., None])
        by_shares = jnp.einsum("BKTC,BKSC->BKTS", flat(by_BKtGC), v_BKSC, preferred_element_type=jnp.float32)
        by_scores_BKtGS = shares_BKtGS * (by_shares.reshape(shares_BKtGS.shape) - product_BKtG[..., None])
        by_scores = flat((by_scores_BKtGS / math.sqrt(C)).astype(q_BKtGC.dtype))
        by_scores, shares = settle((by_scores, flat(shares_BKtGS.astype(v_BKSC.dtype))))
        by_q = jnp.einsum("BKTS,BKSC->BKTC", by_scores, k_BKSC)
        by_k = jnp.einsum("BKTS,BKTC->BKSC", by_scores, flat(q_BKtGC), preferred_element_type=jnp.float32)
        by_v = jnp.einsum("BKTS,BKTC->BKSC", shares, flat(by_BKtGC), preferred_element_type=jnp.float32)
        return (sums[0] + by_k, sums[1] + by_v), by_q.reshape(q_BKtGC.shape)

    zeros_BKSC = jnp.zeros(k_BKSC.shape, jnp.float32)
    tiled = (q_BKTGC, by_attended_BKTGC, product_BKTG, mass_BKTG)
    (by_k, by_v), by_q = over_tiles(step, (zeros_BKSC, zeros_BKSC), tiled, tile, axis=2)
    return *settle((by_q, by_k.astype(k_BKSC.dtype), by_v.astype(v_BKSC.dtype))), None


_attend.defvjp(_forward, _backward)
