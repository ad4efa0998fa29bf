"""The head over tiles: log-probabilities, entropies and their gradients against the plain softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsi.model.lm_head import logps_and_entropies

B, T, D, V = 2, 29, 6, 41  # 29 is a prime: only tiles of 1 and 29 divide it


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden_BTD, head_DV = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    return (
        jnp.asarray(hidden_BTD, jnp.float32),
        jnp.asarray(head_DV, jnp.float32),
        jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
    )


def plain(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    logps_BTV = jax.nn.log_softmax(hidden_BTD @ head_DV)
    logps_BT = jnp.take_along_axis(logps_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return logps_BT, -jnp.sum(jnp.exp(logps_BTV) * logps_BTV, axis=-1)


@pytest.mark.parametrize("tile", [1, 5, 13, 29])
@pytest.mark.parametrize("used", ["logps", "entropies", "both"])
def test_values_and_gradients_equal_those_of_the_softmax(inputs, tile: int, used: str) -> None:
    """For each output alone, whose gradient ignores the other, and for both."""
    tiled = functools.partial(logps_and_entropies, tile_bytes=4 * B * V * tile)
    pulls = np.random.default_rng(1).normal(size=(2, B, T)).astype(np.float32)
    chosen = {"logps": [0], "entropies": [1], "both": [0, 1]}[used]

    def run(function):
        def loss(hidden_BTD, head_DV):
            return sum(jnp.sum(pulls[i] * function(hidden_BTD, head_DV, inputs[2])[i]) for i in chosen)

        return function(*inputs), jax.jit(jax.grad(loss, argnums=(0, 1)))(*inputs[:2])

    (values, gradients), (expected, expected_gradients) = run(tiled), run(plain)
    for a, b in zip(values, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_entropies_of_flat_and_sharp_distributions(inputs) -> None:
    hidden_BTD, head_DV, targets_BT = inputs
    flat = logps_and_entropies(0 * hidden_BTD, head_DV, targets_BT)[1]
    np.testing.assert_allclose(flat, np.log(V), atol=1e-5)
    sharp = logps_and_entropies(1e6 * hidden_BTD, head_DV, targets_BT)
    assert np.all(np.abs(sharp[1]) < 1e-3) and np.all(np.isfinite(sharp[0]))
