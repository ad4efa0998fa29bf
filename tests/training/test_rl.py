"""On-policy RL: advantages against loops, truths of step 0, the sign of the learners, and resuming."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import tiny
from jaxsi.lm import LM
from jaxsi.model.decoder import Remat
from jaxsi.model.mesh import MeshError
from jaxsi.runs import preemption
from jaxsi.runs.records import Prompt
from jaxsi.runs.run import Run
from jaxsi.training import losses, resume, rl
from jaxsi.training.advantages import gae, leave_one_out, standardised
from jaxsi.training.grpo import grpo
from jaxsi.training.online_dpo import online_dpo, pairs_of
from jaxsi.training.optim import OptimConfig
from jaxsi.training.ppo import ppo
from jaxsi.training.rl import RLConfig, RLError, rloo

PROMPTS = [Prompt.of(f"q{i}", text) for i, text in enumerate(["cat red", "dog", "axe pie saw", "blue owl"] * 2)]
LEARNERS = [rloo, ppo, grpo, online_dpo]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0


def config(**changes) -> RLConfig:
    base = RLConfig(
        optim=OptimConfig(learning_rate=1e-2),
        steps=2,
        prompts_per_step=4,
        group_size=4,
        batch_size=16,
        cut_off_penalty=0.0,
        max_new_tokens=6,
        remat="none",
        dtype="float32",
        checkpoint_every=1,
    )
    return dataclasses.replace(base, **changes)


def shortness(prompts, responses) -> np.ndarray:
    """A planted reward: the share of even token ids."""
    return np.asarray([np.mean([token % 2 == 0 for token in r.token_ids]) for r in responses])


def learnt(tmp_path: Path, learner, lm: LM, reward=shortness, reference: LM | None = None, **changes):
    with Run.open(tmp_path, Config()) as run:
        out = learner(lm, reference or lm, PROMPTS, reward, config(**changes), run.at("rl"))
    lines = [json.loads(line) for line in (tmp_path / "rl" / "train.jsonl").read_text().splitlines()]
    return out, lines


# ----------------------------------------------------------------------------------------------------------- advantages


@given(st.integers(1, 5), st.integers(2, 5), st.integers(0, 99))
def test_leave_one_out_sums_to_zero(P: int, G: int, seed: int) -> None:
    returns = np.random.default_rng(seed).normal(size=(P, G))
    advantages = leave_one_out(returns)
    np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-9)
    for p in range(P):
        for g in range(G):
            assert advantages[p, g] == pytest.approx(returns[p, g] - np.delete(returns[p], g).mean())


def test_leave_one_out_ignores_missing_returns() -> None:
    advantages = leave_one_out(np.asarray([[1.0, np.nan, 3.0], [2.0, np.nan, np.nan]]))
    np.testing.assert_array_equal(advantages, [[-2.0, np.nan, 2.0], [0.0, np.nan, np.nan]])


def test_standardised_rewards_have_mean_0_and_deviation_1_in_a_group() -> None:
    rewards = np.asarray([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0], [np.nan, 1.0, 3.0], [5.0, np.nan, np.nan]])
    advantages = standardised(rewards)
    np.testing.assert_allclose(advantages[0], (rewards[0] - 3) / np.std(rewards[0]))
    np.testing.assert_array_equal(advantages[1:], [[0, 0, 0], [np.nan, -1, 1], [0, np.nan, np.nan]])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_matches_an_explicit_loop(seed: int, gamma: float, lam: float) -> None:
    rng = np.random.default_rng(seed)
    B, T = 3, 9
    rewards, values = rng.normal(size=(2, B, T)).astype(np.float32)
    starts, ends = rng.integers(1, 5, B), rng.integers(5, T + 1, B)
    mask = np.asarray([[s <= t < e for t in range(T)] for s, e in zip(starts, ends, strict=True)])
    got, returns = gae(jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(mask), gamma=gamma, lam=lam)
    for b in range(B):
        later = 0.0
        for t in range(ends[b] - 1, starts[b] - 1, -1):
            following = values[b, t + 1] if t + 1 < ends[b] else 0.0
            later = rewards[b, t] + gamma * following - values[b, t] + gamma * lam * later
            assert got[b, t] == pytest.approx(later, abs=1e-4)
            assert returns[b, t] == pytest.approx(later + values[b, t], abs=1e-4)
    assert not np.asarray(got)[~mask].any()


def test_clipped_losses_match_their_equations() -> None:
    rng = np.random.default_rng(0)
    logps, old, advantages, values, old_values, returns = rng.normal(size=(6, 2, 5)).astype(np.float32)
    mask = rng.random((2, 5)) < 0.7
    ratio = np.exp(logps - old)
    by_hand = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)[mask].sum()
    total, count = losses.ppo_clip(logps, old, advantages, mask, clip=0.2)
    assert total == pytest.approx(by_hand, rel=1e-5) and count == mask.sum()
    near = old_values + np.clip(values - old_values, -0.2, 0.2)
    by_hand = 0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2)[mask].sum()
    total, count = losses.value_clip(values, old_values, returns, mask, clip=0.2)
    assert total == pytest.approx(by_hand, rel=1e-5) and count == mask.sum()


def test_grpo_loss_matches_its_equation() -> None:
    """Each response counts the same, however long; the KL is part of the loss. A row without a token does not count."""
    rng = np.random.default_rng(0)
    logps, old, ref, advantages = rng.normal(size=(4, 3, 5)).astype(np.float32)
    mask = np.asarray([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    ratio, away = np.exp(logps - old), ref - logps
    kl = np.exp(away) - away - 1
    each = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages) + 0.04 * kl
    (total, count), (kl_total, _) = losses.grpo(logps, old, ref, advantages, mask, clip=0.2, kl_coef=0.04)
    assert total == pytest.approx(each[0, mask[0]].mean() + each[1, mask[1]].mean(), rel=1e-5) and count == 2
    assert kl_total == pytest.approx(kl[0, mask[0]].mean() + kl[1, mask[1]].mean(), rel=1e-5)


def test_pairs_are_the_best_and_the_worst_of_a_group() -> None:
    lm = tiny.make_lm()
    rewards = np.asarray(
        [[1.0, 5.0, 0.0, 5.0], [2.0, 2.0, 2.0, 2.0], [np.nan, 1.0, np.nan, np.nan], [3.0, 1.0, 2.0, 9.0]]
    )
    rollouts = rl.roll_out(lm, lm, PROMPTS[:4], lambda p, r: rewards.ravel(), config(), jax.random.key(0))
    encoded, refs, differ = pairs_of(rollouts, 4)
    assert differ.tolist() == [True, False, False, True]
    for prompt, sides in ((0, (1, 2)), (3, (3, 1))):
        for sequence, ref, side in zip(encoded[prompt], refs[prompt], sides, strict=True):
            row = 4 * prompt + side
            mask = rollouts.responses_BT[row]
            np.testing.assert_array_equal(sequence.tokens[sequence.loss_mask], rollouts.batch.tokens_BT[row, mask])
            assert ref == pytest.approx(rollouts.ref_logps_BT[row, mask].sum())


# ------------------------------------------------------------------------------------------------------------- training


def test_online_dpo_begins_at_ln_2_and_counts_ties(tmp_path: Path) -> None:
    rewards = np.tile([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], (2, 1))
    _, lines = learnt(tmp_path, online_dpo, tiny.make_lm("2x2x2"), lambda p, r: rewards.ravel(), steps=1)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5) and lines[0]["ties"] == 2


@pytest.mark.parametrize(("learner", "mesh"), [(rloo, "1x1x1"), (ppo, "2x2x2"), (rloo, "1x8x1"), (grpo, "1x8x1")])
def test_first_step_has_ratio_one_and_kl_zero(tmp_path: Path, learner, mesh: str) -> None:
    _, lines = learnt(tmp_path, learner, tiny.make_lm(mesh), steps=1)
    assert lines[0]["ratio"] == pytest.approx(1, abs=1e-5) and lines[0]["clipped"] == 0
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5) and lines[0]["kl_k3"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["sampler_gap"] < 1e-4


@pytest.mark.parametrize("learner", [rloo, ppo, grpo])
def test_planted_reward_rises_and_kl_penalty_holds_it_back(tmp_path: Path, learner) -> None:
    lm = tiny.make_lm()
    changes = {"steps": 10, "optim": OptimConfig(learning_rate=5e-2), "prompts_per_step": 8, "batch_size": 32}
    _, free = learnt(tmp_path / "free", learner, lm, kl_coef=0.0, **changes)
    _, held = learnt(tmp_path / "held", learner, lm, kl_coef=20.0, **changes)
    assert np.mean([line["reward"] for line in free[-3:]]) > free[0]["reward"] + 0.15
    assert held[-1]["kl"] < free[-1]["kl"] / 2


def test_planted_reward_rises_by_online_dpo(tmp_path: Path) -> None:
    changes = {"steps": 10, "optim": OptimConfig(learning_rate=5e-2), "prompts_per_step": 8, "batch_size": 32}
    _, lines = learnt(tmp_path, online_dpo, tiny.make_lm(), kl_coef=0.1, **changes)
    assert np.mean([line["reward"] for line in lines[-3:]]) > lines[0]["reward"] + 0.15
    assert lines[-1]["loss"] < np.log(2)


@pytest.mark.parametrize("learner", LEARNERS)
def test_killed_training_resumes_to_the_same_result(tmp_path: Path, learner, monkeypatch) -> None:
    lm = tiny.make_lm()
    whole, lines = learnt(tmp_path / "whole", learner, lm, steps=3)
    save, calls = resume.save_resume, []

    def kill(*args, **kwargs) -> None:
        save(*args, **kwargs)
        calls.append(kwargs["done"])
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume, "save_resume", kill)
    with pytest.raises(KeyboardInterrupt):
        learnt(tmp_path / "cut", learner, lm, steps=3)
    again, relogged = learnt(tmp_path / "cut", learner, lm, steps=3)
    assert calls == [1, 2]
    assert again.fingerprint == whole.fingerprint
    assert relogged == lines
    assert not (tmp_path / "cut" / "rl" / "resume").exists()


@pytest.mark.parametrize("learner", LEARNERS)
def test_stopped_training_saves_its_step_and_resumes(tmp_path: Path, learner, monkeypatch) -> None:
    lm = tiny.make_lm()
    whole, lines = learnt(tmp_path / "whole", learner, lm, steps=3, checkpoint_every=9)
    polls: list[None] = []
    with monkeypatch.context() as patch:
        # The first poll comes as the stage begins.
        patch.setattr(preemption, "requested", lambda: polls.append(None) or len(polls) == 3)
        with pytest.raises(preemption.Stopped, match="training is saved up to step 2 of 3"):
            learnt(tmp_path / "cut", learner, lm, steps=3, checkpoint_every=9)
    again, relogged = learnt(tmp_path / "cut", learner, lm, steps=3, checkpoint_every=9)
    assert again.fingerprint == whole.fingerprint
    assert relogged == lines


@pytest.mark.parametrize(
    ("mesh", "accumulate", "remat"), [("2x2x2", 1, "full"), ("1x8x1", 2, "none"), ("1x1x1", 4, "products")]
)
def test_step_does_not_depend_on_the_mesh(tmp_path: Path, mesh: str, accumulate: int, remat: Remat) -> None:
    one, _ = learnt(tmp_path / "one", rloo, tiny.make_lm(), steps=1)
    other, _ = learnt(tmp_path / "other", rloo, tiny.make_lm(mesh), steps=1, accumulate=accumulate, remat=remat)
    # Adam divides by the root of tiny second moments: where a gradient is nearly 0, its sign may be rounding.
    differences = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)), one.weights, other.weights)
    apart = np.concatenate([d.ravel() for d in jax.tree.leaves(differences)])
    assert np.quantile(apart, 0.99) < 1e-4


def test_epochs_and_minibatches_cover_every_row_once() -> None:
    rl_config = config(epochs=3, batch_size=8, steps=2)
    batches = rl.minibatches(16, rl_config, seed=0, step=1)
    assert len(batches) == 6 == rl_config.updates // rl_config.steps
    for epoch in range(3):
        assert sorted(np.concatenate(batches[2 * epoch : 2 * epoch + 2])) == list(range(16))


def test_every_epoch_uses_all_prompts_once() -> None:
    dealt = [[p.id for p in rl.prompts_of_step(PROMPTS, step, config(), seed=1)] for step in range(4)]
    assert sorted(dealt[0] + dealt[1]) == sorted(dealt[2] + dealt[3]) == [p.id for p in PROMPTS]
    assert dealt[:2] != dealt[2:]
    with pytest.raises(RLError, match="8 prompts are fewer than prompts_per_step = 9"):
        rl.prompts_of_step(PROMPTS, 0, config(prompts_per_step=9, batch_size=36), seed=1)


def test_monitors_do_not_see_padding(tmp_path: Path) -> None:
    lm = tiny.make_lm()
    seen = {}

    def watch(prompts, responses, rewards):
        seen.update(responses=responses, rewards=rewards)
        return {"mine": 7.0}

    rollouts = rl.roll_out(lm, tiny.make_lm(seed=1), PROMPTS[:4], shortness, config(), jax.random.key(0), watch)
    lengths = [len(r.token_ids) for r in seen["responses"]]
    assert rollouts.metrics["mine"] == 7.0
    assert rollouts.metrics["length"] == pytest.approx(np.mean(lengths))
    assert rollouts.metrics["reward"] == pytest.approx(np.mean(seen["rewards"]))
    assert rollouts.metrics["entropy"] == pytest.approx(
        -np.mean([x for r in seen["responses"] for x in r.logps]), abs=1e-4
    )
    assert rollouts.batch.loss_mask_BT.sum() == sum(lengths)
    assert rollouts.metrics["kl_k3"] > 0


def test_non_finite_rewards_are_left_out_until_too_many(tmp_path: Path) -> None:
    def some(prompts, responses):
        return np.where(np.arange(len(responses)) % 4 == 0, np.nan, shortness(prompts, responses))

    _, lines = learnt(tmp_path / "some", rloo, tiny.make_lm(), some, steps=1)
    assert lines[0]["no_reward"] == 4 and np.isfinite(lines[0]["loss"])
    with pytest.raises(RLError, match=r"16 of the rewards of 16 responses are not numbers .* 'q"):
        learnt(tmp_path / "all", rloo, tiny.make_lm(), lambda p, r: np.full(len(r), np.nan))


def test_cut_off_responses_pay_the_penalty(tmp_path: Path) -> None:
    lm = tiny.make_lm()
    plain, fined = (
        rl.roll_out(lm, lm, PROMPTS[:4], shortness, config(cut_off_penalty=penalty), jax.random.key(0))
        for penalty in (0.0, 2.0)
    )
    assert plain.metrics["cut_off"] > 0
    np.testing.assert_allclose((plain.rewards_B - fined.rewards_B).mean(), 2 * plain.metrics["cut_off"], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "each must divide the one before it"),
        ({"kl_coef": -1.0}, "kl_coef is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"clip": 1.0}, "clip 1.0"),
    ],
)
def test_config_rejects_settings_out_of_range(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_impossible_group_size_and_mesh_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group_size is 1"):
        learnt(tmp_path / "a", rloo, tiny.make_lm(), group_size=1, batch_size=4)
    with pytest.raises(ValueError, match="group_size is 1"):
        learnt(tmp_path / "c", grpo, tiny.make_lm(), group_size=1, batch_size=4)
    with pytest.raises(ValueError, match=r"kl_coef 0.0 \(positive: DPO's beta\)"):
        learnt(tmp_path / "d", online_dpo, tiny.make_lm(), kl_coef=0.0)
    with pytest.raises(MeshError, match="4 rows at once, which do not divide over 8 devices"):
        learnt(tmp_path / "b", rloo, tiny.make_lm("1x8x1"), batch_size=4)
