"""Next tokens from logits: temperature, top-p and top-k without sorting the vocabulary, noise from named keys.

Every new shape compiles this again. On a CPU, the time for that is nearly proportional to the number of loops that XLA
generates. So there is one search for both truncations, one draw for both attempts, noise in one loop, and indices are
reduced as floats.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAX_STOPS = 8
MAX_MARKER = 32  # the most tokens of a text that ends a response
ATTEMPTS = 4  # draws from the whole distribution, before the nucleus is computed
BITS = 30  # of a float in [0, 2); as integers they have the same order as the floats


class Settings(NamedTuple):
    """Sampling settings as traced values: a change does not compile again.

    Scalars unless a comment says otherwise. Temperature 0 is greedy; top_k 0 and top_p 1 are off.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    stop_ids: jax.Array  # [MAX_STOPS] int32, filled up with -1
    marker: jax.Array  # [MAX_MARKER] int32: a text that ends a response, right-aligned behind -1
    limit: jax.Array  # int32 scalar: the most new tokens


def ended(recent_BM: jax.Array, s: Settings) -> jax.Array:
    """Whether the newest of the tokens [B, MAX_MARKER] (oldest first) is a stop id or completes the marker."""
    by_id_B = jnp.any(recent_BM[:, -1:] == s.stop_ids[None, :], axis=-1)
    same_BM = (recent_BM == s.marker[None, :]) | (s.marker < 0)[None, :]
    return by_id_B | (jnp.all(same_BM, axis=-1) & (s.marker[-1] >= 0))


