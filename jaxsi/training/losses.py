"""Losses: pure functions of token log-probabilities and masks, each returning (sum, count).

The caller divides the sum by the count of the whole global batch, so that neither accumulation nor the number of
devices changes the loss. Every pair loss takes the same ``PairLogps`` and ``beta``, so that a config names the
function itself. A loss with its own settings is a callable frozen dataclass, ``simpo(gamma=0.5)``: equal settings share
one compiled program, and a run directory stores them."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsi.runs.config_snapshot import stored_as

Loss = tuple[Float[Array, ""], Float[Array, ""]]
PerPair = Float[Array, "B"]


class PairLogps(NamedTuple):
    """Log-probabilities summed over each response's tokens, under the policy and under the reference; the token counts;
    a mask that is False for fill rows; and the probability that a label is right (None: it is)."""

    chosen_B: PerPair
    rejected_B: PerPair
    ref_chosen_B: PerPair
    ref_rejected_B: PerPair
    chosen_tokens_B: Int[Array, "B"]
    rejected_tokens_B: Int[Array, "B"]
    real_B: Bool[Array, "B"]
    agreement_B: PerPair | None = None


def _total(loss_B: PerPair, real_B: Bool[Array, "B"]) -> Loss:
    # jnp.where, not a product: a NaN in a fill row must not reach the sum.
    return jnp.sum(jnp.where(real_B, loss_B, 0.0)), jnp.sum(real_B, dtype=jnp.float32)


def sft(logps_BT: Float[Array, "B T"], loss_mask_BT: Bool[Array, "B T"]) -> Loss:
    """Negative log-likelihood of the tokens whose mask is True; the count is the number of tokens."""
    return -jnp.sum(jnp.where(loss_mask_BT, logps_BT, 0.0)), jnp.sum(loss_mask_BT, dtype=jnp.float32)


def margin(p: PairLogps) -> PerPair:
    """Log-ratio of policy to reference on the chosen response, minus that on the rejected one."""
    return (p.chosen_B - p.ref_chosen_B) - (p.rejected_B - p.ref_rejected_B)


@stored_as("losses.dpo")
def dpo(p: PairLogps, *, beta: float) -> Loss:
    """-log sigma(beta * margin) (Rafailov et al. 2023, equation 7)."""
    return _total(-jax.nn.log_sigmoid(beta * margin(p)), p.real_B)


@stored_as("losses.dpo_smoothed")
@dataclasses.dataclass(frozen=True)
class dpo_smoothed:
    """DPO that assumes a label is wrong with probability e = ``label_smoothing`` (cDPO, Mitchell 2023):
    -(1 - e) log sigma(beta * margin) - e log sigma(-beta * margin)."""

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it lies in [0, 0.5)")

    def __call__(self, p: PairLogps, *, beta: float) -> Loss:
        z_B = beta * margin(p)
        wrong, right = -jax.nn.log_sigmoid(-z_B), -jax.nn.log_sigmoid(z_B)
        return _total((1 - self.label_smoothing) * right + self.label_smoothing * wrong, p.real_B)


@stored_as("losses.dpo_agreed")
def dpo_agreed(p: PairLogps, *, beta: float) -> Loss:
    """-C log sigma(beta * margin) - (1 - C) log sigma(-beta * margin), C being the pair's ``agreement`` (CREAM, Wang et
    al. 2024): cDPO whose share of wrong labels is measured for each pair, or each iteration."""
    agreement_B = jnp.ones_like(p.chosen_B) if p.agreement_B is None else p.agreement_B
    z_B = beta * margin(p)
    loss_B = -agreement_B * jax.nn.log_sigmoid(z_B) - (1 - agreement_B) * jax.nn.log_sigmoid(-z_B)
    return _total(loss_B, p.real_B)


@stored_as("losses.ipo")
def ipo(p: PairLogps, *, beta: float) -> Loss:
    """(margin - 1 / (2 beta))^2 (Azar et al. 2023, equation 17)."""
    return _total(jnp.square(margin(p) - 1 / (2 * beta)), p.real_B)


@stored_as("losses.hinge")
def hinge(p: PairLogps, *, beta: float) -> Loss:
    """max(0, 1 - beta * margin) (SLiC-HF's hinge on DPO's margin; Liu et al. 2023)."""
    return _total(jax.nn.relu(1 - beta * margin(p)), p.real_B)


def _means(p: PairLogps) -> tuple[PerPair, PerPair]:
    return p.chosen_B / jnp.maximum(p.chosen_tokens_B, 1), p.rejected_B / jnp.maximum(p.rejected_tokens_B, 1)


@stored_as("losses.simpo")
@dataclasses.dataclass(frozen=True)
class simpo:
    """-log sigma(beta * (mean logp chosen - mean logp rejected) - gamma): no reference (Meng et al. 2024, eq. 6)."""

    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma is {self.gamma}; it must be a number, at least 0")

    def __call__(self, p: PairLogps, *, beta: float) -> Loss:
        chosen_B, rejected_B = _means(p)
        return _total(-jax.nn.log_sigmoid(beta * (chosen_B - rejected_B) - self.gamma), p.real_B)


@stored_as("losses.orpo")
def orpo(p: PairLogps, *, beta: float) -> Loss:
    """Mean negative log-likelihood of the chosen response plus beta * -log sigma(log odds ratio); odds are q /
    (1 - q) with q = exp(mean token logp) (Hong et al. 2024, equations 5 to 7, whose lambda is beta here)."""
    chosen_B, rejected_B = _means(p)
    log_odds_B = (chosen_B - _log1mexp(chosen_B)) - (rejected_B - _log1mexp(rejected_B))
    return _total(-chosen_B - beta * jax.nn.log_sigmoid(log_odds_B), p.real_B)


def _log1mexp(x_B: PerPair) -> PerPair:
    """log(1 - exp(x)) for x <= 0, finite at 0."""
    return jnp.log(-jnp.expm1(jnp.minimum(x_B, -1e-6)))


def nll(p: PairLogps) -> Loss:
    """Mean token negative log-likelihood of the chosen response: the term that keeps DPO from pushing the chosen
    response down together with the rejected (Pang et al. 2024, equation 1)."""
    return _total(-_means(p)[0], p.real_B)


PerGroup = Float[Array, "B N"]


def _preferred(better_B: PerPair, worse_B: PerPair) -> PerPair:
    return -jax.nn.log_sigmoid(better_B - worse_B)


def bradley_terry(rewards_B2: PerGroup, real_B: Bool[Array, "B"]) -> Loss:
    """-log sigma(r(x, y_w) - r(x, y_l)) for rewards (chosen, rejected): the usual loss of a reward model."""
    return _total(_preferred(rewards_B2[:, 0], rewards_B2[:, 1]), real_B)


# PIT's five inequalities g(a) > g(b) among the quality gaps g of the ordered pairs (w,l), (w,w), (l,l), (l,w).
GAP_INEQUALITIES = {"wl>ww": (0, 1), "wl>ll": (0, 2), "wl>lw": (0, 3), "ww>lw": (1, 3), "ll>lw": (2, 3)}


def gap(gaps_B4: PerGroup, real_B: Bool[Array, "B"]) -> Loss:
    """The sum of -log sigma(g(a) - g(b)) over ``GAP_INEQUALITIES`` (PIT, arXiv 2310.00898, equation 2), of gaps in the
    order (w,l), (w,w), (l,l), (l,w); 5 ln 2 if all are equal. A constant added to all four changes nothing, so the zero
    point of a gap is not learnt, and g(w,w) is not tied to g(l,l)."""
    terms = [_preferred(gaps_B4[:, a], gaps_B4[:, b]) for a, b in GAP_INEQUALITIES.values()]
    return _total(sum(terms, jnp.zeros(real_B.shape)), real_B)


PerToken = Float[Array, "B T"]


def ppo_clip(
    logps_BT: PerToken,
    old_logps_BT: PerToken,
    advantages_BT: PerToken,
    loss_mask_BT: Bool[Array, "B T"],
    *,
    clip: float,
) -> Loss:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) of each token, ratio = pi / pi_old (PPO, Schulman et al. 2017,
    equation 7); at ratio 1 its gradient is the policy gradient's. The count is the number of tokens."""
    ratio_BT = jnp.exp(jnp.where(loss_mask_BT, logps_BT - old_logps_BT, 0.0))
    clipped_BT = jnp.clip(ratio_BT, 1 - clip, 1 + clip)
    loss_BT = -jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    return jnp.sum(jnp.where(loss_mask_BT, loss_BT, 0.0)), jnp.sum(loss_mask_BT, dtype=jnp.float32)


