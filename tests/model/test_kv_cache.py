"""Keys and values as int8: half the bytes of bfloat16, close to what they were, the same wherever a row lies."""

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


def test_rounded_to_half_a_level_of_its_own_token_and_head() -> None:
    x_BKSC = normal(2, 3, 5, 8).at[0, 0, 0].set(0.0)
    stored = kv_cache.quantized(x_BKSC)
    assert (stored.numbers.dtype, stored.scales.shape) == (jnp.int8, (2, 3, 5, 1))
    assert (jnp.abs(stored.numbers).max(-1) == jnp.where(jnp.abs(x_BKSC).max(-1) > 0, 127, 0)).all()
    off = jnp.abs(kv_cache.exact(stored, jnp.float32) - x_BKSC)
    assert (off <= 0.5001 * stored.scales).all()
    assert off.max() > 0.3 * stored.scales.max()


def test_attention_of_one_token_multiplies_by_the_scales() -> None:
    q_BHC, k_BKSC, v_BKSC, mask_BS = normal(2, 6, 8), normal(2, 3, 5, 8), normal(2, 3, 5, 8), jnp.ones((2, 5), bool)
    keys, values = kv_cache.quantized(k_BKSC), kv_cache.quantized(v_BKSC)
    expected = attend_last(q_BHC, *(kv_cache.exact(x, jnp.float32) for x in (keys, values)), mask_BS)
    np.testing.assert_allclose(attend_last(q_BHC, keys, values, mask_BS), expected, rtol=1e-5, atol=1e-5)


def test_half_the_bytes_of_bfloat16() -> None:
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
    results, _ = engine.run(
        lm, PROMPTS, KEYS, generate._settings(lm, temperature, 0.9, 0, 40, (), ()), limit=40, num_samples=2,
        batch_size=batch_size, cache=cache, group=prefixes.alone,
    )  # fmt: skip
    return results


@pytest.mark.parametrize(("mesh", "batch_size"), [("1x1x1", 8), ("2x2x2", 16)])
def test_neither_slots_nor_mesh_change_a_token(mesh, batch_size, monkeypatch) -> None:
    """Refilled, moved to a longer ring and to fewer slots."""
    expected = run("1x1x1", 16, "int8")
    monkeypatch.setattr(engine, "FIRST_RING", 16)
    monkeypatch.setattr(engine, "MOST_STEPS", 4)
    made = run(mesh, batch_size, "int8")
    assert [[ids for ids, _, _ in row] for row in made] == [[ids for ids, _, _ in row] for row in expected]


def test_log_probabilities_are_close_and_not_the_same() -> None:
    """Greedy, over the tokens up to where the two part, and of all of those at the start."""
    exact, int8 = run("1x1x1", 16, "exact", 0.0), run("1x1x1", 16, "int8", 0.0)
    off = []
    for row, other in zip(exact, int8, strict=True):
        (a, a_logps, _), (b, b_logps, _) = row[0], other[0]
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        assert same > 0
        off += np.abs(np.subtract(a_logps[:same], b_logps[:same])).tolist()
    assert len(off) > 100
    assert 0 < np.mean(off) < 0.01


def test_another_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="cache is 'fp8'; it is one of exact, int8"):
        generate.SamplingConfig(cache="fp8")


def test_new_columns_are_like_those_that_are_there() -> None:
    new = normal(1, 2, 3, 4)
    assert isinstance(kv_cache.stored_like(new, kv_cache.quantized(new)), Int8)
    assert kv_cache.stored_like(new, new.astype(jnp.bfloat16)).dtype == jnp.bfloat16
