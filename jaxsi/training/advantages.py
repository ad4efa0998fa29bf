"""Advantages: RLOO's leave-one-out baseline, GRPO's standardised rewards, PPO's generalised advantage estimation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def leave_one_out(returns_PG: np.ndarray) -> np.ndarray:
    """Each return minus the mean of the other returns in its group [P, G]. NaN returns are ignored and stay NaN. The
    advantages of a group sum to 0. A group with a single finite return gets 0."""
    valid_PG = np.isfinite(returns_PG)
    count_P1 = valid_PG.sum(axis=1, keepdims=True)
    total_P1 = np.where(valid_PG, returns_PG, 0.0).sum(axis=1, keepdims=True)
    others_PG = (total_P1 - returns_PG) / np.maximum(count_P1 - 1, 1)
    return np.where(valid_PG, np.where(count_P1 > 1, returns_PG - others_PG, 0.0), np.nan)


def standardised(rewards_PG: np.ndarray) -> np.ndarray:
    """Each reward less the mean of its group [P, G], over the group's standard deviation (GRPO, arXiv 2402.03300,
    section 4.1.2). NaN rewards are ignored and stay NaN. A group with equal rewards gets 0."""
    valid_PG = np.isfinite(rewards_PG)
    count_P1 = np.maximum(valid_PG.sum(axis=1, keepdims=True), 1)
    centred_PG = rewards_PG - np.where(valid_PG, rewards_PG, 0.0).sum(axis=1, keepdims=True) / count_P1
    squares_PG = np.where(valid_PG, np.square(centred_PG), 0.0)
    deviation_P1 = np.sqrt(squares_PG.sum(axis=1, keepdims=True) / count_P1)
    even_P1 = deviation_P1 <= 1e-6 * np.maximum(1.0, np.abs(np.nan_to_num(rewards_PG)).max(axis=1, keepdims=True))
    return np.where(even_P1 & valid_PG, 0.0, centred_PG / np.where(even_P1, 1.0, deviation_P1))


@functools.partial(jax.jit, static_argnames=("gamma", "lam"))
def gae(
    rewards_BT: jax.Array, values_BT: jax.Array, mask_BT: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns [B, T] by generalised advantage estimation (Schulman et al. 2016, equation 16).

    ``values_BT`` is the value of the text before each token; after a row's last True in ``mask_BT`` the value is 0.
    The True positions of a row are contiguous.
    """
    next_values_BT = jnp.where(jnp.roll(mask_BT, -1, axis=1), jnp.roll(values_BT, -1, axis=1), 0.0)
    next_values_BT = next_values_BT.at[:, -1].set(0.0)
    deltas_BT = jnp.where(mask_BT, rewards_BT + gamma * next_values_BT - values_BT, 0.0)

    def back(later_B: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta_B, mask_B = inputs
        advantage_B = jnp.where(mask_B, delta_B + gamma * lam * later_B, 0.0)
        return advantage_B, advantage_B

    start_B = jnp.zeros(rewards_BT.shape[0])
    _, advantages_TB = jax.lax.scan(back, start_B, (deltas_BT.T, mask_BT.T), reverse=True)
    advantages_BT = advantages_TB.T
    return advantages_BT, jnp.where(mask_BT, advantages_BT + values_BT, 0.0)
