"""PIT's parts: the split, the two kinds of demonstrations, the references of a round and the reward over its zero."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import tiny
from jaxsi.methods import pit
from jaxsi.methods.pit import split_in_three
from jaxsi.runs.config_file import load_config
from jaxsi.runs.records import Prompt, Response
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.gap import GapReward, change_from, gaps
from jaxsi.stages.pairs import Preference
from jaxsi.text.chat import render_prompt, render_response
from jaxsi.training import rl
from jaxsi.training.optim import OptimConfig
from jaxsi.training.reward import RewardError, with_scalar_head
from jaxsi.training.rl import RLConfig, RLError
from jaxsi.training.train import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "pit"
X = ({"role": "user", "content": "Reverse: cat red axe"},)
PAIRS = [Preference(f"p{i}", X, f"axe {i}.", f"cat {i}") for i in range(20)]
TRAIN = TrainConfig(optim=OptimConfig(learning_rate=1e-3), batch_size=8)
RL = RLConfig(
    optim=OptimConfig(learning_rate=1e-3), steps=1, prompts_per_step=2, group_size=2, batch_size=4, max_new_tokens=8,
    remat="none", dtype="float32",
)  # fmt: skip


def config(**changes) -> pit.Config:
    values = {"model": "m", "preferences": list, "request": "{prompt} again:", "sft": TRAIN, "reward": TRAIN}
    return pit.Config(**values | {"policy_rl": RL, "rl": RL, "rounds": (3, 3)} | changes)


def gap_reward(lm, references, rewarding=gaps) -> GapReward:
    return GapReward(lm, references, "{prompt} again:", rewarding, RL)


def said(prompt_id: str, text: str) -> Response:
    return dataclasses.replace(tiny.response(Prompt.of(prompt_id, "x"), 0, [5]), text=text)


# --------------------------------------------------------------------------------------------------------------- data


@settings(deadline=None)
@given(n=st.integers(3, 20), seed=st.integers(0, 2**32))
def test_split_covers_everything_once(n, seed):
    parts = split_in_three(PAIRS[:n], seed)
    assert [len(part) for part in parts] == [n // 3, n // 3, n - 2 * (n // 3)]
    assert sorted(pair.id for part in parts for pair in part) == sorted(pair.id for pair in PAIRS[:n])
    assert parts == split_in_three(PAIRS[:n], seed)


def test_split_is_random():
    firsts = [frozenset(pair.id for pair in split_in_three(PAIRS, seed)[0]) for seed in range(200)]
    share = sum("p0" in first for first in firsts) / 200
    assert share == pytest.approx(6 / 20, abs=0.12) and len(set(firsts)) > 190
    with pytest.raises(ValueError, match="2 preferences are left; PIT splits them in three"):
        split_in_three(PAIRS[:2], 0)


def test_policy_learns_the_better_response_and_improver_to_improve_the_worse():
    [plain], [mending] = pit.demonstrations(PAIRS[:1]), pit.improvements(PAIRS[:1], "Once more, {prompt}!")
    assert (plain.id, plain.messages, plain.response) == ("p0", X, "axe 0.")
    assert (mending.id, mending.response) == ("p0", "axe 0.")
    assert mending.messages == (
        *X,
        {"role": "assistant", "content": "cat 0"},
        {"role": "user", "content": "Once more, Reverse: cat red axe!"},
    )


def test_all_references_of_round_1_are_the_policys_unless_mix_says_otherwise(monkeypatch):
    monkeypatch.setattr(pit, "seed_of", lambda it, name: 5)
    given = [(Prompt.of(f"p{i}", "x"), f"y{i}") for i in range(100)]
    assert config().mix == 0 and pit.mixed_in(config(), given, None) == []
    real = [path for path in CONFIGS.glob("*.py") if not path.stem.startswith("toy")]
    assert len(real) >= 5 and {load_config(path).mix for path in real} == {0}


@pytest.mark.parametrize(("mix", "preferences", "count"), [(0.0, 50, 0), (0.2, 48, 12), (0.5, 50, 50), (0.75, 8, 16)])
def test_mix_is_the_share_of_references_of_round_0(mix, preferences, count, monkeypatch):
    """Two references a preference are given, one is sampled: count / (count + preferences) = mix, while they last."""
    monkeypatch.setattr(pit, "seed_of", lambda it, name: 5)
    given = [(Prompt.of(f"p{i}", "x"), f"r{i}") for i in range(2 * preferences)]
    mixed = pit.mixed_in(SimpleNamespace(mix=mix), given, None)
    assert len(mixed) == len({text for _, text in mixed}) == count
    assert all(item in given for item in mixed) and mixed == pit.mixed_in(SimpleNamespace(mix=mix), given, None)
    assert count == len(given) or count / (count + preferences) == pytest.approx(mix)


# -------------------------------------------------------------------------------------------------------------- reward


def test_reward_is_the_gap_above_that_of_the_unchanged_reference():
    def rewarding(lm, items, request, *, batch_size):
        seen.append((lm, items, request, batch_size))
        return np.asarray([3.0, 1.0, 5.0]), np.asarray([1.0, 2.0, 0.0])

    seen, lm = [], tiny.make_lm()
    prompts = [Prompt(id=f"p{i}", messages=X) for i in range(2)]
    reward = gap_reward(lm, [(prompts[0], "cat."), (prompts[1], " "), (prompts[1], "axe.")], rewarding)
    assert [p.id for p in reward.prompts] == ["p0~0", "p1~2"] and reward.left_out == 1
    asked = {"role": "user", "content": "Reverse: cat red axe again:"}
    assert reward.prompts[1].messages == (*X, {"role": "assistant", "content": "axe."}, asked)
    responses = [said("p1~2", "a."), said("p0~0", "b."), said("p1~2", "axe.")]
    values = reward(reward.prompts, responses)
    np.testing.assert_array_equal(values, [2.0, -1.0, 5.0])
    expected = [(X, responses[0], "axe."), (X, responses[1], "cat."), (X, responses[2], "axe.")]
    assert seen == [(lm, expected, "{prompt} again:", 4)]
    measured = reward.monitor(reward.prompts, responses, values)
    assert measured["gained"] == pytest.approx(2 / 3) and measured["gap_of_references"] == 1.0
    assert measured["copied"] == pytest.approx(1 / 3)


def test_too_long_reference_is_left_out_and_counted():
    lm, prompt = tiny.make_lm(), Prompt(id="p", messages=X)

    def conversation(reference: str) -> int:
        asked = {"role": "user", "content": "Reverse: cat red axe again:"}
        return len(render_prompt(lm.tokenizer, (*X, {"role": "assistant", "content": reference}, asked)))

    words = range(1, 260)
    longest = max(n for n in words if conversation("cat " * n) + 8 <= 256)  # room for a response
    both = max(
        n for n in words if conversation("cat " * n) + len(render_response(lm.tokenizer, "cat " * n)) <= 256
    )  # room for the reference once more, as its own response
    assert both < longest
    references = [(prompt, "cat " * n) for n in (1, both, both + 1, longest, longest + 1, 259)]
    reward = gap_reward(with_scalar_head(lm), references)
    assert [p.id for p in reward.prompts] == ["p~0", "p~1"] and reward.left_out == 4
    rollouts = rl.roll_out(lm, lm, reward.prompts, reward, RL, jax.random.key(0))
    assert np.isfinite(rollouts.rewards_B).all()


def test_reward_model_with_non_finite_gaps_is_named():
    lm = tiny.make_lm()
    head = with_scalar_head(lm)
    broken = head.replace(head.weights | {"score": head.weights["score"] * np.nan})
    reward = gap_reward(broken, [(Prompt(id="p", messages=X), "cat.")])
    with pytest.raises(RewardError, match=r"the reward of text 0 is nan .*train the reward model again"):
        reward(reward.prompts, [said("p~0", "axe.")])
    nothing = lambda lm, items, request, *, batch_size: (np.full(len(items), np.nan), np.zeros(len(items)))  # noqa: E731
    reward = gap_reward(head, [(Prompt(id="p", messages=X), "cat.")] * 2, nothing)
    with pytest.raises(RLError, match=r"4 of the rewards of 4 responses are not numbers .*'p~0'"):
        rl.roll_out(lm, lm, reward.prompts, reward, RL, jax.random.key(0))


def test_change_by_hand():
    references = ["cat red axe.", "cat red.", " axe. "]
    responses = [said("p", "cat axe."), said("p", "Sure thing: cat red."), said("p", "axe.")]
    got = change_from(references, responses)
    assert got == pytest.approx({"copied": 1 / 3, "edit_distance": (1 + 2 + 0) / 3, "length_gap": (-4 + 12 + 0) / 3})


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": (0, 0)}, r"rounds is \(0, 0\)"),
        ({"rounds": (-1, 2)}, r"rounds is \(-1, 2\)"),
        ({"mix": 1.0}, "mix is 1.0"),
        ({"mix": -0.1}, "mix is -0.1"),
        ({"sampling": SamplingConfig(num_samples=2)}, "num_samples 2"),
    ],
)
def test_configs_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
    assert config(rounds=(0, 1)).rounds == (0, 1) and config(mix=0.0).mix == 0
