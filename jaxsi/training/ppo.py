"""PPO (Schulman et al. 2017): the KL penalty is per token; a value model and GAE give the advantages."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsi.lm import LM
from jaxsi.model import decoder
from jaxsi.model.compute_dtype import settled_in
from jaxsi.model.decoder import ModelConfig, Remat, Weights
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Prompt
from jaxsi.runs.run import Scope
from jaxsi.training import losses, train
from jaxsi.training.advantages import gae
from jaxsi.training.reward import lm_config, with_scalar_head
from jaxsi.training.rl import (
    Monitor,
    PolicyUpdates,
    Reward,
    RLConfig,
    RolloutBatch,
    Rollouts,
    in_parts,
    policy_loss,
    reinforce,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """PPO's settings beside ``RLConfig``: discount ``gamma``, GAE's ``lam``, and the range of the clipped value."""

    gamma: float = 1.0
    lam: float = 0.95
    value_clip: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1 or not 0 <= self.lam <= 1 or self.value_clip <= 0:
            raise ValueError(
                f"gamma is {self.gamma} (in (0, 1]), lam {self.lam} (in [0, 1]), value_clip {self.value_clip} (> 0)"
            )


def token_values(
    weights: Weights, batch: RolloutBatch, *, config: ModelConfig, mesh: Mesh, dtype: str, remat: Remat
) -> jax.Array:
    """The value [B, T] of the text before each token: the scalar head's output at the previous token."""
    values_BT = decoder.scalar_values(
        weights,
        config,
        batch.tokens_BT,
        lengths_B=batch.lengths_B,
        dtype=jnp.dtype(dtype),
        remat=remat,
        mesh=mesh,
    )
    return jnp.roll(values_BT, 1, axis=1).at[:, 0].set(0.0)


@dataclasses.dataclass(frozen=True)
class ValueLoss:
    """The clipped value loss of a ``RolloutBatch``. Instances with equal fields share one compiled program."""

    config: ModelConfig
    mesh: Mesh
    dtype: str
    remat: Remat
    clip: float

    def __call__(self, weights: Weights, batch: RolloutBatch) -> tuple[losses.Loss, train.Metrics]:
        values_BT = token_values(weights, batch, config=self.config, mesh=self.mesh, dtype=self.dtype, remat=self.remat)
        loss = losses.value_clip(values_BT, batch.old_values_BT, batch.returns_BT, batch.loss_mask_BT, clip=self.clip)
        return loss, {}


_values = jax.jit(token_values, static_argnames=("config", "mesh", "dtype", "remat"))


@stored_as("rl.ppo")
def ppo(
    policy: LM,
    reference: LM,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: RLConfig,
    scope: Scope,
    *,
    monitor: Monitor | None = None,
    value: LM | None = None,
    extra: PPOConfig = PPOConfig(),
) -> LM:
    """Reinforces ``policy`` with a value model and GAE. The policy becomes the scope's checkpoint, the value model that
    of scope/value.

    Args:
      value: the initial value model; by default the policy's decoder with a head of zeros.
    """
    value = with_scalar_head(policy) if value is None else value
    value_config = lm_config(value)
    config = settled_in(scope, config)

    def with_advantages(rollouts: Rollouts, weights: Weights) -> RolloutBatch:
        batch, mask_BT = rollouts.batch, rollouts.batch.loss_mask_BT
        program = functools.partial(
            _values, weights, config=value_config, mesh=value.mesh, dtype=config.dtype, remat="none"
        )
        values_BT = np.where(mask_BT, in_parts(program, batch, config, value.mesh), 0.0)
        rewards_BT = -config.kl_coef * np.where(mask_BT, batch.old_logps_BT - rollouts.ref_logps_BT, 0.0)
        last_B = mask_BT.shape[1] - 1 - np.argmax(mask_BT[:, ::-1], axis=1)
        rewards_BT[np.arange(len(last_B)), last_B] += np.nan_to_num(rollouts.rewards_B)
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=extra.gamma, lam=extra.lam)
        advantages_BT = np.asarray(advantages_BT)
        inside = advantages_BT[mask_BT]
        whitened_BT = np.where(mask_BT, (advantages_BT - inside.mean()) / (inside.std() + 1e-8), 0.0)
        error, spread = np.asarray(returns_BT)[mask_BT] - values_BT[mask_BT], np.asarray(returns_BT)[mask_BT].var()
        rollouts.metrics["explained_variance"] = float(1 - error.var() / (spread + 1e-8))
        return batch._replace(
            advantages_BT=whitened_BT.astype(np.float32),
            old_values_BT=values_BT.astype(np.float32),
            returns_BT=np.asarray(returns_BT, np.float32),
        )

    value_loss = ValueLoss(value_config, value.mesh, config.dtype, config.remat, extra.value_clip)
    losses_by_name = {"policy": policy_loss(policy, config), "value": value_loss}
    update = PolicyUpdates(losses_by_name, with_advantages, policy.mesh, config)
    return reinforce({"policy": policy, "value": value}, reference, prompts, reward, config, scope, update, monitor)
