"""The programs that work on slots. test_engine.py checks the rows that come out of them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jaxsi.model import decoder, kv_cache
from jaxsi.model.decoder import NO_WINDOW
from jaxsi.model.kv_cache import Contents
from jaxsi.perf.bench_shapes import SHAPES
from jaxsi.sampling import generate, slots


def fixed_of(windows: tuple[int | None, ...] | None) -> slots.Fixed:
    return slots.Fixed(dataclasses.replace(tiny.CONFIG, windows=windows), tiny.mesh(), jnp.dtype("float32"))


def columns(held: slots.Slots) -> list[int]:
    """The number of columns of each layer."""
    return [kv_cache.columns([layer]) for layer in held.cache]


def ring_of_four(written: int, fixed: slots.Fixed) -> slots.Slots:
    """Two slots with prompts of 2 columns and a ring of 4 (or fewer, if a layer needs fewer) after ``written`` tokens.

    The keys hold the numbers that the positions say.
    """
    empty = slots.empty_slots(fixed=fixed, size=2, ring=4, prompt=2)
    contents = {}
    for window in empty.contents:
        ring = [-1] * kv_cache.columns_seen(4, window)
        for n in range(written):
            ring[n % len(ring)] = 2 + n
        positions = jnp.asarray([[*ring, 0, 1], [*ring, 0, -1]], jnp.int32)
        contents[window] = Contents(positions, jnp.int32(written % len(ring)))
    layers = zip(empty.cache, decoder.windows(fixed.config), strict=True)
    cache = [(k + contents[window].positions_BS[:, None, :, None], v) for (k, v), window in layers]
    return empty._replace(cache=cache, contents=contents)


def grow(before: slots.Slots, rows: list[int], ring: int, prompt: int, fixed: slots.Fixed) -> dict[int, Contents]:
    after = slots.resize_slots(
        before, np.asarray(rows, np.int32), fixed=fixed, ring=4, new_ring=ring, new_prompt=prompt
    )
    for (k, _), window in zip(after.cache, decoder.windows(fixed.config), strict=True):
        positions, keys = np.asarray(after.contents[window].positions_BS), np.asarray(k)[:, 0, :, 0]
        filled = positions >= 0
        np.testing.assert_array_equal(keys[filled], positions[filled])  # keys and positions moved together
    return after.contents


def test_full_ring_grows_with_its_oldest_column_first() -> None:
    fixed = fixed_of(None)
    after = grow(ring_of_four(6, fixed), [0, 1], ring=8, prompt=3, fixed=fixed)[NO_WINDOW]
    assert after.positions_BS.tolist() == [
        [4, 5, 6, 7, -1, -1, -1, -1, 0, 1, -1],
        [4, 5, 6, 7, -1, -1, -1, -1, 0, -1, -1],
    ]
    assert int(after.column) == 4


def test_fewer_slots_keep_their_ring() -> None:
    fixed = fixed_of(None)
    after = grow(ring_of_four(6, fixed), [1], ring=4, prompt=2, fixed=fixed)[NO_WINDOW]
    assert after.positions_BS.tolist() == [[6, 7, 4, 5, 0, -1]]
    assert int(after.column) == 2


def test_ring_that_spans_its_window_does_not_grow() -> None:
    """It continues at the same column. A ring shorter than its window is unrolled and grows to a power of two."""
    fixed = fixed_of((2, 5))
    after = grow(ring_of_four(5, fixed), [0, 1], ring=16, prompt=3, fixed=fixed)
    assert after[2].positions_BS[0].tolist() == [6, 5, 0, 1] and int(after[2].column) == 1
    assert after[5].positions_BS[0].tolist() == [3, 4, 5, 6, -1, -1, -1, -1, 0, 1, -1] and int(after[5].column) == 4


@pytest.mark.parametrize("T", [16, 24])
def test_layer_with_a_window_takes_the_end_of_a_prompt(T) -> None:
    """Rows of T columns hold several prompts; the last prompt ends with its row. Keys and positions agree. A layer with
    the window 3 gets a prompt's last 4 positions, a layer without one gets all. The previous rows leave no trace."""
    lm = tiny.make_lm(config=dataclasses.replace(tiny.CONFIG, windows=(3, None)))
    fixed = slots.Fixed(lm.config, lm.mesh, lm.dtype)
    rows, starts, lengths = (np.asarray(x, np.int32) for x in ([0, 0, 1, 1, 1], [0, 9, 0, 2, T - 3], [9, 7, 2, 5, 3]))
    keys = np.zeros((2, T), np.float32)
    for p, (row, start, n) in enumerate(zip(rows, starts, lengths, strict=True)):
        keys[row, start : start + n] = 100 * p + np.arange(n)
    layer = (jnp.broadcast_to(jnp.asarray(keys)[:, None, :, None], (2, 2, T, 8)),) * 2
    wave = slots.Wave([layer] * 2, *map(jnp.asarray, (rows, starts, lengths)), jnp.zeros((5, lm.config.embed_dim)))
    before = slots.empty_slots(fixed=fixed, size=6, ring=8, prompt=16)
    assert columns(before) == [4 + 4, 8 + 16]
    stale = {
        window: Contents(jnp.full_like(contents.positions_BS, 1), contents.column)
        for window, contents in before.contents.items()
    }
    into = np.asarray([5, 3, 1, 0, 2])
    settings = generate._settings(lm, 0.0, 1.0, 0, 9, (), ())
    arguments = (np.arange(5), into, np.zeros((5, 2), np.uint32), np.full(5, 9), np.arange(5, dtype=np.int32), settings)
    after = slots.refill_slots(before._replace(contents=stale), wave, *arguments, fixed=fixed, ring=8, width=16)
    assert columns(after) == [4 + 4, 8 + 16]
    for (k, _), window, ring, most in zip(after.cache, (3, NO_WINDOW), (4, 8), (4, 16), strict=True):
        positions = np.asarray(after.contents[window].positions_BS)
        assert (positions[4] == 1).all() and (positions[into, :ring] == -1).all()
        for p, b in enumerate(into):
            n = lengths[p]
            (filled,) = np.nonzero(positions[b] >= 0)
            assert positions[b, filled].tolist() == list(range(max(0, n - most), n))
            np.testing.assert_array_equal(np.asarray(k)[b, 1, filled, 7], 100 * p + positions[b, filled])


def test_windows_as_long_as_ring_and_prompt_do_not_change_shapes() -> None:
    empty = [slots.empty_slots(fixed=fixed_of(windows), size=2, ring=16, prompt=8) for windows in (None, (16, 16))]
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(x)] for x in empty]
    assert shapes[0] == shapes[1]


def test_size_of_the_cache_of_a_mistral() -> None:
    """16 slots with prompts of 16,384 tokens and 8,192 new ones, in bfloat16: 48 GiB without windows, 16 GiB if all 32
    layers have a window of 4,096, and 32 GiB if every second one does."""

    def gib(windows: tuple[int | None, ...] | None) -> float:
        config = dataclasses.replace(SHAPES["llama-3-8b"], windows=windows)
        fixed = slots.Fixed(config, tiny.mesh(), jnp.dtype("bfloat16"))
        empty = jax.eval_shape(lambda: slots.empty_slots(fixed=fixed, size=16, ring=8192, prompt=16_384))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(empty.cache)) / 2**30

    assert [gib(windows) for windows in (None, (4096,) * 32, (4096, None) * 16)] == [48, 16, 32]