def grpo(
    logps_BT: PerToken,
    old_logps_BT: PerToken,
    ref_logps_BT: PerToken,
    advantages_BT: PerToken,
    loss_mask_BT: Bool[Array, "B T"],
    *,
    clip: float,
    kl_coef: float,
) -> tuple[Loss, Loss]:
    """GRPO (Shao et al. 2024, equations 3 and 4): in each response the mean over its tokens of
    -min(ratio A, clip(ratio) A) + kl_coef (pi_ref / pi - log(pi_ref / pi) - 1). The count is the number of responses
    with a token that counts. Also returns the sum of the KL estimates, with the same count."""
    ratio_BT = jnp.exp(jnp.where(loss_mask_BT, logps_BT - old_logps_BT, 0.0))
    clipped_BT = jnp.clip(ratio_BT, 1 - clip, 1 + clip)
    away_BT = jnp.where(loss_mask_BT, ref_logps_BT - logps_BT, 0.0)
    kl_BT = jnp.expm1(away_BT) - away_BT
    tokens_B = jnp.sum(loss_mask_BT, axis=1)
    count = jnp.sum(tokens_B > 0, dtype=jnp.float32)

    def of_responses(x_BT: PerToken) -> Float[Array, ""]:
        return jnp.sum(jnp.sum(jnp.where(loss_mask_BT, x_BT, 0.0), axis=1) / jnp.maximum(tokens_B, 1))

    loss_BT = -jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT) + kl_coef * kl_BT
    return (of_responses(loss_BT), count), (of_responses(kl_BT), count)


def value_clip(
    values_BT: PerToken, old_values_BT: PerToken, returns_BT: PerToken, loss_mask_BT: Bool[Array, "B T"], *, clip: float
) -> Loss:
    """Half of max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) of each token: the value loss of PPO's
    code (Huang et al. 2022, detail 9). The count is the number of tokens."""
    near_BT = old_values_BT + jnp.clip(values_BT - old_values_BT, -clip, clip)
    loss_BT = 0.5 * jnp.maximum(jnp.square(values_BT - returns_BT), jnp.square(near_BT - returns_BT))
    return jnp.sum(jnp.where(loss_mask_BT, loss_BT, 0.0)), jnp.sum(loss_mask_BT, dtype=jnp.float32)
