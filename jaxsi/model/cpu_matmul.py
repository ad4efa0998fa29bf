"""Matmul of activations and weights whose gradient stays on XLA:CPU's fast path.

Left alone, XLA:CPU fuses the transpositions of the gradient with the operations that produce the operands. Then it
copies column by column, or leaves its fast path: a training step in bfloat16 took six times as long (JAX 0.12).
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"  # the checkpoint name of a product, by which remat keeps it
Tree = TypeVar("Tree")


def settle(tree: Tree) -> Tree:
    """On CPU, computes the arrays before the operations that read them, unfused. Elsewhere does nothing."""
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda x: x)


@jax.custom_vjp
def multiply(x_BTM: jax.Array, w_MN: jax.Array) -> jax.Array:
    """[B, T, M] times [M, N] -> [B, T, N]."""
    return x_BTM @ w_MN


def _forward(x_BTM: jax.Array, w_MN: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return checkpoint_name(x_BTM @ w_MN, PRODUCT), (x_BTM, w_MN)


def _backward(saved: tuple[jax.Array, jax.Array], by_y_BTN: jax.Array) -> Any:
    x_BTM, by_y_BTN = settle((saved[0], by_y_BTN))
    return settle((by_y_BTN @ saved[1].T, jnp.einsum("BTM,BTN->MN", x_BTM, by_y_BTN)))


multiply.defvjp(_forward, _backward)
