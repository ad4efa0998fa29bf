"""Next tokens from logits: temperature, top-p and top-k without sorting the vocabulary, noise from named keys."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAX_STOPS = 8
MAX_MARKER = 32  # tokens of a text that ends a response
ATTEMPTS = 4  # draws from the whole distribution before the nucleus is cut out


class Settings(NamedTuple):
    """Sampling settings, traced: other values do not compile again. Scalars; temperature 0 is greedy, top_k 0 and
    top_p 1 are off."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    stop_ids: jax.Array  # [MAX_STOPS] int32, -1 for none
    marker: jax.Array  # [MAX_MARKER] int32: a text that ends a response, right-aligned after -1
    limit: jax.Array  # int32 scalar: most new tokens


def ended(recent_BM: jax.Array, s: Settings) -> jax.Array:
    """Whether the newest of the tokens [B, MAX_MARKER], oldest first, is a stop id or the last of the marker."""
    by_id_B = jnp.any(recent_BM[:, -1:] == s.stop_ids[None, :], axis=-1)
    same_BM = (recent_BM == s.marker[None, :]) | (s.marker < 0)[None, :]
    return by_id_B | (jnp.all(same_BM, axis=-1) & (s.marker[-1] >= 0))


def _threshold(p_BV: jax.Array, measure: Any, target_B: jax.Array) -> jax.Array:
    """The largest t per row with measure(p >= t) >= target, found by bisection over the bits of non-negative floats,
    whose integer order is their own: exact in 31 passes, where a sort of the vocabulary costs many times more."""
    low = jnp.zeros(p_BV.shape[:1], jnp.int32)
    high = jnp.full(p_BV.shape[:1], np.float32(2.0).view(np.int32), jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        enough = measure(p_BV >= threshold) >= target_B
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def truncate(p_BV: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Unnormalised probabilities: 0 but for the top k and, of these, the nucleus of mass p (ties are kept). top_p and
    top_k are scalars, or [B]."""
    top_p_B, top_k_B = (jnp.broadcast_to(x, p_BV.shape[:1]) for x in (top_p, top_k))

    def keep_top_k(p_BV: jax.Array) -> jax.Array:
        k_B = jnp.where(top_k_B > 0, top_k_B, p_BV.shape[1])
        t_B = _threshold(p_BV, lambda kept: jnp.sum(kept, axis=-1), k_B)
        return jnp.where(p_BV >= t_B[:, None], p_BV, 0.0)

    def keep_nucleus(p_BV: jax.Array) -> jax.Array:
        mass_B = jnp.minimum(top_p_B, 1.0) * jnp.sum(p_BV, axis=-1)
        t_B = _threshold(p_BV, lambda kept: jnp.sum(jnp.where(kept, p_BV, 0.0), axis=-1), mass_B)
        return jnp.where((p_BV >= t_B[:, None]) | (top_p_B >= 1.0)[:, None], p_BV, 0.0)

    p_BV = jax.lax.cond(jnp.any(top_k_B > 0), keep_top_k, lambda p: p, p_BV)
    return jax.lax.cond(jnp.any(top_p_B < 1.0), keep_nucleus, lambda p: p, p_BV)


def draw(p_BV: jax.Array, u_BA: jax.Array) -> jax.Array:
    """Indices [B, A] int32 drawn from unnormalised probabilities by inverting the CDF at u in [0, 1), in two levels."""
    B, V = p_BV.shape
    width = max(1, int(V**0.5))
    p_BNW = jnp.pad(p_BV, ((0, 0), (0, -V % width))).reshape(B, -1, width)
    mass_BN = jnp.sum(p_BNW, axis=-1)
    ends_BN = jnp.cumsum(mass_BN, axis=-1)
    target_BA = u_BA * ends_BN[:, -1:]
    block_BA = _first_crossing(ends_BN[:, None], mass_BN[:, None], target_BA)
    row_BAW = jnp.take_along_axis(p_BNW, block_BA[:, :, None], axis=1)
    starts_BN = jnp.pad(ends_BN[:, :-1], ((0, 0), (1, 0)))
    start_BA = jnp.take_along_axis(starts_BN, block_BA, axis=1)
    within_BA = _first_crossing(start_BA[..., None] + jnp.cumsum(row_BAW, axis=-1), row_BAW, target_BA)
    return (block_BA * width + within_BA).astype(jnp.int32)


def _first_crossing(ends_BAN: jax.Array, mass_BAN: jax.Array, target_BA: jax.Array) -> jax.Array:
    """The first index whose end lies above the target and whose mass is not 0. Parallel prefix sums are not monotone
    to the last bit: without the second condition a token that was cut off could be drawn, and at the very end none
    may cross (the likeliest then)."""
    crossing_BAN = (ends_BAN > target_BA[..., None]) & (mass_BAN > 0)
    found_BA = jnp.any(crossing_BAN, axis=-1)
    return jnp.where(found_BA, jnp.argmax(crossing_BAN, axis=-1), jnp.argmax(mass_BAN, axis=-1))


def draw_truncated(p_BV: jax.Array, u_BA: jax.Array, top_p: jax.Array, top_k: jax.Array) -> jax.Array:
    """Indices [B] int32 drawn from the nucleus and the top k of unnormalised probabilities.

    A draw from all of them that lies in the nucleus is a draw from the nucleus, and whether it does takes one pass over
    the vocabulary: the mass of what is likelier. A row takes the first of A - 1 draws that does, and its last u for a
    draw from the nucleus cut out where none does (10 in 100,000 at top-p 0.9), or where its top k is limited.
    """
    drawn_BA = draw(p_BV, u_BA[:, :-1])
    p_BA = jnp.take_along_axis(p_BV, drawn_BA, axis=1)
    above_BA = jnp.sum(jnp.where(p_BV[:, None] > p_BA[..., None], p_BV[:, None], 0.0), axis=-1)
    inside_BA = (above_BA < top_p * jnp.sum(p_BV, axis=-1, keepdims=True)) | (top_p >= 1.0)
    first_B = jnp.take_along_axis(drawn_BA, jnp.argmax(inside_BA, axis=-1)[:, None], axis=1)[:, 0]
    settled_B = jnp.any(inside_BA, axis=-1) & (top_k == 0)

    def cut_out(_: None) -> jax.Array:
        return jnp.where(settled_B, first_B, draw(truncate(p_BV, top_p, top_k), u_BA[:, -1:])[:, 0])

    return jax.lax.cond(jnp.all(settled_B), lambda _: first_B, cut_out, None)


def sample_tokens(
    logits_BV: jax.Array, keys_B: jax.Array, counts_B: jax.Array, s: Settings
) -> tuple[jax.Array, jax.Array]:
    """Next tokens [B] and their log-probabilities [B] under the untruncated softmax at temperature 1. ``counts_B``:
    how many tokens each row has; its noise is its key folded with it."""
    most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)

    def greedy(_: None) -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def sampled(_: None) -> jax.Array:
        fold = lambda key, count: jax.random.uniform(jax.random.fold_in(key, count), (ATTEMPTS + 1,))  # noqa: E731
        p_BV = jnp.exp((logits_BV - most_B1) / jnp.maximum(s.temperature, 1e-6))
        return draw_truncated(p_BV, jax.vmap(fold)(keys_B, counts_B), s.top_p, s.top_k)

    token_B = jax.lax.cond(s.temperature > 0, sampled, greedy, None)
    mass_B = jnp.sum(jnp.exp(logits_BV - most_B1), axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B - most_B1[:, 0] - jnp.log(mass_B)
