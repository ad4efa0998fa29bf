"""The matmul with a gradient of its own: values, gradients, and what XLA compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsi.model.cpu_matmul import multiply, settle


def parts(dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, T, M], w [M, N] and the gradient of the product."""
    shapes, keys = ((2, 5, 7), (7, 3), (2, 5, 3)), jax.random.split(jax.random.key(0), 3)
    x, w, pull = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))
    return x, w, pull


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_multiply_and_its_gradient_are_products(dtype: str) -> None:
    x_BTM, w_MN, pull_BTN = parts(dtype)
    y_BTN, pull = jax.vjp(multiply, x_BTM, w_MN)
    by_x_BTM, by_w_MN = pull(pull_BTN)
    assert {a.dtype for a in (y_BTN, by_x_BTM, by_w_MN)} == {jnp.dtype(dtype)}
    x, w, g = (np.asarray(a, np.float64) for a in (x_BTM, w_MN, pull_BTN))
    close = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    np.testing.assert_allclose(y_BTN.astype(jnp.float32), x @ w, atol=close)
    np.testing.assert_allclose(by_x_BTM.astype(jnp.float32), g @ w.T, atol=close)
    np.testing.assert_allclose(by_w_MN.astype(jnp.float32), np.einsum("btm,btn->mn", x, g), atol=close)


def test_settle_acts_only_on_cpu() -> None:
    lowered = jax.jit(lambda x: settle({"x": x})["x"] + 1).trace(jnp.ones(3))
    assert "optimization_barrier" in lowered.lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("tpu", "cuda"):
        assert "optimization_barrier" not in lowered.lower(lowering_platforms=(platform,)).as_text()


def test_compiled_gradient_has_no_branch() -> None:
    """The platform is chosen when the program is compiled, not when it runs."""
    program = jax.jit(jax.grad(lambda x, w: jnp.sum(multiply(x, w) ** 2), argnums=(0, 1)))
    assert "conditional" not in program.lower(*parts("float32")[:2]).compile().as_text()
