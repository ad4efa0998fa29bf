"""Losses against their equations in NumPy, the signs of their gradients, and what must not reach them."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jaxsi.model import decoder
from jaxsi.training import losses
from jaxsi.training.losses import PairLogps

BETA = 0.3
RNG = np.random.default_rng(0)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = (-np.exp(RNG.normal(1, 0.7, 6)).astype(np.float32) for _ in range(4))
CHOSEN_TOKENS, REJECTED_TOKENS = RNG.integers(1, 9, 6), RNG.integers(1, 9, 6)
REAL = np.array([True, True, False, True, True, False])
MARGIN = (CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED)
MEAN_CHOSEN, MEAN_REJECTED = CHOSEN / CHOSEN_TOKENS, REJECTED / REJECTED_TOKENS


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def log_odds(mean: np.ndarray) -> np.ndarray:
    q = np.exp(mean.astype(np.float64))
    return np.log(q / (1 - q))


# The equation of each paper, per pair.
EQUATIONS: dict[str, tuple[Callable[..., losses.Loss], np.ndarray]] = {
    "dpo": (losses.dpo, -np.log(sigmoid(BETA * MARGIN))),
    "dpo_smoothed": (
        losses.dpo_smoothed(label_smoothing=0.2),
        -0.8 * np.log(sigmoid(BETA * MARGIN)) - 0.2 * np.log(sigmoid(-BETA * MARGIN)),
    ),
    "ipo": (losses.ipo, (MARGIN - 1 / (2 * BETA)) ** 2),
    "hinge": (losses.hinge, np.maximum(0, 1 - BETA * MARGIN)),
    "simpo": (
        losses.simpo(gamma=0.5),
        -np.log(sigmoid(BETA / CHOSEN_TOKENS * CHOSEN - BETA / REJECTED_TOKENS * REJECTED - 0.5)),
    ),
    "orpo": (
        losses.orpo,
        -MEAN_CHOSEN - BETA * np.log(sigmoid(log_odds(MEAN_CHOSEN) - log_odds(MEAN_REJECTED))),
    ),
    "nll": (lambda p, beta: losses.nll(p), -MEAN_CHOSEN),
}


def pairs(chosen: np.ndarray = CHOSEN, rejected: np.ndarray = REJECTED, real: np.ndarray = REAL) -> PairLogps:
    refs = (REF_CHOSEN, REF_REJECTED, CHOSEN_TOKENS, REJECTED_TOKENS)
    return PairLogps(jnp.asarray(chosen), jnp.asarray(rejected), *map(jnp.asarray, refs), jnp.asarray(real))


@pytest.mark.parametrize("name", EQUATIONS)
def test_loss_matches_its_equation_and_count(name: str) -> None:
    loss, per_pair = EQUATIONS[name]
    total, count = loss(pairs(), beta=BETA)
    np.testing.assert_allclose(total, per_pair[REAL].sum(), rtol=2e-6)
    assert float(count) == REAL.sum() and total.dtype == count.dtype == jnp.float32


@pytest.mark.parametrize("name", EQUATIONS)
def test_descent_prefers_the_chosen_response(name: str) -> None:
    """Gradient descent raises the chosen response and never the rejected one; fill rows have no gradient."""
    loss, _ = EQUATIONS[name]

    def value(chosen: Any, rejected: Any) -> jax.Array:
        return loss(pairs(chosen, rejected), beta=BETA)[0]

    by_chosen, by_rejected = jax.grad(value, argnums=(0, 1))(jnp.asarray(CHOSEN), jnp.asarray(REJECTED))
    if name == "hinge":  # flat beyond its margin
        active = REAL & (BETA * MARGIN < 1)
        assert active.any() and (by_chosen[active] < 0).all() and (by_rejected[active] > 0).all()
    elif name == "ipo":  # pulls the margin to its target from both sides
        np.testing.assert_array_equal(np.sign(by_chosen[REAL]), np.sign(MARGIN[REAL] - 1 / (2 * BETA)))
    elif name == "dpo_smoothed":
        np.testing.assert_array_equal(np.sign(by_chosen[REAL]), np.sign(sigmoid(BETA * MARGIN) - 0.8)[REAL])
    else:
        assert (by_chosen[REAL] < 0).all()
        assert (by_rejected[REAL] == 0).all() if name == "nll" else (by_rejected[REAL] > 0).all()
    assert not by_chosen[~REAL].any() and not by_rejected[~REAL].any()


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_fill_rows_do_not_reach_the_sum(name: str, poison: float) -> None:
    loss, _ = EQUATIONS[name]
    spoilt = np.where(REAL, CHOSEN, np.float32(poison))
    clean, dirty = loss(pairs(), beta=BETA), loss(pairs(spoilt), beta=BETA)
    np.testing.assert_array_equal(np.asarray(clean), np.asarray(dirty))


def test_dpo_at_the_reference_is_ln_2() -> None:
    same = PairLogps(*map(jnp.asarray, (CHOSEN, REJECTED, CHOSEN, REJECTED, CHOSEN_TOKENS, REJECTED_TOKENS, REAL)))
    total, count = losses.dpo(same, beta=0.1)
    assert abs(float(total / count) - math.log(2)) < 1e-7


def test_orpo_is_finite_at_probability_one() -> None:
    def value(chosen: Any) -> jax.Array:
        return losses.orpo(pairs(chosen), beta=BETA)[0]

    loss, gradient = jax.value_and_grad(value)(jnp.zeros(6))
    assert np.isfinite(loss) and np.isfinite(gradient).all()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(-20, 0, width=32), st.booleans()), min_size=4, max_size=4), min_size=1, max_size=4
    )
)
def test_sft_is_the_sum_over_the_mask(rows: list[list[tuple[float, bool]]]) -> None:
    logps = np.array([[x for x, _ in row] for row in rows], np.float32)
    mask = np.array([[m for _, m in row] for row in rows])
    poisoned = np.where(mask, logps, np.nan)  # a position that does not count may hold anything
    total, count = losses.sft(jnp.asarray(poisoned), jnp.asarray(mask))
    np.testing.assert_allclose(total, -logps[mask].sum(dtype=np.float64), rtol=1e-5, atol=1e-5)
    assert float(count) == mask.sum()


AGREEMENT = np.array([1.0, 0.0, 0.3, 0.73, 0.5, np.nan], np.float32)  # nothing is known of a fill row


def agreed(agreement: np.ndarray | None, chosen: Any = CHOSEN, rejected: Any = REJECTED) -> PairLogps:
    return pairs(chosen, rejected)._replace(agreement_B=None if agreement is None else jnp.asarray(agreement))


def test_agreed_loss_matches_its_equation() -> None:
    total, count = losses.dpo_agreed(agreed(AGREEMENT), beta=BETA)
    right, wrong = -np.log(sigmoid(BETA * MARGIN)), -np.log(sigmoid(-BETA * MARGIN))
    expected = [a * r + (1 - a) * w for a, r, w in zip(AGREEMENT, right, wrong, strict=True)]
    np.testing.assert_allclose(total, np.asarray(expected)[REAL].sum(), rtol=2e-6)
    assert float(count) == REAL.sum() == 4


@pytest.mark.parametrize("certain", [None, np.ones(6, np.float32)], ids=["absent", "one"])
def test_agreed_loss_of_certain_pairs_is_that_of_dpo(certain: np.ndarray | None) -> None:
    ours = losses.dpo_agreed(agreed(certain), beta=BETA)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(losses.dpo(pairs(), beta=BETA)))


def test_agreed_loss_of_wrong_pairs_swaps_their_sides() -> None:
    swapped = PairLogps(
        *map(jnp.asarray, (REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN, REJECTED_TOKENS, CHOSEN_TOKENS, REAL))
    )
    ours = losses.dpo_agreed(agreed(np.zeros(6, np.float32)), beta=BETA)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(losses.dpo(swapped, beta=BETA)))


def test_agreed_loss_teaches_nothing_at_the_reference_if_a_label_is_as_likely_wrong() -> None:
    def value(chosen: Any) -> jax.Array:
        return losses.dpo_agreed(agreed(np.full(6, 0.5, np.float32), chosen), beta=BETA)[0]

    at_reference = jnp.asarray(REF_CHOSEN + REJECTED - REF_REJECTED)  # margin 0
    np.testing.assert_allclose(jax.grad(value)(at_reference), 0, atol=1e-6)
    np.testing.assert_array_equal(np.sign(jax.grad(value)(jnp.asarray(CHOSEN)))[REAL], np.sign(MARGIN)[REAL])


# ---------------------------------------------------------------------------------------------------- reward models


GAPS = RNG.normal(0, 2, (6, 4)).astype(np.float32)  # g(w,l), g(w,w), g(l,l), g(l,w) of six preferences


def five_terms(gaps: np.ndarray) -> np.ndarray:
    """Equation 2 of PIT: all inequalities among the four gaps, for each preference."""
    wl, ww, ll, lw = gaps.astype(np.float64).T
    return -sum(np.log(sigmoid(z)) for z in (wl - ww, wl - ll, wl - lw, ww - lw, ll - lw))


def test_gap_loss_is_the_sum_of_its_five_terms() -> None:
    total, count = losses.gap(jnp.asarray(GAPS), jnp.asarray(REAL))
    np.testing.assert_allclose(total, five_terms(GAPS)[REAL].sum(), rtol=2e-6)
    assert float(count) == REAL.sum() == 4


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ((0.0, 0.0, 0.0, 0.0), 5 * math.log(2)),
        ((7.5, 7.5, 7.5, 7.5), 5 * math.log(2)),
        # differences 1, 1, 2, 1, 1
        ((1.0, 0.0, 0.0, -1.0), 4 * math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))),
        # the wrong way round: -1, -1, -2, -1, -1
        ((-1.0, 0.0, 0.0, 1.0), 4 * math.log(1 + math.exp(1)) + math.log(1 + math.exp(2))),
        # nothing ties g(w,w) to g(l,l): differences -1, 1, 2, 3, 1
        ((1.0, 2.0, 0.0, -1.0), sum(math.log(1 + math.exp(-z)) for z in (-1, 1, 2, 3, 1))),
    ],
)
def test_gap_loss_matches_values_by_hand(gaps: tuple[float, ...], expected: float) -> None:
    total, count = losses.gap(jnp.asarray([gaps]), jnp.asarray([True]))
    assert float(total) == pytest.approx(expected, rel=1e-6) and float(count) == 1


@settings(max_examples=25, deadline=None)
@given(shift=st.integers(-64, 64))
def test_gap_loss_ignores_the_zero_point(shift: int) -> None:
    gaps = np.round(GAPS * 64) / 64  # adding a whole number is exact
    moved, still = (losses.gap(jnp.asarray(g, jnp.float32), jnp.asarray(REAL))[0] for g in (gaps + shift, gaps))
    assert float(moved) == float(still)


def test_descent_raises_the_improvement_and_lowers_the_decline() -> None:
    gradient = np.asarray(jax.grad(lambda g: losses.gap(g, jnp.asarray(REAL))[0])(jnp.asarray(GAPS)))
    assert (gradient[REAL, 0] < 0).all() and (gradient[REAL, 3] > 0).all() and not gradient[~REAL].any()
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("loss", [losses.gap, losses.bradley_terry])
def test_fill_groups_do_not_reach_the_sum(loss: Callable[..., losses.Loss], poison: float) -> None:
    spoilt = np.where(REAL[:, None], GAPS, np.float32(poison))
    clean, dirty = (loss(jnp.asarray(g), jnp.asarray(REAL)) for g in (GAPS, spoilt))
    np.testing.assert_array_equal(np.asarray(clean), np.asarray(dirty))


def test_bradley_terry_matches_values_by_hand() -> None:
    rewards = jnp.asarray([[0.0, 0.0], [2.0, 1.0], [1.0, 3.0], [9.0, -9.0]])
    total, count = losses.bradley_terry(rewards, jnp.asarray([True, True, True, False]))
    expected = math.log(2) + math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))
    assert float(total) == pytest.approx(expected, rel=1e-6) and float(count) == 3


# --------------------------------------------------------------------------- the shift, on a model whose answer is
# known

V = 16
MATRIX = np.random.default_rng(1).dirichlet(np.ones(V), V).astype(np.float32)
BIGRAM = decoder.ModelConfig(
    family="llama", vocab_size=V, embed_dim=V, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8,
    max_positions=32, norm_eps=1e-12,
)  # fmt: skip


def bigram_weights() -> decoder.Weights:
    """A decoder whose next-token distribution after token i is row i of MATRIX: layers that add nothing, one-hot
    embeddings."""
    zeros = decoder.map_parameters(lambda p: jnp.zeros(p.shape, jnp.float32), BIGRAM)
    head = jnp.asarray(np.log(MATRIX) / math.sqrt(V))  # the last norm turns a one-hot vector into sqrt(V) of it
    return zeros | {"embed": jnp.eye(V), "final_norm": jnp.ones(V), "lm_head": head}


def bigram_logps(weights: decoder.Weights, tokens: np.ndarray) -> jax.Array:
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
    ones = jnp.ones_like(positions)
    return decoder.sequence_logps(weights, BIGRAM, jnp.asarray(tokens)[None], positions, ones, dtype=jnp.float32)


def test_log_probability_of_a_known_transition_matrix() -> None:
    tokens = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.int32)
    expected = [0.0] + [math.log(MATRIX[a, b]) for a, b in itertools.pairwise(tokens)]
    np.testing.assert_allclose(bigram_logps(bigram_weights(), tokens)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("prompt", [1, 4])
def test_gradient_is_zero_at_prompt_targets_and_not_at_response_targets(prompt: int) -> None:
    """Each token occurs once, so row i of the head's gradient is that of the logits whose input is token i."""
    tokens = np.array([3, 1, 4, 15, 5, 9, 2, 0], np.int32)  # ends in the end of turn, here 0, which is also the pad
    mask = np.arange(len(tokens)) >= prompt

    def loss(head: jax.Array) -> jax.Array:
        return losses.sft(bigram_logps(bigram_weights() | {"lm_head": head}, tokens), jnp.asarray(mask)[None])[0]

    rows = np.abs(jax.grad(loss)(bigram_weights()["lm_head"]))
    predicting = tokens[prompt - 1 : -1]
    assert (rows[predicting].max(axis=1) > 1e-3).all()
    others = np.setdiff1d(np.arange(V), predicting)
    np.testing.assert_array_equal(rows[others], 0.0)
