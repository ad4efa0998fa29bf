"""The train step and the loop around it, on one device: masks, skipped updates, resume, early stopping, sft and dpo."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.lm import LM
from jaxsi.model.mesh import MeshError
from jaxsi.runs import checkpoint, preemption
from jaxsi.runs.records import PreferencePair, SFTExample
from jaxsi.runs.run import Run, Scope
from jaxsi.training import losses, resume, train
from jaxsi.training.batches import Batches, Sequence_, encode, encode_pair, pairs as pairs_in_batches
from jaxsi.training.optim import OptimConfig
from jaxsi.training.reference import reference_logps
from jaxsi.training.train import DPOConfig, PairLoss, TrainConfig, TrainingError

OPTIM = OptimConfig(learning_rate=1e-2, end_learning_rate=1e-3, eps=1e-3)
CONFIG = TrainConfig(
    optim=OPTIM,
    batch_size=4,
    epochs=2,
    max_length=64,
    min_length=64,
    remat="none",
    dtype="float32",
    checkpoint_every=2,
    log_every=1,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The smallest config that a run accepts."""

    seed: int = 0


@pytest.fixture
def scope(tmp_path: Path) -> Any:
    with Run.open(tmp_path / "run", Config()) as run:
        yield run.at("iter_1")


def encoded(count: int = 10, **options: Any) -> list[tuple[Sequence_, Sequence_]]:
    return [encode_pair(tiny.tokenizer(), pair) for pair in tiny.preference_pairs(count, **options)]


def pair_loss(lm: LM, **changes: Any) -> PairLoss:
    return dataclasses.replace(PairLoss(lm.config, lm.mesh, "float32", "none", losses.dpo, 0.1, 0.0), **changes)


def batches(lm: LM, refs: Any = None, count: int = 10, *, shared: bool = True) -> Batches:
    """Six batches: two epochs of ten pairs, four to a batch."""
    refs = [(-20.0, -30.0)] * count if refs is None else refs
    return pairs_in_batches(encoded(count), refs, 4, lm.mesh, epochs=2, seed=0, min_length=64, shared=shared)


def fit(lm: LM, scope: Scope, *, refs: Any = None, config: TrainConfig = CONFIG, better: Any = None) -> LM:
    return train.fit(lm, batches(lm, refs), pair_loss(lm), config, scope, better=better)


class Killed(BaseException):
    """Simulates a kill: nothing in the package catches it."""


def kill_after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int) -> None:
    """``module.name`` works for ``calls`` calls; the next call raises ``Killed``."""
    real, seen_calls = getattr(module, name), []

    def counted(*args: Any, **options: Any) -> Any:
        seen_calls.append(None)
        if len(seen_calls) > calls:
            raise Killed
        return real(*args, **options)

    monkeypatch.setattr(module, name, counted)


