import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsi.model.cpu_matmul import multiply, settle


def parts(dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, T, M], w [M, N] and what pulls at the product."""
    x, w, pull = jax.random.split(jax.random.key(0), 3)
    normal = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)  # noqa: E731
    return normal(x, 2, 5, 7), normal(w, 7, 3), normal(pull, 2, 5, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_a_product_and_so_is_its_gradient(dtype: str) -> None:
    x_BTM, w_MN, pull_BTN = parts(dtype)
    y_BTN, pull = jax.vjp(multiply, x_BTM, w_MN)
    by_x_BTM, by_w_MN = pull(pull_BTN)
    assert {a.dtype for a in (y_BTN, by_x_BTM, by_w_MN)} == {jnp.dtype(dtype)}
    x, w, g = (np.asarray(a, np.float64) for a in (x_BTM, w_MN, pull_BTN))
    close = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    np.testing.assert_allclose(y_BTN.astype(jnp.float32), x @ w, atol=close)
    np.testing.assert_allclose(by_x_BTM.astype(jnp.float32), g @ w.T, atol=close)
    np.testing.assert_allclose(by_w_MN.astype(jnp.float32), np.einsum("btm,btn->mn", x, g), atol=close)


def test_only_processors_settle() -> None:
    lowered = jax.jit(lambda x: settle({"x": x})["x"] + 1).trace(jnp.ones(3))
    assert "optimization_barrier" in lowered.lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("tpu", "cuda"):
        assert "optimization_barrier" not in lowered.lower(lowering_platforms=(platform,)).as_text()


def test_no_branch_is_left_in_a_gradient() -> None:
    """The choice of the platform is no choice at run time."""
    program = jax.jit(jax.grad(lambda x, w: jnp.sum(multiply(x, w) ** 2), argnums=(0, 1)))
    assert "conditional" not in program.lower(*parts("float32")[:2]).compile().as_text()
