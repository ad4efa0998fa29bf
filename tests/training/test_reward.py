"""Reward models: the scalar head, the last token, PIT's gap and its zero point."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.model import decoder
from jaxsi.model.decoder import ModelError, Remat
from jaxsi.runs.records import Prompt
from jaxsi.runs.run import Run
from jaxsi.sampling import generate
from jaxsi.stages import gap
from jaxsi.stages.pairs import Preference
from jaxsi.text.tokenizer import Tokenizer, load_tokenizer
from jaxsi.training import batches, reward
from jaxsi.training.optim import OptimConfig
from jaxsi.training.reward import BRADLEY_TERRY, GAP, RewardError
from jaxsi.training.train import TrainConfig, TrainingError

X = ({"role": "user", "content": "Reverse: cat red axe"},)
PREFERENCES = [
    Preference(f"p{i}", ({"role": "user", "content": f"Reverse: {a} red {b}"},), f"{b} red {a}.", f"{a} {a}")
    for i, (a, b) in enumerate([("cat", "axe"), ("dog", "pie"), ("cow", "jam"), ("pig", "saw"), ("fox", "egg")] * 2)
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0


def train_config(**changes) -> TrainConfig:
    config = TrainConfig(
        optim=OptimConfig(learning_rate=1e-2),
        batch_size=8,
        max_length=64,
        min_length=16,
        epochs=4,
        remat="none",
        dtype="float32",
        log_every=1,
    )
    return dataclasses.replace(config, **changes)


def groups(lm):
    return [gap.gap_group(lm.tokenizer, p, "{prompt}") for p in PREFERENCES]


def scored(mesh: str = "1x1x1"):
    """A reward model with a nonzero head."""
    lm = reward.with_scalar_head(tiny.make_lm(mesh))
    head = np.random.default_rng(0).normal(size=lm.config.embed_dim).astype(np.float32)
    placed = jax.device_put(head, lm.weights["score"].sharding)
    return lm.replace(lm.weights | {"score": placed})


def test_reward_is_the_head_on_the_last_hidden_state() -> None:

    lm = scored()
    sequences = [reward.reward_sequence(lm.tokenizer, p.messages, p.chosen) for p in PREFERENCES[:3]]
    for sequence, got in zip(sequences, reward.rewards(lm, sequences), strict=True):
        hidden = decoder.hidden_states(lm.weights, lm.config, sequence.tokens[None])[0, -1]
        np.testing.assert_allclose(got, hidden @ lm.weights["score"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2", "1x8x1"])
def test_rewards_do_not_depend_on_padding_or_batch_mates(mesh: str) -> None:
    lm = scored(mesh)
    rows = [s for group in groups(lm)[:5] for s in group]
    assert len({len(s.tokens) for s in rows}) > 1
    together = reward.rewards(lm, rows, batch_size=64)
    np.testing.assert_allclose(reward.rewards(lm, rows[::-1], batch_size=8)[::-1], together, atol=2e-5)
    np.testing.assert_allclose(reward.rewards(scored(), rows, batch_size=4), together, atol=2e-5)


def test_end_of_turn_inside_the_prompt_is_not_the_last_token() -> None:
    lm = scored()
    short = gap.gap_sequence(lm.tokenizer, X, "axe red cat.", "cat.", "{prompt}")
    changed = batches.Sequence_(short.tokens.copy(), short.loss_mask)
    changed.tokens[-2] += 1  # behind every end of turn but the last
    first, second = reward.rewards(lm, [short, changed])
    assert first != second


@pytest.mark.parametrize("mesh", ["1x1x1", "2x2x2", "1x8x1"])
@pytest.mark.parametrize(("remat", "accumulate"), [("none", 1), ("full", 2)])
def test_gap_loss_begins_at_five_ln_two(tmp_path: Path, mesh: str, remat: Remat, accumulate: int) -> None:
    if mesh == "1x8x1" and accumulate == 2:
        accumulate = 1
    lm = tiny.make_lm(mesh)
    config = train_config(max_steps=1, remat=remat, accumulate=accumulate)
    with Run.open(tmp_path, Config()) as run:
        reward.train_reward(lm, groups(lm), GAP, config, run.at("gap"))
        line = (tmp_path / "gap" / "train.jsonl").read_text()
    assert json.loads(line)["loss"] == pytest.approx(5 * np.log(2), abs=1e-6)
    assert json.loads(line)["wl>lw"] == 0.5


def test_planted_preference_is_learnt_and_saved(tmp_path: Path) -> None:
    lm = tiny.make_lm()
    with Run.open(tmp_path, Config()) as run:
        gap_rm = reward.train_reward(lm, groups(lm), GAP, train_config(epochs=8), run.at("gap"))
        again = reward.train_reward(lm, groups(lm), GAP, train_config(epochs=8), run.at("gap"))
        pair = [gap.reward_group(lm.tokenizer, p) for p in PREFERENCES]
        plain = reward.train_reward(lm, pair, BRADLEY_TERRY, train_config(epochs=8), run.at("policy"))
    assert again.fingerprint == gap_rm.fingerprint
    shares = reward.inequalities(gap_rm, groups(lm), GAP)
    assert set(shares) == {"wl>ww", "wl>ll", "wl>lw", "ww>lw", "ll>lw", "mean"} and min(shares.values()) > 0.7
    assert reward.inequalities(plain, pair, BRADLEY_TERRY)["mean"] == 1.0
    loaded = lmlib.load(tmp_path / "gap" / "checkpoint", tiny.mesh(), "float32")
    assert loaded.config.scalar_head
    rows = [s for group in groups(lm) for s in group]
    np.testing.assert_array_equal(reward.rewards(loaded, rows), reward.rewards(gap_rm, rows))


def test_unchanged_reference_has_zero_gain() -> None:
    lm = scored()
    items = [(p.messages, text, p.rejected) for p in PREFERENCES[:4] for text in (p.rejected, p.chosen)]
    gains = gap.gains(lm, items, "{prompt}")
    assert (gains[::2] == 0).all() and (gains[1::2] != 0).all()
    gap_N, zero_N = gap.gaps(lm, items, "{prompt}")
    np.testing.assert_allclose(gap_N - zero_N, gains)


def test_reward_model_survives_export_to_hugging_face(tmp_path: Path) -> None:
    lm = scored("2x2x2")
    lmlib.export(lm, tmp_path / "model", dtype="float32")
    loaded = lmlib.load(tmp_path / "model", tiny.mesh(), "float32")
    assert loaded.config == lm.config and loaded.fingerprint == lm.fingerprint


def other_tokenizer(folder: Path, **changes: str) -> Tokenizer:
    """The tiny tokenizer with other entries in its tokenizer_config.json, or another "template"."""
    shutil.copytree(tiny.tokenizer_folder(), folder)
    if (template := changes.pop("template", None)) is not None:
        (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    return load_tokenizer(folder)


def test_reward_model_reads_the_text_of_a_writer_with_another_tokenizer(tmp_path: Path) -> None:
    """Ids of another vocabulary would be other words."""
    lm = scored()
    template = (tiny.tokenizer_folder() / "chat_template.jinja").read_text()
    writer = other_tokenizer(tmp_path / "other", template="Chat:" + template)
    prompt = Prompt.of("p", "Reverse: cat red")
    response = dataclasses.replace(tiny.response(prompt, 0, [9, 8, 7, 2]), text="red cat.")
    as_text = reward.rewards(lm, [reward.reward_sequence(lm.tokenizer, prompt.messages, "red cat.")])
    as_ids = reward.rewards(lm, [reward.reward_sequence(lm.tokenizer, prompt.messages, response)])
    assert as_text != as_ids
    np.testing.assert_array_equal(reward.RewardOf(lm, writer, 8)([prompt], [response]), as_text)
    np.testing.assert_array_equal(reward.RewardOf(lm, lm.tokenizer, 8)([prompt], [response]), as_ids)
    long = dataclasses.replace(response, text="cat " * 300)
    values = reward.RewardOf(lm, writer, 8)([prompt], [long, response])
    assert np.isnan(values[0]) and values[1] == pytest.approx(as_text[0], abs=1e-6)
    assert np.isnan(reward.RewardOf(lm, writer, 8)([prompt], [long])).all()


def test_reward_model_keeps_its_head_when_its_training_goes_on() -> None:
    lm = scored()
    assert reward.with_scalar_head(lm) is lm


def test_exported_reward_model_pads_with_a_token_that_ends_no_text(tmp_path: Path) -> None:
    """`transformers` reads the last token that is not padding, so the end of a turn must not be padding."""
    lm = dataclasses.replace(scored(), tokenizer=other_tokenizer(tmp_path / "other", pad_token="<|end|>"))
    assert lm.tokenizer.pad_id in lm.tokenizer.stop_ids
    lmlib.export(lm, tmp_path / "rm", dtype="float32")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    tokenizer_config = json.loads((tmp_path / "rm" / "tokenizer_config.json").read_text())
    assert (config["pad_token_id"], tokenizer_config["pad_token"]) == (0, "<pad>")
    again = lmlib.load(tmp_path / "rm", tiny.mesh(), "float32")
    row = [reward.reward_sequence(lm.tokenizer, X, "axe red cat.")]
    np.testing.assert_array_equal(reward.rewards(again, row), reward.rewards(lm, row))
    plain = dataclasses.replace(tiny.make_lm(), tokenizer=lm.tokenizer)
    lmlib.export(plain, tmp_path / "plain", dtype="float32")  # a language model keeps its pad token
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["pad_token_id"] == lm.tokenizer.pad_id


def test_bad_rewards_and_models_are_refused(tmp_path: Path) -> None:
    lm = scored()
    sequence = reward.reward_sequence(lm.tokenizer, X, "axe.")
    with pytest.raises(RewardError, match="has no scalar head"):
        reward.rewards(tiny.make_lm(), [sequence])
    with pytest.raises(ModelError, match="scalar head"):
        generate.generate(lm, ["Reverse: cat"], max_new_tokens=4)
    broken = lm.replace(lm.weights | {"score": lm.weights["score"] * np.nan})
    with pytest.raises(RewardError, match="the reward of text 0 is nan"):
        reward.rewards(broken, [sequence])
    long = batches.Sequence_(np.ones(999, np.int32), np.ones(999, bool))
    with pytest.raises(RewardError, match="999 tokens, the reward model 256 positions"):
        reward.rewards(lm, [long])
    with Run.open(tmp_path, Config()) as run, pytest.raises(TrainingError, match="none of 10 groups fits"):
        reward.train_reward(lm, groups(lm), GAP, train_config(max_length=8), run.at("gap"))
