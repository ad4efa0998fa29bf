"""Keys and values as int8: half the bytes of bfloat16, close to the exact values, the same in every slot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jaxsi.model import kv_cache
from jaxsi.model.attention import attend_last
from jaxsi.model.kv_cache import Int8
from jaxsi.sampling import engine, generate, prefixes, slots

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(10, 80, n).tolist() for n in (1, 5, 20, 33, 7, 12, 3, 40)]
KEYS = jax.random.split(jax.random.key(3), len(PROMPTS))


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape) * RNG.choice([1e-3, 1.0, 30.0], (*shape[:-1], 1)), jnp.float32)


def test_rounding_error_is_half_a_level_of_each_token_and_head() -> None:
    x_BKSC = normal(2, 3, 5, 8).at[0, 0, 0].set(0.0)
    stored = kv_cache.quantized(x_BKSC)
    assert (stored.numbers.dtype, stored.scales.shape) == (jnp.int8, (2, 3, 5, 1))
    assert (jnp.abs(stored.numbers).max(-1) == jnp.where(jnp.abs(x_BKSC).max(-1) > 0, 127, 0)).all()
    error = jnp.abs(kv_cache.exact(stored, jnp.float32) - x_BKSC)
    assert (error <= 0.5001 * stored.scales).all()
    assert error.max() > 0.3 * stored.scales.max()


def test_attend_last_multiplies_by_the_scales() -> None:
    q_BHC, k_BKSC, v_BKSC, mask_BS = normal(2, 6, 8), normal(2, 3, 5, 8), normal(2, 3, 5, 8), jnp.ones((2, 5), bool)
    keys, values = kv_cache.quantized(k_BKSC), kv_cache.quantized(v_BKSC)
    expected = attend_last(q_BHC, *(kv_cache.exact(x, jnp.float32) for x in (keys, values)), mask_BS)
    np.testing.assert_allclose(attend_last(q_BHC, keys, values, mask_BS), expected, rtol=1e-5, atol=1e-5)


def test_int8_cache_has_half_the_bytes_of_bfloat16() -> None:
    lm = tiny.make_lm()
    caches = [
        slots.empty_slots(
            fixed=slots.Fixed(lm.config, lm.mesh, jnp.dtype("bfloat16"), int8=int8), size=4, ring=16, prompt=32
        ).cache
        for int8 in (False, True)
    ]
    exact, int8 = (sum(x.nbytes for x in jax.tree.leaves(cache)) for cache in caches)
    assert kv_cache.columns(caches[0]) == kv_cache.columns(caches[1]) == 48
    C = lm.config.head_dim
    assert int8 / exact == kv_cache.bytes_of_number("int8", 2, C) / kv_cache.bytes_of_number("exact", 2, C)


def run(mesh: str, batch_size: int, cache: str, temperature: float = 0.7) -> list[list[tuple]]:
    lm = tiny.make_lm(mesh)
    settings = generate._settings(lm, temperature, 0.9, 0, 40, (), ())
    options = {"limit": 40, "num_samples": 2, "batch_size": batch_size, "cache": cache, "group": prefixes.alone}
    return engine.run(lm, PROMPTS, KEYS, settings, **options)[0]


@pytest.mark.parametrize(("mesh", "batch_size"), [("1x1x1", 8), ("2x2x2", 16)])
def test_slots_and_mesh_do_not_change_a_token(mesh, batch_size, monkeypatch) -> None:
    """Slots are refilled, their ring gets longer, and the last rows move into fewer slots."""
    expected = run("1x1x1", 16, "int8")
    monkeypatch.setattr(engine, "FIRST_RING", 16)
    monkeypatch.setattr(engine, "MOST_STEPS", 4)
    results = run(mesh, batch_size, "int8")
    assert [[ids for ids, _, _ in row] for row in results] == [[ids for ids, _, _ in row] for row in expected]


def test_int8_logps_are_close_to_the_exact_ones() -> None:
    """Greedy, over the tokens before the two caches first differ; the first token of each response is among them."""
    exact, int8 = run("1x1x1", 16, "exact", 0.0), run("1x1x1", 16, "int8", 0.0)
    errors = []
    for row, other in zip(exact, int8, strict=True):
        (a, a_logps, _), (b, b_logps, _) = row[0], other[0]
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        assert same > 0
        errors += np.abs(np.subtract(a_logps[:same], b_logps[:same])).tolist()
    assert len(errors) > 100
    assert 0 < np.mean(errors) < 0.01


def test_unknown_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="cache is 'fp8'; it is one of exact, int8"):
        generate.SamplingConfig(cache="fp8")


def test_new_columns_take_the_form_of_the_stored_ones() -> None:
    new = normal(1, 2, 3, 4)
    assert isinstance(kv_cache.stored_like(new, kv_cache.quantized(new)), Int8)
    assert kv_cache.stored_like(new, new.astype(jnp.bfloat16)).dtype == jnp.bfloat16
