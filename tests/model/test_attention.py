"""Attention: the equation by hand, its gradient, and the compiled programs' memory and copies."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsi.model.attention import attend, attend_causally, attend_last

B, T, H, K, C = 2, 29, 4, 2, 6


@pytest.fixture(scope="module")
def inputs():
    q_key, k_key, v_key = jax.random.split(jax.random.key(0), 3)
    q_BTHC = jax.random.normal(q_key, (B, T, H, C))
    k_BKSC, v_BKSC = (jax.random.normal(key, (B, K, T, C)) for key in (k_key, v_key))
    segments_BT = jnp.asarray([[1] * 11 + [2] * 13 + [0] * 5, [1] * T], jnp.int32)
    positions_BT = jnp.asarray([[*range(11), *range(13), *range(5)], [*range(T)]], jnp.int32)
    return q_BTHC, k_BKSC, v_BKSC, segments_BT, positions_BT


def by_hand(q_BTHC, k_BKSC, v_BKSC, segments_BT, positions_BT, window):
    """One query at a time, in float64."""
    q, k, v, segments, positions = (
        np.asarray(x, np.float64) for x in (q_BTHC, k_BKSC, v_BKSC, segments_BT, positions_BT)
    )
    out = np.zeros(q.shape)
    for b in range(B):
        for t in range(T):
            seen = [
                s
                for s in range(t + 1)
                if segments[b, s] == segments[b, t] and positions[b, t] - positions[b, s] < window
            ]
            for h in range(H):
                scores = k[b, h // (H // K), seen] @ q[b, t, h] / math.sqrt(C)
                shares = np.exp(scores - scores.max())
                out[b, t, h] = shares / shares.sum() @ v[b, h // (H // K), seen]
    return out


@pytest.mark.parametrize("window", [1, 4, 10**6])
@pytest.mark.parametrize("tile", [4, 10, 29, 64])
def test_attention_follows_the_equation_for_every_tile(inputs, tile, window):
    attended = attend_causally(*inputs, window, tile=tile)
    np.testing.assert_allclose(attended, by_hand(*inputs, window), atol=2e-6)


@pytest.mark.parametrize("tile", [64, 10, 8])
def test_custom_gradient_equals_that_of_the_equation(inputs, tile):
    """Against JAX's gradient of the plain softmax under the mask."""
    segments_BT, positions_BT = inputs[3:]
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None]
    distance_BTS = positions_BT[:, :, None] - positions_BT[:, None]
    seen_BTS = same_BTS & jnp.tril(jnp.ones((T, T), bool))[None] & (distance_BTS < 7)
    pull_BTHC = jax.random.normal(jax.random.key(1), inputs[0].shape)

    plain = jax.jit(jax.grad(lambda qkv: jnp.sum(pull_BTHC * attend(*qkv, seen_BTS))))(inputs[:3])
    tiled = jax.jit(jax.grad(lambda qkv: jnp.sum(pull_BTHC * attend_causally(*qkv, *inputs[3:], 7, tile=tile))))
    for a, b in zip(tiled(inputs[:3]), plain, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attend_last_equals_the_last_row_of_attend(inputs, dtype):
    q_BTHC, k_BKSC, v_BKSC = (x.astype(dtype) for x in inputs[:3])
    seen_BS = jax.random.bernoulli(jax.random.key(2), 0.5, (B, T)).at[:, 0].set(True)
    last = jax.jit(attend_last)(q_BTHC[:, -1], k_BKSC, v_BKSC, seen_BS)
    assert last.dtype == dtype
    wide = tuple(x.astype(jnp.float32) for x in (q_BTHC[:, -1:], k_BKSC, v_BKSC))
    np.testing.assert_allclose(last, attend(*wide, seen_BS[:, None])[:, 0], atol=2e-6 if dtype == "float32" else 0.02)


def test_decoding_does_not_copy_keys_and_values():
    """The compiled program does not transpose or copy any array of the cache's size."""
    shapes = [(8, H, 64), (8, K, 96, 64), (8, K, 96, 64)]
    mask = jax.ShapeDtypeStruct((8, 96), bool)
    for dtype in (jnp.float32, jnp.bfloat16):
        qkv = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        text = jax.jit(attend_last).lower(*qkv, mask).compile().as_text()
        assert not re.search(rf"\[8,{K},96,(64|{H // K},1|1,{H // K})\]\S* (copy|transpose)\(", text)


def test_buffers_do_not_grow_with_the_square_of_the_length():
    long = 256
    shapes = [(1, long, H, C), (1, K, long, C), (1, K, long, C)]
    qkv = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    rows = jax.ShapeDtypeStruct((1, long), jnp.int32)

    def program(tile):
        def loss(qkv, segments_BT, positions_BT):
            return jnp.sum(attend_causally(*qkv, segments_BT, positions_BT, 10**6, tile=tile) ** 2)

        return jax.jit(jax.grad(loss)).lower(qkv, rows, rows).compile().as_text()

    square = re.compile(rf"\[(?:\d+,)*{long},{long}\]")
    assert square.search(program(tile=long))
    assert not square.search(program(tile=32))
