"""The slots' own programs; what rows make of them is in test_engine.py."""

import jax.numpy as jnp
import numpy as np

import tiny
from jaxsi import slots


def ring_of_four(written: int) -> slots.Slots:
    """Two slots, a ring of 4 columns of which ``written`` were written in turn, and prompts of 2 columns: the keys hold
    what the positions say."""
    fixed = slots.Fixed(tiny.CONFIG, tiny.mesh(), jnp.dtype("float32"))
    empty = slots.empty_slots(fixed=fixed, size=2, ring=4, prompt=2)
    ring = [-1] * 4
    for n in range(written):
        ring[n % 4] = 2 + n
    positions = jnp.asarray([[*ring, 0, 1], [*ring, 0, -1]], jnp.int32)
    cache = [(k + positions[:, None, :, None], v) for k, v in empty.cache]
    return empty._replace(cache=cache, positions_BS=positions, column=jnp.int32(written % 4))


def grow(before: slots.Slots, rows: list[int], ring: int, prompt: int) -> slots.Slots:
    fixed = slots.Fixed(tiny.CONFIG, tiny.mesh(), jnp.dtype("float32"))
    after = slots.resize_slots(
        before, np.asarray(rows, np.int32), fixed=fixed, ring=4, new_ring=ring, new_prompt=prompt
    )
    held = np.asarray(after.positions_BS)
    for k, _ in after.cache:  # keys and positions went the same way
        np.testing.assert_array_equal(np.asarray(k)[:, 0, :, 0], np.where(held < 0, np.asarray(k)[:, 0, :, 0], held))
    return after


def test_a_ring_that_went_round_grows_oldest_first() -> None:
    after = grow(ring_of_four(6), [0, 1], ring=8, prompt=3)
    assert after.positions_BS.tolist() == [
        [4, 5, 6, 7, -1, -1, -1, -1, 0, 1, -1], [4, 5, 6, 7, -1, -1, -1, -1, 0, -1, -1],
    ]  # fmt: skip
    assert int(after.column) == 4


def test_fewer_slots_keep_their_ring() -> None:
    after = grow(ring_of_four(6), [1], ring=4, prompt=2)
    assert after.positions_BS.tolist() == [[6, 7, 4, 5, 0, -1]]
    assert int(after.column) == 2
