"""Work over tiles gives the same result as work on the whole."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsi.model.tiles import over_tiles


@pytest.mark.parametrize("tile", [2, 3, 12])
@pytest.mark.parametrize(("axis", "shape"), [(0, (12,)), (1, (2, 12, 3)), (2, (2, 3, 12))])
def test_outputs_of_tiles_are_in_the_order_of_their_inputs(axis, shape, tile) -> None:
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    places = jnp.broadcast_to(jnp.arange(12).reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape)

    def step(total, start, tiles):
        assert tiles["x"].shape[axis] == tile
        return total + tiles["x"].sum(), (2 * tiles["x"], tiles["places"] - start)

    total, (doubled, within) = over_tiles(step, jnp.float32(0), {"x": x, "places": places}, tile, axis=axis)
    assert total == x.sum()
    assert (doubled == 2 * x).all()
    assert (within == places % tile).all()
