"""On-policy learning with a frozen reference: rollouts, the loop, and ``rloo``. Further learners on the same parts are
``ppo.ppo``, ``grpo.grpo`` and ``online_dpo.online_dpo``.

    for step = 1 .. S:
        y_i^g ~ pi(. | x_i)                                   g = 1 .. G, temperature 1, the whole distribution
        r_i^g = reward(x_i, y_i^g)                            minus a penalty if the token limit cut y off
        pi    <- updates by minibatches                       the learner's own

RLOO (Ahmadian et al. 2024, arXiv 2402.14740): R = r - kl_coef * sum_t log(pi / pi_ref), A = R minus the mean R of the
prompt's other responses; a clipped policy gradient on A. Random draws are keyed by step, prompt and sample, so a run
that was killed resumes with the same noise.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsi import lm as lmlib
from jaxsi.lm import LM, save_checkpoint, tokens_array
from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.compute_dtype import settled_in
from jaxsi.model.decoder import ModelConfig, Remat, Weights
from jaxsi.runs import preemption
from jaxsi.runs.config_snapshot import AUTO, may_change, stored_as
from jaxsi.runs.progress import progress
from jaxsi.runs.records import Prompt, Response
from jaxsi.runs.run import Scope
from jaxsi.sampling.generate import bucket, generate
from jaxsi.text.chat import render_prompt
from jaxsi.training import losses, optim, resume, train
from jaxsi.training.advantages import leave_one_out
from jaxsi.training.optim import OptimConfig

Reward = Callable[[Sequence[Prompt], Sequence[Response]], np.ndarray]
Monitor = Callable[[Sequence[Prompt], Sequence[Response], np.ndarray], Mapping[str, float]]
MAX_BAD = 0.5  # largest share of non-finite rewards allowed in a step


class RLError(RuntimeError):
    """Reinforcement learning cannot go on: too few prompts, or too many non-finite rewards."""


@stored_as("rl.RLConfig")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
    """How to reinforce. A step samples ``prompts_per_step`` x ``group_size`` responses and trains on them for
    ``epochs`` epochs, in minibatches of ``batch_size`` rows.

    ``cut_off_penalty`` is subtracted from the reward of a response that the token limit cut off: it is incomplete.
    """

    optim: OptimConfig
    steps: int
    prompts_per_step: int = 64
    group_size: int = 4
    epochs: int = 1
    batch_size: int = 256
    accumulate: int = 1
    kl_coef: float = 0.05
    clip: float = 0.2
    cut_off_penalty: float = 1.0
    max_new_tokens: int = 512
    remat: Remat = "full"
    dtype: str = AUTO
    checkpoint_every: int = 50
    log_every: int = dataclasses.field(default=1, metadata=may_change())

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if type(value) is int}
        if wrong := [f"{name} is {value}" for name, value in numbers.items() if value < 1]:
            raise ValueError(f"{', '.join(wrong)}; the minimum is 1")
        if self.rows % self.batch_size or self.batch_size % self.accumulate:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} x group_size {self.group_size} = {self.rows} rows, "
                f"batch_size {self.batch_size}, accumulate {self.accumulate}: each must divide the one before it"
            )
        if not (0 <= self.kl_coef < math.inf and 0 < self.clip < 1 and 0 <= self.cut_off_penalty < math.inf):
            raise ValueError(
                f"kl_coef is {self.kl_coef} (>= 0), clip {self.clip} (in (0, 1)), cut_off_penalty "
                f"{self.cut_off_penalty} (>= 0)"
            )

    @property
    def rows(self) -> int:
        """Responses per step."""
        return self.prompts_per_step * self.group_size

    @property
    def rows_at_once(self) -> int:
        """Responses that go through a model together."""
        return self.batch_size // self.accumulate

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole training."""
        return self.steps * self.epochs * (self.rows // self.batch_size)

    def check(self, mesh: Mesh, name: str = "") -> None:
        """Raises MeshError if the rows of a micro-batch do not divide evenly among the devices."""
        meshlib.check_rows(self.batch_size, self.accumulate, mesh, name)


class RolloutBatch(NamedTuple):
    """Responses after their prompts, one per row: segments are 1, then 0. ``loss_mask_BT`` is True at the response's
    tokens. ``old_logps_BT`` are those of the policy that sampled. Values and returns are zeros without a value model. A
    row whose mask is all False is fill, or its response had no reward."""

    tokens_BT: Any
    segments_BT: Any
    loss_mask_BT: Any
    old_logps_BT: Any
    advantages_BT: Any
    old_values_BT: Any
    returns_BT: Any

    @property
    def lengths_B(self) -> jax.Array:
        """The number of tokens in each row, without the padding after them."""
        return jnp.sum(self.segments_BT, axis=1)


# --------------------------------------------------------------------------------------------------------------- losses


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """The clipped policy gradient of a ``RolloutBatch``. Instances with equal fields share one compiled program."""

    config: ModelConfig
    mesh: Mesh
    dtype: str
    remat: Remat
    clip: float

    def __call__(self, weights: Weights, batch: RolloutBatch) -> tuple[losses.Loss, train.Metrics]:
        logps_BT = decoder.sequence_logps(
            weights,
            self.config,
            batch.tokens_BT,
            lengths_B=batch.lengths_B,
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
            mesh=self.mesh,
        )
        mask_BT = batch.loss_mask_BT
        loss = losses.ppo_clip(logps_BT, batch.old_logps_BT, batch.advantages_BT, mask_BT, clip=self.clip)
        ratio_BT = jnp.exp(jnp.where(mask_BT, logps_BT - batch.old_logps_BT, 0.0))

        def mean(x_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.sum(jnp.where(mask_BT, x_BT, 0.0)), loss[1]

        return loss, {"ratio": mean(ratio_BT), "clipped": mean(jnp.abs(ratio_BT - 1) > self.clip)}


@functools.partial(jax.jit, static_argnames=("config", "mesh", "dtype"))
def _logps(weights: Weights, batch: RolloutBatch, *, config: ModelConfig, mesh: Mesh, dtype: str) -> jax.Array:
    return decoder.sequence_logps(
        weights,
        config,
        batch.tokens_BT,
        lengths_B=batch.lengths_B,
        dtype=jnp.dtype(dtype),
        mesh=mesh,
    )


# ------------------------------------------------------------------------------------------------------------- rollouts


class Rollouts(NamedTuple):
    """One step's responses, prompt-major, as NumPy: ``batch`` without advantages; ``rewards_B`` float64, NaN for a
    missing reward; ``ref_logps_BT`` of the reference; ``responses_BT`` True at all tokens of responses; and metrics."""

    batch: RolloutBatch
    rewards_B: np.ndarray
    ref_logps_BT: np.ndarray
    responses_BT: np.ndarray
    metrics: dict[str, float]


def roll_out(
    policy: LM,
    reference: LM,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: RLConfig,
    key: jax.Array,
    monitor: Monitor | None = None,
) -> Rollouts:
    """Samples ``group_size`` responses to each prompt, and scores them with the reward, the policy and the reference.

    Raises: RLError if more than half of the rewards are not finite; the message names a prompt.
    """
    responses = generate(
        policy,
        prompts,
        num_samples=config.group_size,
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=config.max_new_tokens,
        key=key,
        batch_size=config.batch_size,
    )
    rewards_B = np.asarray(reward(prompts, responses), np.float64)
    bad = np.flatnonzero(~np.isfinite(rewards_B))
    if rewards_B.shape != (len(responses),) or len(bad) > MAX_BAD * len(responses):
        detail = f"the first is for {responses[bad[0]].prompt_id!r}" if len(bad) else f"shape {rewards_B.shape}"
        raise RLError(
            f"{len(bad)} of the rewards of {len(responses)} responses are not numbers ({detail}); check the reward"
        )
    monitored = {} if monitor is None else dict(monitor(prompts, responses, rewards_B))
    cut_off_B = np.asarray([response.finish_reason == "length" for response in responses])
    rewards_B = np.where(np.isfinite(rewards_B), rewards_B - config.cut_off_penalty * cut_off_B, np.nan)
    batch, sampler_BT = _rows(policy, prompts, responses)
    mask_BT = batch.loss_mask_BT
    old_BT, ref_BT = (_logps_of(lm, batch, config) for lm in (policy, reference))
    difference_BT = np.where(mask_BT, old_BT - ref_BT, 0.0)
    groups_PG = rewards_B.reshape(-1, config.group_size)
    metrics = {
        "reward": float(np.nanmean(rewards_B)),
        "reward_std": float(np.nanstd(rewards_B)),
        "kl": float(difference_BT.sum() / len(responses)),  # nats a response
        # Schulman's k3 estimator: never negative, and with less variance.
        "kl_k3": float(np.where(mask_BT, np.expm1(-difference_BT) + difference_BT, 0.0).sum() / mask_BT.sum()),
        "entropy": float(-np.where(mask_BT, old_BT, 0.0).sum() / mask_BT.sum()),
        "sampler_gap": float(np.abs(np.where(mask_BT, sampler_BT - old_BT, 0.0)).max()),
        "length": float(mask_BT.sum() / len(responses)),
        "cut_off": float(cut_off_B.mean()),
        "no_reward": float(len(bad)),
        "even_groups": float(np.mean(np.ptp(np.nan_to_num(groups_PG), axis=1) == 0)),
        **monitored,
    }
    rewarded_BT = mask_BT & np.isfinite(rewards_B)[:, None]
    batch = batch._replace(loss_mask_BT=rewarded_BT, old_logps_BT=old_BT)
    return Rollouts(batch, rewards_B, ref_BT, mask_BT, metrics)


def _rows(policy: LM, prompts: Sequence[Prompt], responses: Sequence[Response]) -> tuple[RolloutBatch, np.ndarray]:
    """The rows of a step as NumPy, and the sampler's log-probabilities."""
    heads = {prompt.id: render_prompt(policy.tokenizer, prompt.messages) for prompt in prompts}
    rows = [[*heads[response.prompt_id], *response.token_ids] for response in responses]
    T = bucket(max(map(len, rows)), 64)
    sampler_BT = np.zeros((len(rows), T), np.float32)
    mask_BT = np.zeros((len(rows), T), bool)
    for i, (row, response) in enumerate(zip(rows, responses, strict=True)):
        start = len(row) - len(response.token_ids)
        mask_BT[i, start : len(row)] = True
        sampler_BT[i, start : len(row)] = response.logps
    tokens_BT = tokens_array(rows, T, 0)
    segments_BT = (np.arange(T)[None] < np.asarray(list(map(len, rows)))[:, None]).astype(np.int32)
    zeros_BT = np.zeros((len(rows), T), np.float32)
    return RolloutBatch(tokens_BT, segments_BT, mask_BT, *[zeros_BT] * 4), sampler_BT


def place(batch: Any, rows: np.ndarray | slice, mesh: Mesh) -> Any:
    return jax.tree.map(lambda x: meshlib.put(x[rows], mesh, ("batch", *[None] * (x.ndim - 1))), batch)


def in_parts(function: Callable[[RolloutBatch], jax.Array], batch: RolloutBatch, config: RLConfig, mesh: Mesh) -> Any:
    """Applies ``function`` to the rows of a whole step, in micro-batches; returns its values [B, T] as NumPy."""
    size = config.rows_at_once
    parts = [slice(start, start + size) for start in range(0, len(batch.tokens_BT), size)]
    return np.concatenate([meshlib.fetch(function(place(batch, rows, mesh))) for rows in parts])


def _logps_of(lm: LM, batch: RolloutBatch, config: RLConfig) -> np.ndarray:
    program = functools.partial(_logps, lm.weights, config=lm.config, mesh=lm.mesh, dtype=config.dtype)
    return in_parts(program, batch, config, lm.mesh)


def prompts_of_step(prompts: Sequence[Prompt], step: int, config: RLConfig, seed: int) -> list[Prompt]:
    """The prompts of step number ``step``. Each epoch goes through all prompts once, in its own order."""
    per_epoch = len(prompts) // config.prompts_per_step
    if per_epoch == 0:
        raise RLError(
            f"{len(prompts)} prompts are fewer than prompts_per_step = {config.prompts_per_step}; add some or lower it"
        )
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(prompts))
    return [prompts[i] for i in order[place * config.prompts_per_step :][: config.prompts_per_step]]


def minibatches(rows: int, config: RLConfig, seed: int, step: int) -> list[np.ndarray]:
    """The row numbers of each optimizer step. Each epoch has its own order, unless one batch holds the whole step."""
    if rows == config.batch_size:
        return [np.arange(rows)] * config.epochs
    orders = [np.random.default_rng([seed, step, epoch]).permutation(rows) for epoch in range(config.epochs)]
    return [order[k : k + config.batch_size] for order in orders for k in range(0, rows, config.batch_size)]


# ------------------------------------------------------------------------------------------------------------- the loop

States = dict[str, train.State]  # of the policy, and of its value model if it has one
Update = Callable[[States, Rollouts, int, int, np.ndarray], dict[str, Any]]


def policy_loss(policy: LM, config: RLConfig) -> PolicyLoss:
    return PolicyLoss(policy.config, policy.mesh, config.dtype, config.remat, config.clip)


class PolicyUpdates(NamedTuple):
    """The optimizer steps on one step's rollouts, by minibatches of responses: one loss for each model that learns."""

    loss_by_name: Mapping[str, Any]
    with_advantages: Callable[[Rollouts, Any], Any]
    mesh: Mesh
    config: RLConfig

    def __call__(self, states: States, rollouts: Rollouts, step: int, seed: int, rates: np.ndarray) -> dict[str, Any]:
        """Updates ``states`` in place, with the learning rates ``rates``, one for each minibatch; returns metrics."""
        config, metrics = self.config, dict[str, Any]()
        batch = self.with_advantages(rollouts, states["value"].weights if "value" in states else None)
        for rate, rows in zip(rates, minibatches(config.rows, config, seed, step), strict=True):
            part = place(batch, rows, self.mesh)
            for name, loss in self.loss_by_name.items():
                states[name], of_step = train.train_step(
                    states[name], part, rate, loss=loss, optimizer=config.optim, accumulate=config.accumulate
                )
                metrics |= of_step if name == "policy" else {f"{name}_{n}": x for n, x in of_step.items()}
        return metrics


def reinforce(
    learners: Mapping[str, LM],
    reference: LM,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: RLConfig,
    scope: Scope,
    update: Update,
    monitor: Monitor | None,
) -> LM:
    """The loop that all learners share: rollouts of ``learners["policy"]``, then ``update(states, rollouts, step, seed,
    rates)``. It can resume at every checkpoint. ``config`` has its dtype (``settled_in``)."""
    policy = learners["policy"]
    if (finished := resume.finished(policy, scope)) is not None:
        return finished
    config.check(policy.mesh)
    lmlib.make_room()  # frees what the sampling stages used
    rates = np.asarray(jax.vmap(optim.schedule(config.optim, config.updates))(jnp.arange(config.updates)), np.float32)
    per_step = config.updates // config.steps
    seed = train.seed_of(scope, "rl")
    with scope.timed("rl"), progress(f"{scope.name}/rl", config.steps) as advance, preemption.stops_itself():
        start = {name: train.initial_state(lm.weights, config.optim) for name, lm in learners.items()}
        states = resume.resumed(start, scope.path / "resume")
        done = int(states["policy"].step) // per_step
        log = resume.Log(scope.path / "train.jsonl", done, config.steps)
        advance(done, False)
        for step in range(done, config.steps):
            # A name, no fingerprint: rollouts are not stored, and a fingerprint would read all weights at each step.
            now = dataclasses.replace(policy, weights=states["policy"].weights, identity=f"{scope.name} step {step}")
            chosen = prompts_of_step(prompts, step, config, seed)
            rollouts = roll_out(now, reference, chosen, reward, config, scope.key("rollouts", step), monitor)
            lmlib.make_room()
            rates_of_step = rates[step * per_step :][:per_step]
            metrics: dict[str, Any] = rollouts.metrics | update(states, rollouts, step, seed, rates_of_step)
            advance(1, True)
            last = step + 1 == config.steps
            if (step + 1) % config.log_every == 0 or last:
                log.write(step + 1, float(rates_of_step[-1]), metrics)
                train.check_skipped(states["policy"], step + 1, config.steps, scope)
            stopping = preemption.requested() and not last
            if not last and (stopping or (step + 1) % config.checkpoint_every == 0):
                resume.save_resume(scope.path / "resume", states, done=step + 1)
            if stopping:
                raise preemption.Stopped(f"{scope.path}: training is saved up to step {step + 1} of {config.steps}")
        for name in learners.keys() - {"policy"}:
            resume.remove(scope.path / name)  # complete if a run was killed between the two saves
            save_checkpoint(learners[name].replace(states[name].weights), scope.path / name, {"step": config.steps})
        trained = policy.replace(states["policy"].weights)
        resume.save_result(trained, states["policy"], scope, {"step": config.steps})
    return trained


# ----------------------------------------------------------------------------------------------------------------- RLOO


@stored_as("rl.rloo")
def rloo(
    policy: LM,
    reference: LM,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: RLConfig,
    scope: Scope,
    *,
    monitor: Monitor | None = None,
) -> LM:
    """Reinforces ``policy`` with the leave-one-out baseline; the result is also the scope's checkpoint.

    Raises: ValueError if groups hold a single response, which leaves no others to compare it with.
    """
    if config.group_size < 2:
        raise ValueError(f"group_size is {config.group_size}; leave-one-out needs at least 2 responses per prompt")
    config = settled_in(scope, config)

    def with_advantages(rollouts: Rollouts, _: Any) -> RolloutBatch:
        batch, mask_BT = rollouts.batch, rollouts.batch.loss_mask_BT
        kl_B = np.where(mask_BT, batch.old_logps_BT - rollouts.ref_logps_BT, 0.0).sum(axis=1)
        returns_PG = (rollouts.rewards_B - config.kl_coef * kl_B).reshape(-1, config.group_size)
        advantages_B1 = np.nan_to_num(leave_one_out(returns_PG)).reshape(-1, 1)
        return batch._replace(advantages_BT=np.where(mask_BT, advantages_B1, 0.0).astype(np.float32))

    update = PolicyUpdates({"policy": policy_loss(policy, config)}, with_advantages, policy.mesh, config)
    return reinforce({"policy": policy}, reference, prompts, reward, config, scope, update, monitor)
