"""GRPO (Shao et al. 2024, arXiv 2402.03300): the other responses to a prompt take the place of a value model."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from jaxsi.training.advantages import standardised
from jaxsi.training.rl import Monitor, PolicyUpdates, Reward, RLConfig, RolloutBatch, Rollouts, reinforce


class GroupBatch(NamedTuple):
    """Rollouts, and the log-probabilities [B, T] of their tokens under the reference."""

    rollouts: RolloutBatch
    ref_logps_BT: Any


@dataclasses.dataclass(frozen=True)
class GroupLoss:
    """GRPO's loss of a ``GroupBatch`` (equation 3). Instances with equal fields share one compiled program."""

    config: ModelConfig
    mesh: Mesh
    dtype: str
    remat: Remat
    clip: float
    kl_coef: float

    def __call__(self, weights: Weights, batch: GroupBatch) -> tuple[losses.Loss, train.Metrics]:
        rollouts = batch.rollouts
        logps_BT = decoder.sequence_logps(
            weights, self.config, rollouts.tokens_BT, lengths_B=rollouts.lengths_B, dtype=jnp.dtype(self.dtype),
            remat=self.remat, mesh=self.mesh,
        )  # fmt: skip
        mask_BT = rollouts.loss_mask_BT
        loss, kl = losses.grpo(
            logps_BT, rollouts.old_logps_BT, batch.ref_logps_BT, rollouts.advantages_BT, mask_BT, clip=self.clip,
            kl_coef=self.kl_coef,
        )  # fmt: skip
        ratio_BT = jnp.exp(jnp.where(mask_BT, logps_BT - rollouts.old_logps_BT, 0.0))
        tokens = jnp.sum(mask_BT, dtype=jnp.float32)

        def mean(x_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.sum(jnp.where(mask_BT, x_BT, 0.0)), tokens

        return loss, {"ratio": mean(ratio_BT), "clipped": mean(jnp.abs(ratio_BT - 1) > self.clip), "loss_kl": kl}


@stored_as("grpo.grpo")
def grpo(
    policy: LM,
    reference: LM,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: RLConfig,
    scope: Scope,
    *,
    monitor: Monitor | None = None,
) -> LM:
    """Reinforces ``policy``: a response's advantage is its reward less the mean of its group, over the group's standard
    deviation. The KL to ``reference`` is a term of the loss, weighted by ``config.kl_coef`` (the paper: 0.04), and not
    a part of the reward. A group whose rewards are all equal teaches nothing. The result is also the scope's
    checkpoint.

    Raises: ValueError if groups hold a single response, which has no others to be compared with.
    """
    if config.group_size < 2:
        raise ValueError(f"group_size is {config.group_size}; GRPO needs at least 2 responses per prompt")
    config = settled_in(scope, config)

    def with_advantages(rollouts: Rollouts, _: Any) -> GroupBatch:
        mask_BT = rollouts.batch.loss_mask_BT
        advantages_PG = standardised(rollouts.rewards_B.reshape(-1, config.group_size))
        advantages_BT = np.where(mask_BT, np.nan_to_num(advantages_PG).reshape(-1, 1), 0.0).astype(np.float32)
        return GroupBatch(rollouts.batch._replace(advantages_BT=advantages_BT), rollouts.ref_logps_BT)

    loss = GroupLoss(policy.config, policy.mesh, config.dtype, config.remat, config.clip, config.kl_coef)
    update = PolicyUpdates({"policy": loss}, with_advantages, policy.mesh, config)
    return reinforce({"policy": policy}, reference, prompts, reward, config, scope, update, monitor)