def truncate(p_BV: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Unnormalised probabilities, set to 0 outside the top k and, within these, outside the nucleus of mass p.

    Ties stay in. The threshold is found bit by bit: the largest probability that k tokens reach, then the mass of these
    tokens in one pass, then the largest probability such that the tokens that reach it have p of this mass. This is
    exact after 61 passes (31 without top k). Sorting the vocabulary costs many times more.
    """

    def step(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        bits_B, target_B = state
        bit = (1 << (BITS - jnp.where(i > BITS, i - BITS - 1, i))) >> 1  # 0 at i = BITS, between the two searches
        tried_B = bits_B | bit
        reach_BV = p_BV >= jax.lax.bitcast_convert_type(tried_B, jnp.float32)[:, None]
        reach_B = jnp.sum(jnp.where(reach_BV, jnp.where(i < BITS, 1.0, p_BV), 0.0), axis=-1)
        bits_B = jnp.where(i == BITS, 0, jnp.where(reach_B >= target_B, tried_B, bits_B))
        return bits_B, jnp.where(i == BITS, top_p * reach_B, target_B)

    B = p_BV.shape[0]
    first, end = jnp.where(top_k > 0, 0, BITS), jnp.where(top_p < 1, 2 * BITS + 1, BITS)
    state = jnp.zeros((B,), jnp.int32), jnp.full((B,), top_k, jnp.float32)
    bits_B, _ = jax.lax.fori_loop(first, end, step, state)
    return jnp.where(p_BV >= jax.lax.bitcast_convert_type(bits_B, jnp.float32)[:, None], p_BV, 0.0)


def _width(V: int) -> int:
    """Children per node of a three-level tree with V leaves."""
    return next(W for W in itertools.count(1) if W**3 >= V)


def draw(p_BV: jax.Array, u_BA: jax.Array) -> jax.Array:
    """Indices [B, A] int32 drawn from unnormalised probabilities: inverts the CDF at u in [0, 1), down a three-level
    tree of sums."""
    B, V = p_BV.shape
    W = _width(V)
    p_BNW = jnp.pad(p_BV, ((0, 0), (0, W**3 - V))).reshape(B, W * W, W)
    sums_BWW = jnp.sum(p_BNW, axis=-1).reshape(B, W, W)
    sums_BW = jnp.sum(sums_BWW, axis=-1)
    before_WW = np.tri(W, k=-1, dtype=bool)

    def descend(mass_BAW: jax.Array, target_BA: jax.Array) -> tuple[jax.Array, jax.Array]:
        starts_BAW = jnp.sum(jnp.where(before_WW, mass_BAW[:, :, None], 0.0), axis=-1)
        child_BA = _last_reached(starts_BAW, mass_BAW, target_BA)
        start_BA = jnp.take_along_axis(starts_BAW, child_BA[..., None], axis=-1, mode="promise_in_bounds")[..., 0]
        return child_BA, jnp.maximum(target_BA - start_BA, 0.0)  # below 0 if XLA fuses u * total with the difference

    target_BA = u_BA * jnp.sum(sums_BW, axis=-1, keepdims=True)
    node_BA, target_BA = descend(jnp.broadcast_to(sums_BW[:, None], (*u_BA.shape, W)), target_BA)
    children = jax.vmap(lambda level_NW, node_A: level_NW.at[node_A].get(mode="promise_in_bounds"))
    for level_BNW in (sums_BWW, p_BNW):
        child_BA, target_BA = descend(children(level_BNW, node_BA), target_BA)
        node_BA = node_BA * W + child_BA
    return node_BA


def _last_reached(starts_BAW: jax.Array, mass_BAW: jax.Array, target_BA: jax.Array) -> jax.Array:
    """The last index [B, A] int32 that starts at or below the target and has a mass above 0.

    It exists, because the first index with mass starts at 0. Sums are not monotone to the last bit: without the
    condition on the mass, a token that was cut off could be drawn.
    """
    reached_BAW = (starts_BAW <= target_BA[..., None]) & (mass_BAW > 0)
    places_W = np.arange(mass_BAW.shape[-1], dtype=np.float32)
    return jnp.max(jnp.where(reached_BAW, places_W, 0.0), axis=-1).astype(jnp.int32)


def noise(keys_B: jax.Array, counts_B: jax.Array, size: int) -> jax.Array:
    """Numbers [B, size] in [0, 1), each from one word of ``jax.random.fold_in(key, size * count + i)``.

    This is the same threefry, unrolled: JAX's own takes five times as long to compile for a CPU.
    """
    k0_B1, k1_B1 = jnp.split(jax.random.key_data(keys_B), 2, axis=1)
    keys = k0_B1, k1_B1, k0_B1 ^ k1_B1 ^ np.uint32(0x1BD11BDA)
    numbers_BA = counts_B.astype(jnp.uint32)[:, None] * size + np.arange(size, dtype=np.uint32)[None]
    x_BA, y_BA = jnp.broadcast_to(k0_B1, numbers_BA.shape), numbers_BA + k1_B1
    for i in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x_BA += y_BA
            y_BA = x_BA ^ (y_BA << r | y_BA >> 32 - r)
        x_BA, y_BA = x_BA + keys[(i + 1) % 3], y_BA + keys[(i + 2) % 3] + np.uint32(i + 1)
    return (x_BA >> 8).astype(jnp.float32) * 2.0**-24


def draw_truncated(p_BV: jax.Array, u_BA: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Indices [B] int32 drawn from the nucleus and the top k of unnormalised probabilities; needs 2 ATTEMPTS u per row.

    A draw from the whole distribution that lies in the nucleus is a draw from the nucleus. Checking this takes one pass
    over the vocabulary, for the mass of all likelier tokens. A row takes the first of ATTEMPTS draws that lies inside.
    If every draw lies outside (10 in 100,000 rows at top-p 0.9), or if top k is on, the loop runs once more, on the
    nucleus only.
    """
    nucleus_B1 = jnp.where(top_p < 1, top_p * jnp.sum(p_BV, axis=-1, keepdims=True), jnp.inf)

    def attempt(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        cut_out, drawn_B, settled_B = state
        truncated_BV = truncate(p_BV, jnp.where(cut_out, top_p, 1.0), jnp.where(cut_out, top_k, 0))
        drawn_BA = draw(truncated_BV, jnp.where(cut_out, u_BA[:, ATTEMPTS:], u_BA[:, :ATTEMPTS]))
        p_BA = jnp.take_along_axis(p_BV, drawn_BA, axis=1, mode="promise_in_bounds")
        above_BA = jnp.sum(jnp.where(p_BV[:, None] > p_BA[..., None], p_BV[:, None], 0.0), axis=-1)
        inside_BA = (above_BA < nucleus_B1) | cut_out
        for a in range(ATTEMPTS):
            drawn_B = jnp.where(settled_B, drawn_B, drawn_BA[:, a])
            settled_B |= inside_BA[:, a]
        return jnp.bool_(True), drawn_B, settled_B

    B = p_BV.shape[0]
    start = top_k > 0, jnp.zeros((B,), jnp.int32), jnp.zeros((B,), bool)
    return jax.lax.while_loop(lambda state: ~jnp.all(state[2]), attempt, start)[1]


def sample_tokens(
    logits_BV: jax.Array, keys_B: jax.Array, counts_B: jax.Array, s: Settings
) -> tuple[jax.Array, jax.Array]:
    """Next tokens [B] and their log-probabilities [B] under the untruncated softmax at temperature 1.

    ``counts_B`` is the number of tokens that each row has; its noise is its key folded with that number. At temperature
    0 only the likeliest tokens have probability, and a noise of 0 draws the first of them.
    """
    V = logits_BV.shape[1]
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = jnp.pad(logits_BV, ((0, 0), (0, _width(V) ** 3 - V)), constant_values=-jnp.inf)
    greedy = s.temperature <= 0
    p_BV = jnp.exp(logits_BV / jnp.maximum(s.temperature, 1e-30))
    u_BA = jnp.where(greedy, 0.0, noise(keys_B, counts_B, 2 * ATTEMPTS))
    token_B = draw_truncated(p_BV, u_BA, jnp.where(greedy, 1.0, s.top_p), jnp.where(greedy, 0, s.top_k))
    mass_B = jnp.sum(jnp.exp(logits_BV), axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1, mode="promise_in_bounds")[:, 0]
    return token_B, chosen_B - jnp.log(mass_B)
