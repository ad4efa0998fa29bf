"""The train step, the training loop, and the two kinds of training that the methods share: ``sft`` and ``dpo``."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxsi import lm as lmlib
from jaxsi.lm import LM
from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.compute_dtype import settled_in
from jaxsi.model.decoder import ModelConfig, Remat, Weights
from jaxsi.runs import preemption
from jaxsi.runs.config_snapshot import AUTO, may_change, stored_as
from jaxsi.runs.progress import progress
from jaxsi.runs.records import PreferencePair, SFTExample
from jaxsi.runs.run import Scope
from jaxsi.training import losses, optim, resume
from jaxsi.training.batches import (
    Batches,
    PairBatch,
    Sequence_,
    TokenBatch,
    encode_examples,
    encode_pair,
    pair_batches,
)
from jaxsi.training.losses import PairLogps
from jaxsi.training.optim import OptimConfig
from jaxsi.training.packing import supervised
from jaxsi.training.reference import digest, pair_logps, reference_logps

MAX_SKIPPED = 5  # training gives up after this many updates in a row without a finite gradient


class TrainingError(RuntimeError):
    """Training cannot go on: there is no data, or gradients are not finite."""


@stored_as("train.TrainConfig")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. ``batch_size`` counts the examples (pairs for DPO, groups for rewards) of an optimizer step, on any
    platform and any number of devices.

    ``max_length``: the longest sequence in tokens; longer ones are dropped and counted. ``min_length``: the shortest
    padded length, so that short data compile once. ``dtype``: of the computation. ``checkpoint_every``: optimizer steps
    between resume points.
    """

    optim: OptimConfig = OptimConfig()
    batch_size: int = 16
    accumulate: int = 1
    epochs: int = 1
    max_steps: int | None = None
    max_length: int = 2048
    min_length: int = 64
    remat: Remat = "full"
    dtype: str = AUTO
    checkpoint_every: int = 200
    log_every: int = dataclasses.field(default=10, metadata=may_change())

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if type(value) is int}
        if wrong := [f"{name} is {value}" for name, value in numbers.items() if value < 1]:
            raise ValueError(f"{', '.join(wrong)}; the minimum is 1")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible into accumulate = {self.accumulate} parts; "
                "change one of them"
            )

    def check(self, mesh: Mesh, name: str = "") -> None:
        """Raises MeshError if the rows of a micro-batch do not divide evenly among the devices."""
        meshlib.check_rows(self.batch_size, self.accumulate, mesh, name)


