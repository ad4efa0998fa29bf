"""`jaxsi reward` and `jaxsi rl` on files, with a tiny model: what they train, how they go on, what they refuse."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import jaxsi
import tiny
from jaxsi import lm as lmlib
from jaxsi.cli import export, improve, rl, train
from jaxsi.cli.main import main
from jaxsi.runs.records import Improvement, read_jsonl
from jaxsi.stages.user_data import read_pairs
from jaxsi.training import resume
from jaxsi.training.reward import reward_sequence, rewards

WORDS = ("axe", "dog", "pie", "sun")
FUNCTIONS = """
def short(prompt, response):
    return None if response == "?" else -float(len(response))

def nothing(prompt, response):
    return None

def text(prompt, response):
    return "good"

limit = 3
"""
SHORT = ("--reward", "function:{}/rewards.py:short")
pytestmark = pytest.mark.xdist_group("single stages")  # they share a reward model


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch):
    """Eight devices give the same weights, but compile for longer."""
    for command in (export, improve, rl, train):
        monkeypatch.setattr(command, "mesh_for", lambda *_: tiny.mesh())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, pairs, prompts (one is longer than the context) and functions."""
    folder = tmp_path_factory.mktemp("single")
    lmlib.export(tiny.make_lm(), folder / "model", dtype="float32")
    pairs = [{"prompt": f"Reverse: cat {w}", "chosen": f"{w} cat.", "rejected": f"cat {w} cat {w}"} for w in WORDS]
    for name, rows in (
        ("pairs", pairs),
        ("held_out", [*pairs[:2], pairs[2] | {"chosen": "cat " * 300}]),
        ("prompts", [{"id": w, "prompt": f"Reverse: cat {w}"} for w in WORDS] + [{"id": "x", "prompt": "cat " * 300}]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(FUNCTIONS)
    return folder


def reward_words(folder, run_dir):
    words = ["reward", folder / "model", "--data", folder / "pairs.jsonl", "--held-out", folder / "held_out.jsonl"]
    words += ["--run-dir", run_dir, "--epochs", 6, "--batch-size", 4, "--max-length", 64, "--dtype", "float32"]
    return [*words, "--learning-rate", "1e-2", "--log-every", 1, "--checkpoint-every", 2]


def rl_words(folder, run_dir, *more):
    words = ["rl", folder / "model", "--prompts", folder / "prompts.jsonl", "--run-dir", run_dir, "--steps", 3]
    words += ["--prompts-per-step", 2, "--group-size", 2, "--max-new-tokens", 6, "--dtype", "float32"]
    return [*words, "--learning-rate", "1e-3", "--checkpoint-every", 1, *more]


def called(capsys, *argv):
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


def value_of(capsys, *argv):
    code, out, err = called(capsys, *argv, "--json")
    assert code == 0, err
    return json.loads(out)


def failure(capsys, *argv):
    code, out, err = called(capsys, *argv)
    assert (code, out) == (2, "") and "Traceback" not in err
    return next(line for line in err.splitlines() if line.startswith("jaxsi: error: "))


def stopped_and_resumed(capsys, monkeypatch, words):
    """The result of a command that was interrupted after its first resume point, and then given again."""
    save, done = resume.save_resume, []

    def interrupt(*args, **kwargs):
        save(*args, **kwargs)
        done.append(kwargs["done"])
        if len(done) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_resume", interrupt)
        assert called(capsys, *words)[0] == 130
        return done, value_of(capsys, *words)


def lines(run_dir: Path) -> str:
    return (run_dir / "iter_1" / "train.jsonl").read_text()


@pytest.fixture(scope="module")
def trained(folder):
    """The reward model of the module, trained from Python: (run directory, model)."""
    pairs = read_pairs(folder / "pairs.jsonl")
    optim = jaxsi.OptimConfig(learning_rate=1e-2)
    config = jaxsi.TrainConfig(
        optim=optim, epochs=6, batch_size=4, max_length=64, dtype="float32", log_every=1, checkpoint_every=2
    )
    lm = jaxsi.load(folder / "model", tiny.mesh(), "float32")
    return folder / "rm", jaxsi.reward(lm, pairs, folder / "rm", config)


def test_reward_model_is_trained_reported_and_resumes(folder, trained, tmp_path, capsys, monkeypatch):
    """The command gives the same weights as the function, also if it was interrupted."""
    done, value = stopped_and_resumed(capsys, monkeypatch, reward_words(folder, tmp_path / "rm"))
    assert done[:2] == [2, 4]
    assert value["fingerprint"] == trained[1].fingerprint
    assert lines(tmp_path / "rm") == lines(trained[0])
    assert (value["pairs"], value["too_long"], value["step"], value["accuracy"]) == (4, 0, 6, 1.0)
    assert (value["held_out_pairs"], value["held_out_too_long"], value["held_out_accuracy"]) == (2, 1, 1.0)
    again = value_of(capsys, *reward_words(folder, trained[0]))  # nothing is trained twice
    assert again["fingerprint"] == value["fingerprint"]
    more = reward_words(folder, tmp_path / "more")
    more[1] = trained[0]
    assert value_of(capsys, *more)["loss"] < 0.1  # it goes on from the head that it has
    assert json.loads(lines(tmp_path / "more").splitlines()[0])["loss"] < 0.5


def test_reward_model_loads_exports_and_ranks(folder, trained, tmp_path, capsys):
    loaded = jaxsi.load(trained[0], tiny.mesh(), "float32")
    assert loaded.config.scalar_head and loaded.fingerprint == trained[1].fingerprint
    value_of(capsys, "export", trained[0], tmp_path / "hf", "--dtype", "float32")
    exported = jaxsi.load(tmp_path / "hf", tiny.mesh(), "float32")
    messages = ({"role": "user", "content": "Reverse: cat axe"},)
    texts = [reward_sequence(loaded.tokenizer, messages, text) for text in ("axe cat.", "cat axe cat axe", "a")]
    np.testing.assert_array_equal(rewards(exported, texts), rewards(loaded, texts))
    assert rewards(loaded, texts)[0] > rewards(loaded, texts)[1]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] not in loaded.tokenizer.stop_ids
    assert "reward model" in (tmp_path / "hf" / "README.md").read_text()
    out = tmp_path / "best"
    words = ["improve", "best-of-n", folder / "model", "--reward-rm", trained[0], "--prompts", folder / "prompts.jsonl"]
    words += ["-o", out, "--num-samples", 3, "--max-new-tokens", 6, "--dtype", "float32", "--batch-size", 4]
    value_of(capsys, *words)
    assert len(read_jsonl(out / "round_1" / "responses.jsonl", Improvement)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["rloo", "ppo"])
def test_rl_by_a_reward_model_resumes(folder, trained, tmp_path, capsys, monkeypatch, learner):
    more = ("--reward", trained[0], "--learner", learner, "--batch-size", 2, "--accumulate", 2)
    whole = value_of(capsys, *rl_words(folder, tmp_path / "whole", *more))
    done, value = stopped_and_resumed(capsys, monkeypatch, rl_words(folder, tmp_path / "cut", *more))
    assert done == [1, 2]
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    same = ("fingerprint", "prompts", "too_long", "step", "reward", "first_reward", "kl")
    assert [value[name] for name in same] == [whole[name] for name in same]
    assert (value["prompts"], value["too_long"], value["step"]) == (4, 1, 3)
    policy = jaxsi.load(tmp_path / "cut", tiny.mesh(), "float32")
    assert policy.fingerprint == value["fingerprint"] != tiny.make_lm().fingerprint and not policy.config.scalar_head
    assert (tmp_path / "cut" / "iter_1" / "value").exists() == (learner == "ppo")


def test_rl_by_a_function_is_part_of_the_run(folder, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    words = rl_words(folder, tmp_path / "run", "--reward", f"function:{file}:short", "--steps", 1)
    value = value_of(capsys, *words)
    assert value["reward"] < 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["reward"].startswith("jaxsi_config_mine.short#") and stored["learner"] == "rl.rloo"
    assert value_of(capsys, *words)["fingerprint"] == value["fingerprint"]
    file.write_text(FUNCTIONS.replace("-float", "float"))
    code, _, err = called(capsys, *words)
    assert code == 2 and "reward: 'jaxsi_config_mine.short#" in err
    file.write_text(FUNCTIONS.replace("limit = 3", "limit = 4"))  # nothing that the function uses
    assert value_of(capsys, *words)["fingerprint"] == value["fingerprint"]


def test_rl_from_python_takes_texts_and_a_function(folder, tmp_path):
    config = jaxsi.RLConfig(
        optim=jaxsi.OptimConfig(learning_rate=1e-3), steps=1, prompts_per_step=2, group_size=2, batch_size=4,
        max_new_tokens=6, dtype="float32",
    )  # fmt: skip
    prompts = [f"Reverse: cat {word}" for word in WORDS]
    lm = jaxsi.load(folder / "model", tiny.mesh(), "float32")
    model = jaxsi.rl(lm, prompts, length, tmp_path / "run", config)
    assert jaxsi.load(tmp_path / "run", tiny.mesh(), "float32").fingerprint == model.fingerprint
    more = dataclasses.replace(config, prompts_per_step=3, batch_size=6)
    with pytest.raises(ValueError, match=r"2 of 2 prompts leave room.*fewer than prompts_per_step = 3"):
        jaxsi.rl(lm, prompts[:2], length, tmp_path / "few", more)
    assert not (tmp_path / "few").exists()


def length(prompt: str, response: str) -> float:
    return float(len(response))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--reward", "self"), "RewardsBy needs a judge of another kind"),
        (("--reward", "function:rewards.py"), "give function:FILE.py:NAME"),
        (("--reward", "function:absent.py:short"), "absent.py: no such file"),
        (("--reward", "function:{}/rewards.py:long"), "rewards.py has no function long()"),
        (("--reward", "function:{}/rewards.py:limit"), "limit is 3, which is not a function"),
        (("--reward", "model:rm", "--rubric", "absent.txt"), "'absent.txt' is neither a file nor shipped"),
        (("--reward", "{}/model"), "is a language model without a scalar head, so it gives no rewards"),
        (("--reward", "./nowhere"), "nowhere: no such folder"),
        ((*SHORT, "--group-size", 1), "--group-size 1: rloo compares"),
        ((*SHORT, "--learner", "online-dpo", "--kl-coef", 0), "kl_coef 0.0 (positive: DPO's beta)"),
        ((*SHORT, "--batch-size", 3), "= 4 rows, batch_size 3, accumulate 1: each must"),
        ((*SHORT, "--kl-coef", -1), "kl_coef is -1.0 (>= 0)"),
        ((*SHORT, "--steps", 0), "steps is 0; the minimum is 1"),
        (
            (*SHORT, "--prompts-per-step", 6),
            "has 5 prompts, fewer than --prompts-per-step",
        ),
        (
            (*SHORT, "--prompts-per-step", 5),
            "4 of 5 prompts leave room for max_new_tokens",
        ),
        (
            (*SHORT, "--max-new-tokens", 256),
            "0 of 5 prompts leave room for max_new_tokens",
        ),
    ],
)
def test_rl_refuses_what_cannot_work_before_any_work(folder, tmp_path, capsys, more, message):
    more = [str(word).format(folder) for word in more]
    assert message in failure(capsys, *rl_words(folder, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("nothing", "4 of the rewards of 4 responses are not numbers"), ("text", "text returned 'good' for the response")],
)
def test_rl_stops_at_a_function_without_rewards(folder, tmp_path, capsys, name, message):
    code, _, err = called(
        capsys, *rl_words(folder, tmp_path / "run", "--reward", f"function:{folder}/rewards.py:{name}")
    )
    assert code == 1 and message in err and "Traceback" not in err


def test_reward_model_writes_no_text(folder, trained, tmp_path, capsys):
    for words in (
        ["rl", trained[0], "--prompts", folder / "prompts.jsonl", "--reward", f"function:{folder}/rewards.py:short"],
        ["dpo", trained[0], "--data", folder / "pairs.jsonl"],
    ):
        few = ["--prompts-per-step", 2] if words[0] == "rl" else []
        message = failure(capsys, *words, *few, "--run-dir", tmp_path / "run", "--dtype", "float32")
        assert "is a reward model, which writes no text" in message
    assert not (tmp_path / "run").exists()


def test_batch_that_does_not_divide_among_the_devices_begins_no_run(folder, tmp_path, capsys, monkeypatch):
    for command in (rl, train):
        monkeypatch.setattr(command, "mesh_for", lambda *_: tiny.mesh("1x8x1"))
    assert "do not divide over 8 devices" in failure(capsys, *reward_words(folder, tmp_path / "run"))
    words = rl_words(folder, tmp_path / "run", "--reward", f"function:{folder}/rewards.py:short")
    assert "do not divide over 8 devices" in failure(capsys, *words)
    assert not (tmp_path / "run").exists()