def log_of(scope: Scope) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (scope.path / "train.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------- one step


def test_dpo_starts_at_ln_2_with_the_metrics_of_numpy() -> None:
    lm = tiny.make_lm()
    pairs = encoded()
    refs = np.asarray(reference_logps(lm, pairs, CONFIG))
    assert refs.shape == (10, 2) and np.abs(refs).min() > 1, "no reference value is left at its start"
    pair_batches = pairs_in_batches(pairs, refs.tolist(), 4, lm.mesh, epochs=1, seed=0, min_length=64, shared=True)
    state = train.initial_state(lm.weights, OPTIM)
    _, metrics = train.train_step(
        state, pair_batches[2], 0.0, loss=pair_loss(lm), optimizer=OPTIM, accumulate=1
    )  # 2 of 4 are fill
    assert abs(float(metrics["loss"]) - math.log(2)) < 1e-6
    assert float(metrics["accuracy"]) == pytest.approx(0.5, abs=0.5) and abs(float(metrics["margin"])) < 1e-4
    rows = pair_batches.plan[2]
    assert len(rows) == 2
    np.testing.assert_allclose(metrics["chosen_logps"], refs[rows, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rejected_logps"], refs[rows, 1].mean(), rtol=1e-5)


def test_nll_term_and_other_pair_losses_go_through_the_same_step() -> None:
    lm = tiny.make_lm()
    batch = batches(lm)[0]
    logps = np.asarray(
        train.pair_logps(lm.weights, batch, config=lm.config, mesh=lm.mesh, dtype="float32", remat="none")
    )
    counts = (np.asarray(batch.targets_B2R) >= 0).sum(-1)
    z = 0.1 * ((logps[:, 0] + 20) - (logps[:, 1] + 30))
    dpo = np.log1p(np.exp(-z))
    for changes, expected in (
        ({"nll_coef": 0.5}, dpo.sum() + 0.5 * (-logps[:, 0] / counts[:, 0]).sum()),
        ({"loss": losses.hinge}, np.maximum(0, 1 - z).sum()),
    ):
        (total, count), _ = pair_loss(lm, **changes)(lm.weights, batch)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert float(count) == 4


def test_gradients_reach_exactly_the_response_targets() -> None:
    """The gradient of a log-probability is nonzero at response tokens, including the end of turn, and zero elsewhere.
    It is zero in the whole of a fill row."""
    lm = tiny.make_lm()
    batch = batches(lm)[2]
    real, targets = np.asarray(batch.real_B), np.asarray(batch.targets_B2R)
    assert not real.all() and (targets >= 0).any() and (targets < 0).any()
    token_logps = train.decoder.token_logps

    def loss(bias: jax.Array) -> jax.Array:
        # A bias on the log-probability of each target stands in for its logit.
        def biased(*args: Any, **options: Any) -> jax.Array:
            return token_logps(*args, **options) + bias

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.decoder, "token_logps", biased)
            return pair_loss(lm)(lm.weights, batch)[0][0]

    B, _, R = targets.shape
    gradient = np.asarray(jax.grad(loss)(jnp.zeros((B, 2 * R)))).reshape(B, 2, R)
    np.testing.assert_array_equal(gradient != 0, targets >= 0)
    assert (gradient[:, 0][targets[:, 0] >= 0] < 0).all() and (gradient[:, 1][targets[:, 1] >= 0] > 0).all()
    assert (gradient[targets == tiny.tokenizer().eos_id] != 0).any(), "the end of turn is trained"
    assert not gradient[~real].any()


@pytest.mark.slow
def test_pair_in_one_row_equals_pair_in_two_rows() -> None:
    """Losses, metrics and gradients agree, also with windowed attention and with prompts of one token."""
    pairs = [encode_pair(tiny.tokenizer(), pair) for pair in tiny.preference_pairs(7, longest=40)]
    chosen, rejected = pairs[0]

    def one(s: Sequence_) -> Sequence_:
        return encode(s.tokens[:1], s.tokens[int(s.counted[0]) :])

    pairs[0] = one(chosen), one(rejected)
    refs = [(-20.0, -30.0)] * len(pairs)
    for windows in (None, (3, 3), (5, None)):
        lm = tiny.make_lm()
        lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, windows=windows))
        layouts = {
            shared: pairs_in_batches(pairs, refs, 8, lm.mesh, epochs=1, seed=0, min_length=16, shared=shared)[0]
            for shared in (False, True)
        }
        assert layouts[True].tokens_BST.shape[1] == 1 and layouts[False].tokens_BST.shape[1] == 2

        def total(loss: Any, weights: Any, batch: Any) -> jax.Array:
            return loss(weights, batch)[0][0]

        value_and_gradients = jax.jit(jax.value_and_grad(functools.partial(total, pair_loss(lm))))
        results = {shared: value_and_gradients(lm.weights, batch) for shared, batch in layouts.items()}
        np.testing.assert_allclose(results[True][0], results[False][0], rtol=1e-5)
        moved = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(results[False][1]))
        assert tiny.max_difference(results[True][1], results[False][1]) < 1e-4 * moved