@stored_as("train.DPOConfig")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Preference training: ``loss`` is a pair loss of losses.py. ``nll_coef`` weights an added likelihood
    term of the chosen response (0 is the paper's DPO).

    Two settings concern methods with several rounds. ``reference``: M_{t-1} ("previous"), or the model before the first
    round ("first"). ``optimizer``: a round starts with new moments ("reset"), or takes over those of the previous round
    ("carry").
    """

    train: TrainConfig = TrainConfig(optim=OptimConfig(learning_rate=1e-6))
    loss: Callable[..., losses.Loss] = losses.dpo
    beta: float = 0.1
    nll_coef: float = 0.0
    reference: Literal["previous", "first"] = "previous"
    optimizer: Literal["reset", "carry"] = "reset"

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf or not 0 <= self.nll_coef < math.inf:
            raise ValueError(f"beta is {self.beta} (> 0) and nll_coef {self.nll_coef} (>= 0)")
        for name, values in (("reference", ("previous", "first")), ("optimizer", ("reset", "carry"))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(values)}")
        if isinstance(self.loss, type):
            raise ValueError(f"loss is the class {self.loss.__name__}; give {self.loss.__name__}(), with its settings")

    def check_single_round(self) -> None:
        """Raises: ValueError if a setting needs several rounds of DPO; for callers that have one."""
        if (self.reference, self.optimizer) != ("previous", "reset"):
            raise ValueError(
                "dpo.reference and dpo.optimizer are for methods with several rounds of DPO; here is one, so leave "
                "them out"
            )


class State(NamedTuple):
    """What a step changes. ``skipped``: updates in a row, up to now, skipped for non-finite gradients."""

    weights: Weights
    moments: Any
    step: jax.Array
    skipped: jax.Array


# ----------------------------------------------------------------------------------------------------------- train step

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)


@dataclasses.dataclass(frozen=True)
class SFTLoss:
    """Token negative log-likelihood of a ``TokenBatch``. Instances with equal fields share one compiled program."""

    config: ModelConfig
    mesh: Mesh
    dtype: str
    remat: Remat

    def __call__(self, weights: Weights, batch: TokenBatch) -> tuple[losses.Loss, Metrics]:
        hidden_BTD = decoder.hidden_states(
            weights, self.config, batch.tokens_BT, batch.positions_BT, batch.segments_BT,
            lengths_B=batch.lengths_B, dtype=jnp.dtype(self.dtype), remat=self.remat, mesh=self.mesh,
        )  # fmt: skip
        logps_BR = decoder.predicted_logps(
            weights, self.config, hidden_BTD, batch.places_BR, batch.targets_BR, mesh=self.mesh
        )
        return losses.sft(logps_BR, batch.targets_BR >= 0), {}


@dataclasses.dataclass(frozen=True)
class PairLoss:
    """A pair loss of a ``PairBatch``, plus the likelihood term. Equal fields share one compiled program."""

    config: ModelConfig
    mesh: Mesh
    dtype: str
    remat: Remat
    loss: Callable[..., losses.Loss]
    beta: float
    nll_coef: float

    def __call__(self, weights: Weights, batch: PairBatch) -> tuple[losses.Loss, Metrics]:
        logps_B2 = pair_logps(weights, batch, config=self.config, mesh=self.mesh, dtype=self.dtype, remat=self.remat)
        tokens_B2 = jnp.sum(batch.targets_B2R >= 0, axis=-1)
        p = PairLogps(
            logps_B2[:, 0], logps_B2[:, 1], batch.ref_logps_B2[:, 0], batch.ref_logps_B2[:, 1],
            tokens_B2[:, 0], tokens_B2[:, 1], batch.real_B, batch.agreement_B,
        )  # fmt: skip
        preference, count = self.loss(p, beta=self.beta)
        likelihood, _ = losses.nll(p)
        total = preference + self.nll_coef * likelihood if self.nll_coef else preference

        def mean(x_B: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.sum(jnp.where(p.real_B, x_B, 0.0)), count

        margin_B = losses.margin(p)
        metrics = {
            "preference_loss": (preference, count),
            "nll": (likelihood, count),
            "accuracy": mean((margin_B > 0) + 0.5 * (margin_B == 0)),
            "margin": mean(margin_B),
            # These show likelihood displacement: DPO can raise the margin while both responses sink.
            "chosen_logps": mean(p.chosen_B),
            "rejected_logps": mean(p.rejected_B),
            "chosen_shift": mean(p.chosen_B - p.ref_chosen_B),
        }
        return (total, count), metrics


@functools.partial(jax.jit, static_argnames=("loss", "optimizer", "accumulate"), donate_argnames=("state",))
def train_step(
    state: State, batch: Any, learning_rate: jax.Array, *, loss: Any, optimizer: OptimConfig, accumulate: int
) -> tuple[State, dict[str, jax.Array]]:
    """One optimizer step on a global batch, in ``accumulate`` parts, normalised by the whole batch's count."""

    def summed(weights: Weights, part: Any) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        (total, count), metrics = loss(weights, part)
        return total, (count, metrics)

    def one_part(part: Any) -> tuple[Weights, Any]:
        (total, (count, metrics)), gradients = jax.value_and_grad(summed, has_aux=True)(state.weights, part)
        return gradients, ((total, count), metrics)

    if accumulate == 1:
        gradients, sums = one_part(batch)
    else:
        # Part a takes rows a, a + A, ..., so that every row stays on its device.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        first = jax.eval_shape(one_part, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one_part(part)), None

        (gradients, sums), _ = jax.lax.scan(add, zeros, parts)
    (total, count), metrics = sums
    count = jnp.maximum(count, 1.0)
    gradients = jax.tree.map(lambda g: g / count, gradients)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(total)
    held = _moved(state.moments, jax.memory.Space.Device) if optimizer.offload else state.moments
    updates, moments = optim.make_optimizer(optimizer).update(gradients, held, state.weights)
    weights = jax.tree.map(lambda w, u: w - learning_rate * u, state.weights, updates)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skipped = jnp.where(finite, 0, state.skipped + 1)
    moments = keep(moments, held)
    if optimizer.offload:
        moments = _moved(moments, jax.memory.Space.Host)
    state = State(keep(weights, state.weights), moments, state.step + 1, skipped)
    logged = {name: value / jnp.maximum(n, 1.0) for name, (value, n) in metrics.items()}
    return state, {"loss": total / count, "grad_norm": norm, "skipped": skipped.astype(jnp.float32), **logged}


def _moved(moments: Any, space: jax.memory.Space) -> Any:
    """Moves the moments to ``space``; the step count, a scalar, stays on the device."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, moments)


def initial_state(weights: Weights, optimizer: OptimConfig) -> State:
    """The state before the first step. The weights are copied: a step donates its state, and the caller still needs its
    model."""
    weights = jax.tree.map(jnp.copy, weights)
    # Zeros depend on no weight, so without explicit shardings XLA puts them all on one device.
    layout = state_layout(weights, optimizer)
    moments = jax.jit(optim.make_optimizer(optimizer).init, out_shardings=layout.moments)(weights)
    return State(weights, moments, *(jax.device_put(jnp.int32(0), place) for place in (layout.step, layout.skipped)))


def state_layout(weights: Weights, optimizer: OptimConfig) -> Any:
    """The sharding of every array in a state for ``weights`` (arrays, or shapes with shardings)."""
    replicated = meshlib.sharding(jax.tree.leaves(weights)[0].sharding.mesh, ())
    init = optim.make_optimizer(optimizer).init
    moments = optax.tree_utils.tree_map_params(
        init,
        lambda _, w: w.sharding.with_memory_kind("pinned_host") if optimizer.offload else w.sharding,
        jax.eval_shape(init, weights),
        weights,
        transform_non_params=lambda _: replicated,
    )
    place: Any = replicated
    return State(jax.tree.map(lambda w: w.sharding, weights), moments, place, place)


def fit(
    lm: LM,
    batches: Batches,
    loss: Any,
    config: TrainConfig,
    scope: Scope,
    *,
    state: Scope | None = None,
    better: Callable[[LM, LM], bool] | None = None,
) -> LM:
    """Trains, resuming from the last checkpoint if there is one, and saves the result as the scope's checkpoint.

    Args:
      state: an earlier training of the same model, whose optimizer moments are carried over.
      better: early stopping. Every ``checkpoint_every`` steps and at the end, ``better(now, previous)`` compares the
        model with the previous checkpoint (the first time, with ``lm``). When it returns False, training ends with the
        previous weights.

    Raises:
      TrainingError: if there are no batches, or if MAX_SKIPPED gradients in a row are not finite.
    """
    total, rows_at_once = min(len(batches), config.max_steps or len(batches)), config.batch_size // config.accumulate
    if total == 0:
        raise TrainingError(f"{scope.path}: nothing to train on; check the counts of the earlier stages")
    check_master(lm)
    # All rates at once: reading one from the device at each step would wait for the previous step.
    rates = np.asarray(jax.vmap(optim.schedule(config.optim, total))(jnp.arange(total)), np.float32)
    lmlib.make_room()  # frees what the sampling stages used
    folder = scope.path / "resume"
    fresh = initial_state(lm.weights, config.optim)
    if state is not None:
        fresh = fresh._replace(moments=resume.moments_of(state, fresh.moments))
    current = resume.resumed(fresh, folder)
    done = int(current.step)
    # Early stopping compares with the model of its last comparison, and may return to it.
    previous, previous_step = lm, resume.compared(folder) if better is not None else 0
    if previous_step:
        current = resume.resumed(current, folder, previous_step)
        previous, current = _snapshot(lm, current), resume.resumed(current, folder)
    log = resume.Log(scope.path / "train.jsonl", done, total)
    with progress(f"{scope.name}/train", total) as advance, preemption.stops_itself():
        advance(done, False)
        for step in range(done, total):
            if better is not None and step % config.checkpoint_every == 0 and step > previous_step:
                now = _snapshot(lm, current)
                if not _compared(better, now, previous):
                    break
                previous, previous_step = now, step
                if step > done:  # else it is already saved: the run was stopped just before this comparison
                    resume.save_resume(folder, current, done=step, compared=step)
            batch = batches[step]
            parts = -(-len(batch[0]) // rows_at_once)  # packed batches have fewer rows than examples
            current, metrics = train_step(
                current, batch, rates[step], loss=loss, optimizer=config.optim, accumulate=parts
            )
            advance(1, True)
            steps, last = step + 1, step + 1 == total
            if steps % config.log_every == 0 or last:
                log.write(steps, float(rates[step]), metrics)
                check_skipped(current, steps, total, scope)
            stopping = preemption.requested() and not last
            due = better is None and not last and steps % config.checkpoint_every == 0
            if stopping or due:
                resume.save_resume(folder, current, done=steps, compared=previous_step)
            if stopping:
                raise preemption.Stopped(f"{scope.path}: training is saved up to step {steps} of {total}")
        else:
            if better is not None and _compared(better, now := _snapshot(lm, current), previous):
                previous, previous_step = now, total
    trained, steps = (lm.replace(current.weights), total) if better is None else (previous, previous_step)
    # After an early stop the moments belong to later steps than the weights, so they are not saved.
    resume.save_result(
        trained, current if steps == total else None, scope, {"step": steps, "stopped_early": steps < total}
    )
    return trained


def _compared(better: Callable[[LM, LM], bool], now: LM, previous: LM) -> bool:
    answer = better(now, previous)
    lmlib.make_room()  # frees what sampling for the comparison used
    return answer


def check_master(lm: LM) -> None:
    dtypes = {str(w.dtype) for w in jax.tree.leaves(lm.weights)}
    if dtypes != {"float32"}:
        raise TrainingError(
            f"the weights to train are {', '.join(sorted(dtypes))}, a dtype in which small updates are lost; "
            'load the model with weights_dtype="float32" (TrainConfig.dtype only sets the dtype of the computation)'
        )


def check_skipped(state: State, steps: int, total: int, scope: Scope) -> None:
    if (skipped := int(state.skipped)) >= min(MAX_SKIPPED, total):
        raise TrainingError(
            f"{scope.path}: {skipped} updates in a row had non-finite gradients (at most {MAX_SKIPPED - 1}) "
            f"at step {steps}; lower the learning rate, or check the data of these steps. The last checkpoint is kept"
        )


def _snapshot(lm: LM, state: State) -> LM:
    """A copy of the state's model, since the next step donates the state."""
    return lm.replace(jax.tree.map(jnp.copy, state.weights))


# ---------------------------------------------------------------------------------------------------------- sft and dpo


def sft(lm: LM, examples: Sequence[SFTExample], config: TrainConfig, scope: Scope) -> LM:
    """Supervised fine-tuning on the examples' responses; the result is also the scope's checkpoint.

    A step is on ``config.batch_size`` examples, however they are laid out (``packing.supervised``).
    """
    if (trained := resume.finished(lm, scope)) is not None:
        return trained
    config.check(lm.mesh)
    config = settled_in(scope, config)
    with scope.timed("sft"):
        sequences = _fitting(scope, encode_examples(lm.tokenizer, examples), config.max_length)
        batches = supervised(
            sequences, config.max_length, config.batch_size, lm.mesh, epochs=config.epochs, seed=seed_of(scope, "sft"),
            accumulate=config.accumulate,
        )  # fmt: skip
        return fit(lm, batches, SFTLoss(lm.config, lm.mesh, config.dtype, config.remat), config, scope)


def dpo(
    lm: LM,
    pairs: Sequence[PreferencePair],
    config: DPOConfig,
    scope: Scope,
    *,
    reference: LM | None = None,
    state: Scope | None = None,
    better: Callable[[LM, LM], bool] | None = None,
) -> LM:
    """Preference training from ``lm``; the result is also the scope's checkpoint.

    Args:
      reference: the model that the loss compares with; ``lm`` by default.
      state, better: as in ``fit``.
    """
    if (trained := resume.finished(lm, scope)) is not None:
        return trained
    train = settled_in(scope, config.train)
    train.check(lm.mesh)
    all_pairs = [(*encode_pair(lm.tokenizer, pair), pair.agreement) for pair in pairs]
    fitting = [pair for pair in all_pairs if max(len(pair[0].tokens), len(pair[1].tokens)) <= train.max_length]
    encoded, agreement = [(chosen, rejected) for chosen, rejected, _ in fitting], [agreed for *_, agreed in fitting]
    uncertain = any(agreed != 1 for agreed in agreement)
    if uncertain and config.loss is not losses.dpo_agreed:
        raise TrainingError(
            f"{scope.path}: pairs have an agreement below 1, which only losses.dpo_agreed reads; name it"
        )
    scope.value("dpo_data", lambda: {"pairs": len(encoded), "dropped_too_long": len(all_pairs) - len(encoded)})
    if not encoded:
        too_long = f"all {len(all_pairs)} are longer than max_length = {train.max_length} tokens; raise it"
        reason = too_long if all_pairs else "none came out of the stages before; check their counts"
        raise TrainingError(f"{scope.path}: no pair to train on: {reason}")
    # The name identifies the weights and the pairs, so that values of other ones are never reused.
    reference = lm if reference is None else reference
    name = f"ref_logps_{reference.fingerprint}_{digest(encoded, train)}"
    refs = scope.value(name, reference_logps, reference, encoded, train)
    with scope.timed("dpo"):
        seed = seed_of(scope, "dpo")
        batches = pair_batches(
            lm, encoded, refs, train.batch_size, epochs=train.epochs, seed=seed, min_length=train.min_length,
            agreement=agreement if uncertain else None,
        )  # fmt: skip
        loss = PairLoss(lm.config, lm.mesh, train.dtype, train.remat, config.loss, config.beta, config.nll_coef)
        return fit(lm, batches, loss, train, scope, state=state, better=better)


def seed_of(scope: Scope, name: str) -> int:
    """A 31-bit seed for Grain, derived from the scope's key of that name."""
    return int(jax.random.bits(scope.key(name))) % 2**31


def _fitting(scope: Scope, sequences: Sequence[Sequence_], max_length: int) -> list[Sequence_]:
    fitting = [s for s in sequences if len(s.tokens) <= max_length]
    scope.value("sft_data", lambda: {"sequences": len(fitting), "dropped_too_long": len(sequences) - len(fitting)})
    if not fitting:
        reason = f"all {len(sequences)} examples are longer than max_length = {max_length}; raise it"
        raise TrainingError(f"{scope.path}: {reason}")
    return fitting
