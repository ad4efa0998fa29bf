import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsi.attention import attend_causally

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
def test_it_is_the_equation_whatever_the_tile(inputs, tile, window):
    attended = attend_causally(*inputs, window, tile=tile)
    np.testing.assert_allclose(attended, by_hand(*inputs, window), atol=2e-6)


def test_tiles_do_not_change_gradients(inputs):
    def loss(qkv, tile):
        return jnp.sum(jnp.square(attend_causally(*qkv, *inputs[3:], 7, tile=tile)))

    whole, tiled = (jax.grad(loss)(inputs[:3], tile) for tile in (64, 8))
    for a, b in zip(whole, tiled, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_buffer_grows_with_the_square_of_the_length():
    long = 256
    shapes = [(1, long, H, C), (1, K, long, C), (1, K, long, C)]
    qkv = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    rows = jax.ShapeDtypeStruct((1, long), jnp.int32)

    def program(tile):
        loss = lambda qkv, s, p: jnp.sum(attend_causally(*qkv, s, p, 10**6, tile=tile) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(qkv, rows, rows).compile().as_text()

    square = re.compile(rf"\[(?:\d+,)*{long},{long}\]")
    assert square.search(program(tile=long))
    assert not square.search(program(tile=32))