def test_non_finite_gradient_changes_nothing() -> None:
    lm = tiny.make_lm()
    state = train.initial_state(lm.weights, OPTIM)

    def step(state: Any, refs: Any) -> Any:
        batch = batches(lm, refs)[0]
        return train.train_step(state, batch, 1e-2, loss=pair_loss(lm), optimizer=OPTIM, accumulate=1)

    state, _ = step(state, None)
    before = jax.device_get(state)
    state, metrics = step(state, [(math.nan, 0.0)] * 10)
    assert math.isnan(float(metrics["loss"])) and (int(state.step), int(state.skipped)) == (2, 1)
    assert tiny.max_difference(state[:2], before[:2]) == 0
    state, _ = step(state, None)
    assert (int(state.step), int(state.skipped)) == (3, 0)
    assert tiny.max_difference(state.weights, before.weights) > 1e-3


# ----------------------------------------------------------------------------------------------------------- the loop


def test_fit_trains_a_copy_of_its_model(scope: Scope) -> None:
    lm = tiny.make_lm()
    trained = fit(lm, scope)
    assert not any(w.is_deleted() for w in jax.tree.leaves(lm.weights))
    assert tiny.max_difference(lm.weights, tiny.host_weights()) == 0, "bit for bit as before"
    assert tiny.max_difference(trained.weights, lm.weights) > 1e-2
    log = log_of(scope)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6] and {row["of"] for row in log} == {6}
    assert log[-1]["margin"] > log[0]["margin"] and log[-1]["loss"] < log[0]["loss"]
    assert log[0]["learning_rate"] == pytest.approx(1e-2) and 1e-3 < log[-1]["learning_rate"] < 2e-3
    stored = lmlib.load(scope.path / "checkpoint", lm.mesh, "float32")
    assert stored.fingerprint == trained.fingerprint != lm.fingerprint
    meta = checkpoint.read_meta(scope.path / "checkpoint" / "weights")
    assert meta == {"step": 6, "stopped_early": False, "fingerprint": trained.fingerprint}
    assert not (scope.path / "resume").exists()


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        (train, "train_step", 1),  # before the first resume point
        (train, "train_step", 4),  # just after one
        (train, "train_step", 5),
        (resume, "save_resume", 1),
        (lmlib, "save_checkpoint", 0),  # the optimizer is saved, the weights are not
    ],
)
def test_killed_fit_resumes_to_the_same_bits(
    module: Any, name: str, calls: int, tmp_path: Path, scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny.make_lm()
    with Run.open(tmp_path / "whole", Config()) as run:
        whole = run.at("iter_1")
        expected = fit(lm, whole)
        with monkeypatch.context() as patch:
            kill_after(patch, module, name, calls)
            with pytest.raises(Killed):
                fit(lm, scope)
        with (scope.path / "train.jsonl").open("a") as file:
            file.write('{"step": 5, "of"')  # torn by the kill
        again = fit(lm, scope)
        assert tiny.max_difference(again.weights, expected.weights) == 0
        assert (scope.path / "train.jsonl").read_bytes() == (whole.path / "train.jsonl").read_bytes()
        assert not (scope.path / "resume").exists()


def stop_at(monkeypatch: pytest.MonkeyPatch, poll: int) -> None:
    """Simulates a SIGTERM that arrives at that poll."""
    polls: list[None] = []
    monkeypatch.setattr(preemption, "requested", lambda: polls.append(None) or len(polls) >= poll)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_stopped_fit_saves_its_step_and_resumes_to_the_same_bits(
    step: int, tmp_path: Path, scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny.make_lm()
    with Run.open(tmp_path / "whole", Config()) as run:
        whole = run.at("iter_1")
        expected = fit(lm, whole)
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(preemption.Stopped, match=f"training is saved up to step {step} of 6"):
                fit(lm, scope)
        assert [path.name for path in (scope.path / "resume").iterdir()] == [f"{step:08d}"]
        again = fit(lm, scope)
        assert tiny.max_difference(again.weights, expected.weights) == 0
        assert (scope.path / "train.jsonl").read_bytes() == (whole.path / "train.jsonl").read_bytes()


def test_fit_stopped_at_its_last_step_is_complete(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 6)
    assert fit(tiny.make_lm(), scope).fingerprint
    assert checkpoint.is_complete(scope.path / "checkpoint" / "weights")


@pytest.mark.parametrize("stops", [(1,), (2,), (3,), (4,), (3, 2), (5,)], ids=str)
def test_stop_does_not_change_what_early_stopping_compares(
    stops: tuple[int, ...], tmp_path: Path, scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither between two comparisons nor when one is due; that one is then done by the resuming command."""
    lm = tiny.make_lm()
    seen: list[tuple[str, str]] = []

    def better(now: LM, previous: LM) -> bool:
        seen.append((now.fingerprint, previous.fingerprint))
        return len(seen) < 3

    with Run.open(tmp_path / "whole", Config()) as run:
        expected = fit(lm, run.at("iter_1"), better=better)
        log = (run.at("iter_1").path / "train.jsonl").read_bytes()
    compared, seen[:] = list(seen), []
    step = 0
    for polls in stops:
        step += polls
        with monkeypatch.context() as patch:
            stop_at(patch, polls)
            with pytest.raises(preemption.Stopped, match=f"training is saved up to step {step} of 6"):
                fit(lm, scope, better=better)
        assert len(seen) == (step - 1) // 2  # a comparison that is due does not delay the stop
    again = fit(lm, scope, better=better)
    assert seen == compared and len(seen) == 3
    assert tiny.max_difference(again.weights, expected.weights) == 0
    assert (scope.path / "train.jsonl").read_bytes() == log
    assert not (scope.path / "resume").exists()


@pytest.mark.slow
def test_offloaded_moments_train_and_resume_to_the_same_bits(
    tmp_path: Path, scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, config = tiny.make_lm("2x2x2"), dataclasses.replace(CONFIG, optim=dataclasses.replace(OPTIM, offload=True))
    state = train.initial_state(lm.weights, config.optim)

    def kinds(state: Any) -> set[str]:
        return {x.sharding.memory_kind for x in jax.tree.leaves(state.moments) if x.ndim}

    assert kinds(state) == {"pinned_host"}
    state, _ = train.train_step(
        state, batches(lm)[0], np.float32(1e-2), loss=pair_loss(lm), optimizer=config.optim, accumulate=1
    )
    assert kinds(state) == {"pinned_host"}
    assert {w.sharding.memory_kind for w in jax.tree.leaves(state.weights)} == {"device"}
    with Run.open(tmp_path / "on_device", Config()) as run:
        expected = fit(lm, run.at("iter_1"))
    with monkeypatch.context() as patch:
        kill_after(patch, train, "train_step", 3)
        with pytest.raises(Killed):
            fit(lm, scope, config=config)
    assert tiny.max_difference(fit(lm, scope, config=config).weights, expected.weights) == 0


def test_steady_loop_compiles_once_without_host_transfers(scope: Scope) -> None:
    lm = tiny.make_lm()
    names: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **details: (
            names.append(str(details.get("fun_name"))) if event.endswith("jaxpr_to_mlir_module_duration") else None
        )
    )
    loss = pair_loss(lm, beta=0.125)  # a program that no other test has compiled
    train.fit(lm, batches(lm), loss, dataclasses.replace(CONFIG, checkpoint_every=100), scope)
    assert sum("train_step" in name for name in names) == 1, names
    state = train.initial_state(lm.weights, OPTIM)
    lowered = train.train_step.lower(state, batches(lm)[0], 1e-2, loss=loss, optimizer=OPTIM, accumulate=1)
    text = lowered.compile().as_text()
    assert not re.findall(r"(?i)infeed|outfeed|callback|send-done|recv-done|SendToHost|RecvFromHost", text)


def test_non_finite_gradients_in_a_row_end_training(scope: Scope) -> None:
    with pytest.raises(TrainingError, match=r"5 updates in a row .* at step 5; lower the learning rate"):
        fit(tiny.make_lm(), scope, refs=[(math.nan, 0.0)] * 10)
    assert [row["loss"] for row in log_of(scope)] == [None] * 5
    assert not checkpoint.is_complete(scope.path / "checkpoint" / "weights")


@pytest.mark.parametrize("good", [0, 1, 2, 3])
def test_early_stopping_returns_the_previous_checkpoint(good: int, scope: Scope) -> None:
    """Checkpoints after steps 2, 4 and 6; the first one that is not better ends training with the one before it."""
    lm = tiny.make_lm()
    seen: list[tuple[str, str]] = []

    def better(now: LM, previous: LM) -> bool:
        seen.append((now.fingerprint, previous.fingerprint))
        return len(seen) <= good

    trained = fit(lm, scope, better=better)
    chain = [lm.fingerprint] + [now for now, _ in seen]
    assert [previous for _, previous in seen] == chain[:-1] and len(set(chain)) == len(chain)
    assert len(seen) == min(good + 1, 3) and trained.fingerprint == chain[good]
    meta = checkpoint.read_meta(scope.path / "checkpoint" / "weights")
    assert meta == {"step": 2 * good, "stopped_early": good < 3, "fingerprint": trained.fingerprint}
    assert tiny.max_difference(lm.weights, tiny.host_weights()) == 0


def test_early_stopping_resumes_with_the_right_previous_model(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.make_lm()
    seen: list[tuple[str, str]] = []

    def better(now: LM, previous: LM) -> bool:
        seen.append((now.fingerprint, previous.fingerprint))
        return len(seen) < 3

    with monkeypatch.context() as patch:
        kill_after(patch, train, "train_step", 5)
        with pytest.raises(Killed):
            fit(lm, scope, better=better)
    trained = fit(lm, scope, better=better)  # from step 4
    assert len(seen) == 3 and seen[2][1] == seen[1][0] and trained.fingerprint == seen[1][0]


def test_fit_refuses_empty_data_and_bfloat16_weights(scope: Scope) -> None:
    lm = tiny.make_lm()
    empty = pairs_in_batches([], [], 4, lm.mesh, epochs=1, seed=0, min_length=64, shared=False)
    with pytest.raises(TrainingError, match="nothing to train on"):
        train.fit(lm, empty, pair_loss(lm), CONFIG, scope)
    half = lm.replace(jax.tree.map(lambda w: w.astype(jnp.bfloat16), lm.weights))
    with pytest.raises(TrainingError, match=r'bfloat16.*load the model with weights_dtype="float32"'):
        fit(half, scope)


# -------------------------------------------------------------------------------------------------------- sft and dpo


def examples(count: int) -> list[SFTExample]:
    words = ["loop", "tree", "sun", "moon", "river"]
    return [
        SFTExample(
            id=str(i),
            messages=({"role": "user", "content": words[i % 5]},),
            response=" ".join([words[(i + 1) % 5]] * (1 + i % 7)),
        )
        for i in range(count)
    ]


def test_sft_learns_and_runs_only_once(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.make_lm()
    config = dataclasses.replace(CONFIG, batch_size=2, epochs=4, checkpoint_every=100)
    long = SFTExample(id="long", messages=({"role": "user", "content": "loop"},), response="tree " * 80)
    trained = train.sft(lm, [*examples(24), long], config, scope)
    assert json.loads((scope.path / "sft_data.json").read_text()) == {"sequences": 24, "dropped_too_long": 1}
    log = log_of(scope)
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    monkeypatch.setattr(train, "train_step", None)  # a finished stage trains nothing
    again = train.sft(lm, [], config, scope)
    assert again.fingerprint == trained.fingerprint and tiny.max_difference(again.weights, trained.weights) == 0
    with pytest.raises(TrainingError, match="all 1 examples are longer than max_length = 64; raise it"):
        train.sft(lm, [long], config, scope.run.at("iter_2"))


def dpo(lm: LM, scope: Scope, count: int = 10, **changes: Any) -> LM:
    config = DPOConfig(train=dataclasses.replace(CONFIG, **changes), beta=0.1)
    return train.dpo(lm, tiny.preference_pairs(count), config, scope)


def test_dpo_starts_at_its_reference_and_moves_the_margin(scope: Scope) -> None:
    lm = tiny.make_lm()
    trained = dpo(lm, scope)
    log = log_of(scope)
    assert abs(log[0]["loss"] - math.log(2)) < 1e-6 and abs(log[0]["chosen_shift"]) < 1e-4
    assert log[-1]["margin"] > 1 and log[-1]["accuracy"] > 0.9
    assert trained.fingerprint != lm.fingerprint and tiny.max_difference(lm.weights, tiny.host_weights()) == 0
    (stored,) = scope.path.glob("ref_logps_*.json")
    assert lm.fingerprint in stored.name and len(json.loads(stored.read_text())) == 10


def test_reference_values_of_other_weights_or_pairs_are_not_reused(
    scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of reference values belongs to one set of weights, one list of pairs, one dtype and one micro-batch."""
    lm = tiny.make_lm()
    other = lm.replace(lm.weights | {"final_norm": lm.weights["final_norm"].at[0].add(2.0**-20)})
    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", lambda lm, *args, **options: lm)
        for variant in (lambda: dpo(lm, scope), lambda: dpo(other, scope), lambda: dpo(lm, scope, 9)):
            before = len(list(scope.path.glob("ref_logps_*")))
            variant()
            assert len(list(scope.path.glob("ref_logps_*"))) == before + 1
            variant()
            assert len(list(scope.path.glob("ref_logps_*"))) == before + 1, "the same again: from its file"


def test_over_long_pairs_are_dropped_and_counted(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.make_lm()
    lengths = [max(len(c.tokens), len(r.tokens)) for c, r in encoded(10)]
    limit = sorted(lengths)[6]
    monkeypatch.setattr(train, "fit", lambda lm, *args, **options: lm)
    dpo(lm, scope, max_length=limit)
    fitting = sum(n <= limit for n in lengths)
    assert fitting < 10
    assert json.loads((scope.path / "dpo_data.json").read_text()) == {
        "pairs": fitting,
        "dropped_too_long": 10 - fitting,
    }
    with pytest.raises(TrainingError, match="no pair to train on: all 10 are longer than max_length = 2 tokens"):
        dpo(lm, scope.run.at("iter_2"), max_length=2)


def uncertain(agreement: float) -> list[PreferencePair]:
    certain = tiny.preference_pairs(4)
    return [certain[0], dataclasses.replace(certain[1], agreement=agreement), *certain[2:]]


def test_pairs_with_an_agreement_need_a_loss_that_reads_it(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, config = tiny.make_lm(), DPOConfig(train=CONFIG)
    monkeypatch.setattr(train, "fit", lambda lm, batches, *args, **options: batches)
    for loss in (losses.dpo, losses.dpo_smoothed(label_smoothing=0.1), losses.ipo):
        with pytest.raises(TrainingError, match=r"agreement below 1, which only losses\.dpo_agreed reads; name it"):
            train.dpo(lm, uncertain(0.7), dataclasses.replace(config, loss=loss), scope)
    assert train.dpo(lm, uncertain(1.0), config, scope)[0].agreement_B is None
    read: Any = train.dpo(lm, uncertain(0.7), dataclasses.replace(config, loss=losses.dpo_agreed), scope)
    assert sorted(np.asarray(read[0].agreement_B).tolist()) == pytest.approx([0.7, 1, 1, 1])


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "accumulate": 4}, "batch_size 6 is not divisible into accumulate = 4 parts"),
        ({"accumulate": 0}, "accumulate is 0; the minimum is 1"),
        ({"min_length": 0, "log_every": 0}, "min_length is 0, log_every is 0; the minimum is 1"),
        ({"max_steps": 0}, "max_steps is 0; the minimum is 1"),
    ],
)
def test_config_rejects_bad_settings(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    "stage", [train.sft, lambda lm, rows, config, scope: train.dpo(lm, rows, DPOConfig(train=config), scope)]
)
def test_rows_must_divide_among_devices(stage: Callable[..., Any], scope: Scope) -> None:
    lm = tiny.make_lm("1x8x1")
    for config in (
        dataclasses.replace(CONFIG, batch_size=12),
        dataclasses.replace(CONFIG, batch_size=16, accumulate=4),
    ):
        with pytest.raises(MeshError, match=r"rows at once, which do not divide over 8 devices"):
            stage(lm, [], config, scope)
    dataclasses.replace(CONFIG, batch_size=32, accumulate=4).check(lm.mesh)


def test_short_training_with_only_skipped_steps_is_an_error(scope: Scope) -> None:
    lm = tiny.make_lm()
    bad = lm.replace(jax.tree.map(lambda w: w * jnp.nan, lm.weights))
    with pytest.raises(TrainingError, match="had non-finite gradients"):
        train.sft(bad, examples(2), CONFIG, scope)
