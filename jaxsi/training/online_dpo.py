"""Online DPO (Guo et al. 2024, arXiv 2402.04792): preference pairs of the policy's newest samples, at every step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsi.lm import LM
from jaxsi.model import mesh as meshlib
from jaxsi.model.compute_dtype import settled_in
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Prompt
from jaxsi.runs.run import Scope
from jaxsi.training import losses, train
from jaxsi.training.batches import Sequence_, pair_batches
from jaxsi.training.rl import Monitor, Reward, RLConfig, Rollouts, reinforce


class PairUpdates(NamedTuple):
    """The optimizer steps on one step's rollouts: the best and the worst response to each prompt are a pair."""

    lm: LM
    loss: train.PairLoss
    config: RLConfig

    def __call__(
        self, states: dict[str, train.State], rollouts: Rollouts, step: int, seed: int, rates: np.ndarray
    ) -> dict[str, Any]:
        """Updates the policy's state in place; ties and prompts with fewer than two rewards do not count."""
        config, metrics = self.config, dict[str, Any]()
        encoded, refs, differ = pairs_of(rollouts, config.group_size)
        size = config.batch_size // config.group_size
        batches = pair_batches(
            self.lm, encoded, refs, size, min_length=64, epochs=config.epochs, seed=(seed + step) % 2**31
        )
        for k, rate in enumerate(rates):
            real = np.zeros(size, bool)
            real[: len(batches.plan[k])] = differ[batches.plan[k]]
            batch = batches[k]._replace(real_B=meshlib.put(real, self.lm.mesh, ("batch",)))
            states["policy"], of_step = train.train_step(
                states["policy"], batch, rate, loss=self.loss, optimizer=config.optim, accumulate=config.accumulate
            )
            metrics |= of_step
        return metrics | {"ties": float((~differ).sum())}


def check_pairs(config: RLConfig) -> None:
    """Raises: ValueError if groups hold a single response, if ``batch_size`` cuts a group in two, if ``kl_coef`` is 0,
    or if ``clip`` is set, which DPO does not have."""
    whole_pairs = config.group_size >= 2 and config.batch_size % config.group_size == 0
    if not whole_pairs or config.kl_coef == 0 or config.clip != RLConfig.clip:
        raise ValueError(
            f"group_size is {config.group_size} (at least 2: a pair), batch_size {config.batch_size} (a multiple of "
            f"group_size: whole pairs), kl_coef {config.kl_coef} (positive: DPO's beta), clip {config.clip} (leave it "
            "out: online DPO has no clipped ratio)"
        )


def pairs_of(
    rollouts: Rollouts, group_size: int
) -> tuple[list[tuple[Sequence_, Sequence_]], list[tuple[float, float]], np.ndarray]:
    """(chosen, rejected) of each prompt by reward, the first of equal ones; their summed log-probabilities under the
    reference; and which prompts [P] bool have two different rewards."""
    batch = rollouts.batch
    rewards_PG = rollouts.rewards_B.reshape(-1, group_size)
    best_P = np.where(np.isnan(rewards_PG), -np.inf, rewards_PG).argmax(axis=1)
    worst_P = np.where(np.isnan(rewards_PG), np.inf, rewards_PG).argmin(axis=1)
    lengths_B = np.asarray(batch.segments_BT).sum(axis=1)
    refs_B = np.where(rollouts.responses_BT, rollouts.ref_logps_BT, 0.0).sum(axis=1)

    def sequence(row: int) -> Sequence_:
        return Sequence_(batch.tokens_BT[row, : lengths_B[row]], rollouts.responses_BT[row, : lengths_B[row]])

    encoded, refs = [], []
    for prompt, sides in enumerate(zip(best_P, worst_P, strict=True)):
        chosen, rejected = (prompt * group_size + int(side) for side in sides)
        encoded.append((sequence(chosen), sequence(rejected)))
        refs.append((float(refs_B[chosen]), float(refs_B[rejected])))
    rows = np.arange(len(rewards_PG))
    best, worst = rewards_PG[rows, best_P], rewards_PG[rows, worst_P]
    return encoded, refs, np.isfinite(best) & np.isfinite(worst) & (best > worst)


@stored_as("online_dpo.online_dpo")
def online_dpo(
    policy: LM,
    reference: LM,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: RLConfig,
    scope: Scope,
    *,
    monitor: Monitor | None = None,
    loss: Callable[..., losses.Loss] = losses.dpo,
) -> LM:
    """Each step samples ``group_size`` responses (the paper: 2) to each prompt from the policy of that step; the best
    and the worst by ``reward`` are a pair, on which ``loss`` is minimised against ``reference``. DPO's beta is
    ``config.kl_coef``: the weight of the KL penalty in the objective that DPO solves. The result is also the scope's
    checkpoint.

    Raises: ValueError as ``check_pairs``.
    """
    check_pairs(config)
    config = settled_in(scope, config)
    meshlib.check_rows(config.batch_size // config.group_size, config.accumulate, policy.mesh, "rl (in pairs)")
    pair_loss = train.PairLoss(policy.config, policy.mesh, config.dtype, config.remat, loss, config.kl_coef, 0.0)
    update = PairUpdates(policy, pair_loss, config)
    return reinforce({"policy": policy}, reference, prompts, reward, config, scope, update, monitor)
