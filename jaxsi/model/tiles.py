"""Work over tiles of an axis, so that the results for a whole axis need not exist at once."""

from typing import Any

import jax
import jax.numpy as jnp


def over_tiles(step: Any, carry: Any, tree: Any, tile: int, *, axis: int) -> tuple[Any, Any]:
    """Runs ``step(carry, start, tiles) -> (carry, outputs)`` over tiles of ``axis`` of the arrays in ``tree``.

    The length of the axis must be a multiple of ``tile``. Returns the last carry, and the outputs concatenated along
    ``axis``.
    """
    T = jax.tree.leaves(tree)[0].shape[axis]
    if tile == T:
        return step(carry, 0, tree)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], T // tile, tile, *x.shape[axis + 1 :]), axis, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, axis).reshape(*x.shape[1 : axis + 1], T, *x.shape[axis + 2 :])

    inputs = (jnp.arange(0, T, tile), jax.tree.map(split, tree))
    carry, outputs = jax.lax.scan(lambda carry, tiles: step(carry, *tiles), carry, inputs)
    return carry, jax.tree.map(join, outputs)
