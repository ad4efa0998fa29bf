"""Next tokens: which are drawn, and from which distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxsi.sampling import token_sampling

NO_MARKER = jnp.full(token_sampling.MAX_MARKER, -1, jnp.int32)
V = 37
truncate = jax.jit(jax.vmap(lambda p_V, top_p, top_k: token_sampling.truncate(p_V[None], top_p, top_k)[0]))
draw_many = jax.jit(token_sampling.draw)


def draw(p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """One index per row."""
    return np.asarray(draw_many(p, u[:, None]))[:, 0]


def truncated_by_sorting(p: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    p = p.copy()
    if top_k:
        p[p < np.sort(p)[::-1][min(top_k, len(p)) - 1]] = 0
    if top_p < 1:
        ordered = np.sort(p)[::-1]
        first = np.argmax(np.cumsum(ordered) >= top_p * p.sum())
        p[p < ordered[first]] = 0
    return p


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 64), min_size=V, max_size=V), min_size=4, max_size=4),
    st.lists(st.integers(1, 16), min_size=4, max_size=4),
    st.lists(st.integers(0, V + 3), min_size=4, max_size=4),
)
def test_truncation_equals_that_by_sorting(rows: list[list[int]], sixteenths: list[int], top_k: list[int]) -> None:
    """Probabilities and masses are multiples of powers of two: sums are exact, so ties and boundaries are tested."""
    p = np.array(rows, np.float32) / 64
    p[:, 0] = 1  # the likeliest token, as after the subtraction of the maximum
    top_p = np.array(sixteenths, np.float32) / 16
    expected = [truncated_by_sorting(*row) for row in zip(p, top_p, top_k, strict=True)]
    np.testing.assert_array_equal(truncate(p, top_p, np.array(top_k, np.int32)), expected)


def test_truncation_at_the_limits_of_its_settings() -> None:
    p = np.array([[0.5, 1.0, 0.25, 1e-30]], np.float32)

    def cut(top_p: float, top_k: int) -> list[float]:
        return np.asarray(truncate(p, np.float32([top_p]), np.int32([top_k])))[0].tolist()

    assert cut(1.0, 0) == cut(1.0, 9) == p[0].tolist()
    assert cut(1e-6, 0) == cut(1.0, 1) == [0, 1, 0, 0]
    assert cut(0.5, 2) == [0, 1, 0, 0] and cut(0.7, 2) == [0.5, 1, 0, 0]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(2.0**-60, 1.0, width=32)), min_size=V, max_size=V).filter(any),
    st.lists(st.floats(0, 1 - 2**-23, width=32), min_size=30, max_size=30),
)
def test_tokens_of_probability_zero_are_never_drawn(p: list[float], us: list[float]) -> None:
    us += [0.0, 1 - 2**-23]
    drawn = draw(np.tile(np.float32(p), (32, 1)), np.float32(us))
    np.testing.assert_array_equal(drawn, np.asarray(draw_many(np.float32([p]), np.float32([us])))[0])
    assert all(p[i] > 0 for i in drawn)


def test_rounding_of_prefix_sums_never_draws_a_token_that_was_cut_off() -> None:
    """A prefix sum may rise although nothing is added, and the target may lie past the end."""
    starts = np.float32([[0.0, 0.5, 0.50000006, 0.5], [0.0, 0.5, 0.5, 0.75], [0.0, 0.5, 0.75, 0.9999999]])
    mass = np.float32([[0.5, 0.0, 0.0, 0.5], [0.5, 0.0, 0.25, 0.25], [0.5, 0.25, 0.25, 0.0]])

    def reached(u: list[list[float]]) -> list[list[int]]:
        return token_sampling._last_reached(starts[:, None], mass[:, None], np.float32(u)).tolist()

    assert reached([[0.5], [0.5], [0.5]]) == [[3], [2], [1]]
    assert reached([[1.0], [1.0], [1.0]]) == [[3], [3], [2]]
    assert reached([[0.0], [0.0], [0.0]]) == [[0], [0], [0]]


def test_noise_equals_the_key_folded_with_numbers() -> None:
    keys, counts = jax.random.split(jax.random.key(4), 3), np.int32([0, 1, 70_000])
    expected = [
        [(int(jax.random.key_data(jax.random.fold_in(key, 8 * int(n) + i))[0]) >> 8) / 2**24 for i in range(8)]
        for key, n in zip(keys, counts, strict=True)
    ]
    np.testing.assert_array_equal(jax.jit(token_sampling.noise, static_argnums=2)(keys, counts, 8), expected)


def test_temperature_zero_takes_the_first_of_the_likeliest() -> None:
    """For any truncation, and however close the next token is."""
    logits = np.random.default_rng(5).integers(-3, 3, (64, V)).astype(np.float32)
    logits[::2] *= 1e-3
    logits[:32, 20] = np.nextafter(logits[:32].max(axis=1), np.float32(9))
    keys, sample = jax.random.split(jax.random.key(0), 64), jax.jit(token_sampling.sample_tokens)
    for setting in ((0.0, 1.0, 0), (0.0, 0.1, 3)):
        tokens, _ = sample(logits, keys, jnp.arange(64), settings_of(*setting))
        np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_draw_inverts_the_distribution() -> None:
    """Evenly spaced u give each token its share, to within one."""
    p = np.random.default_rng(0).dirichlet(np.full(V, 0.3)).astype(np.float32)
    p[[3, 20]] = 0
    N = 4096
    drawn = draw(np.tile(p * 7, (N, 1)), (np.arange(N, dtype=np.float32) + 0.5) / N)
    assert (np.diff(drawn) >= 0).all()
    counts = np.bincount(drawn, minlength=V)
    assert np.abs(counts - N * p / p.sum()).max() < 1.01


def chi_square(tokens: np.ndarray, p: np.ndarray) -> float:
    """Chi-squared over cells with at least 5 expected counts, as standard deviations from its mean."""
    expected, counts = p * len(tokens), np.bincount(tokens, minlength=len(p))
    large = expected >= 5
    cells = np.append(expected[large], expected[~large].sum()), np.append(counts[large], counts[~large].sum())
    e, c = (x[cells[0] > 0] for x in cells)
    return float((((c - e) ** 2 / e).sum() - (len(e) - 1)) / np.sqrt(2 * (len(e) - 1)))


def settings_of(temperature: float, top_p: float, top_k: int = 0) -> token_sampling.Settings:
    return token_sampling.Settings(
        temperature=jnp.float32(temperature),
        top_p=jnp.float32(top_p),
        top_k=jnp.int32(top_k),
        stop_ids=jnp.full(8, -1, jnp.int32),
        marker=NO_MARKER,
        limit=jnp.int32(1),
    )


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "others"),
    [
        (0.7, 0.9, 0, [(1.0, 0.9, 0), (0.75, 0.9, 0), (0.7, 0.97, 0)]),
        (1.0, 0.3, 0, [(1.0, 0.6, 0)]),  # most draws lie outside the nucleus, so it is computed for many rows
        (1.0, 0.9, 6, [(1.0, 0.9, 5), (1.0, 1.0, 6)]),
        (1.0, 1.0, 0, [(0.95, 1.0, 0)]),
    ],
)
def test_sampled_tokens_follow_the_distribution(temperature, top_p, top_k, others) -> None:
    """16,384 keys: the frequencies fit the distribution, and do not fit its neighbours."""
    N = 16384
    logits = np.random.default_rng(1).normal(0, 1.5, V).astype(np.float32)

    def distribution(temperature: float, top_p: float, top_k: int) -> np.ndarray:
        p = truncated_by_sorting(np.exp(logits / temperature - (logits / temperature).max()), top_p, top_k)
        return p / p.sum()

    keys, counts = jax.random.split(jax.random.key(3), N), jnp.full(N, 5)
    sample = jax.jit(token_sampling.sample_tokens)
    tokens, logps = sample(jnp.tile(logits, (N, 1)), keys, counts, settings_of(temperature, top_p, top_k))
    tokens = np.asarray(tokens)
    untruncated = logits - np.log(np.exp(logits).sum())  # at T = 1
    np.testing.assert_allclose(logps, untruncated[tokens], atol=1e-5)
    expected = distribution(temperature, top_p, top_k)
    assert chi_square(tokens, expected) < 4
    for other in others:
        p = distribution(*other)
        assert chi_square(tokens[p[tokens] > 0], p) > 4 or set(tokens) - set(np.flatnonzero(p))
    assert not set(tokens) - set(np.flatnonzero(expected))


def test_draw_of_a_row_does_not_depend_on_other_rows() -> None:
    logits = np.random.default_rng(2).normal(0, 1.5, (64, V)).astype(np.float32)
    keys, counts = jax.random.split(jax.random.key(1), 64), jnp.arange(64)
    sample = jax.jit(token_sampling.sample_tokens)
    together, _ = sample(logits, keys, counts, settings_of(1.0, 0.4))
    for i in range(64):
        one = slice(i, i + 1)
        alone, _ = sample(logits[one], keys[one], counts[one], settings_of(1.0, 0.4))
        assert together[i] == alone[0]
