"""What the README and the docs show of Python, run as it stands there; and a method that is one file of the user."""

import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from micro_runs import artefacts, journal
from processes import ended, start, start_command

import jaxsi
import tiny
from jaxsi.methods.start import method_of
from jaxsi.runs.config_file import load_config
from jaxsi.runs.config_snapshot import RunConfigError
from jaxsi.runs.run import RunError
from jaxsi.stages.early_stop import WinRate
from jaxsi.stages.prompts.critique import load_critique_template

ROOT = Path(__file__).parents[1]
REVERSE = ["Reverse: cat red axe", "Reverse: dog red axe", "Reverse: cow red axe"]


def python_of(page: str) -> str:
    """The first block of Python on a page."""
    return re.search(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)[1]


def test_public_names_are_there() -> None:
    for name in jaxsi.__all__:
        assert getattr(jaxsi, name) is not None


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path) -> None:
    """The file as a user would save it, in a process of its own, and what the run keeps."""
    code = python_of("README.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    (tmp_path / "brief.py").write_text(code.replace("runs/brief", str(tmp_path / "brief")))
    [(code, out, err)] = ended([start([tmp_path / "brief.py"])])
    assert code == 0, err
    assert out.strip().splitlines()[-1]
    stored = json.loads((tmp_path / "brief" / "config.json").read_text())
    assert stored["judging"]["__type__"] == "judge_by"
    assert stored["judging"]["function"].startswith("__main__.brief#")
    for line in (tmp_path / "brief" / "iter_2" / "judgments.jsonl").read_text().splitlines():
        assert json.loads(line)["score"] <= 0
    assert json.loads((tmp_path / "brief" / "summary.json").read_text())["status"] == "complete"


def test_config_of_the_page_on_early_stopping_is_one(tmp_path, monkeypatch) -> None:
    file = tmp_path / "stopping.py"
    file.write_text(python_of("docs/early_stopping.md"))
    monkeypatch.chdir(ROOT)
    stop = load_config(file).early_stop
    assert len(stop.prompts()) == 500 and stop.rule(WinRate(0.39, 0.3, 0.48, 100))


# ---- a method in one file of the user --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def method_file(tmp_path_factory) -> Path:
    """Best-of-N distillation, as docs/add_a_method.md has it, in a folder of its own."""
    file = tmp_path_factory.mktemp("user") / "best_of_n.py"
    file.write_text(python_of("docs/add_a_method.md"))
    return file


def test_dpo_of_one_round_refuses_settings_for_several(tmp_path) -> None:
    with pytest.raises(ValueError, match="several rounds of DPO"):
        jaxsi.dpo(tiny.make_lm(), [], tmp_path / "run", jaxsi.DPOConfig(reference="first"))
    assert not (tmp_path / "run").exists()


def test_method_in_a_users_file_is_short_and_found(method_file) -> None:
    code = method_file.read_text()
    assert len(code[: code.index("def brief")].strip().splitlines()) <= 60
    assert method_of(load_config(method_file)).__name__ == "best_of_n"


@pytest.mark.slow
def test_method_in_a_users_file_survives_stops_and_a_kill(method_file, tmp_path) -> None:
    [(code, _, err)] = ended([start(["tests/stop_everywhere.py", method_file, tmp_path])], timeout=400)
    assert code == 0, err
    stops = json.loads((tmp_path / "stops.json").read_text())
    assert {(scope, stage) for scope, stage, place in stops if place == "start"} >= {
        (f"iter_{t}", stage) for t in (1, 2) for stage in ("responses", "judgments", "examples", "sft")
    }
    assert artefacts(tmp_path / "stopped") == artefacts(tmp_path / "whole")

    killed = tmp_path / "killed"
    [process] = start_command("run", method_file, "--run-dir", killed, count=1, devices=1)
    while process.poll() is None and not any(entry["stage"] == "judgments" for entry in journal(killed)):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    ended([process])
    assert not (killed / "iter_2").exists()
    [(code, _, err)] = ended(start_command("run", method_file, "--run-dir", killed, count=1, devices=1))
    assert code == 0, err
    assert artefacts(killed) == artefacts(tmp_path / "whole")

    changed = method_file.with_name("changed.py")
    changed.write_text(method_file.read_text().replace("return -len", "return len"))
    with pytest.raises(RunConfigError, match=r"judging.function: 'jaxsi_config_best_of_n.brief#"):
        jaxsi.run(load_config(changed), killed)


def test_file_without_one_method_is_refused(tmp_path) -> None:
    (tmp_path / "none.py").write_text("import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Config:\n"
                                      "    seed: int = 0\ndef config():\n    return Config()\n")  # fmt: skip
    with pytest.raises(RunError, match=r"has to define one function \(cfg: Config, run: Run\).*it has none"):
        method_of(load_config(tmp_path / "none.py"))


# ---- plain functions and texts ---------------------------------------------------------------------------------------


def length(prompt: str, response: str) -> float | None:
    return None if response == "?" else len(response.split()) + (100 if prompt == "Reverse: dog red axe" else 0)


def test_function_of_texts_is_a_judge() -> None:
    lm = tiny.make_lm()
    prompts = [jaxsi.Prompt.of(str(i), text) for i, text in enumerate(REVERSE)]
    texts = ["axe red cat.", "axe.", "?"]
    responses = [dataclasses.replace(tiny.response(p, 0, [5]), text=t) for p, t in zip(prompts, texts, strict=True)]
    judgments = jaxsi.judge_by(length)(lm, prompts, responses, None, None, None)
    assert [(j.id, j.score) for j in judgments] == [("0#0", 3.0), ("1#0", 101.0), ("2#0", None)]
    assert {j.fingerprint for j in judgments} == {lm.fingerprint}
    with pytest.raises(ValueError, match=r"length returned .*nan.* for the response 'axe red cat.' to 'Reverse: cat"):
        jaxsi.judge_by(not_a_number)(lm, prompts, responses, None, None, None)


def not_a_number(prompt: str, response: str) -> float:
    return float("nan")


not_a_number.__qualname__ = "length"


def test_function_of_texts_is_a_gap_reward() -> None:
    messages = jaxsi.Prompt.of("0", REVERSE[0]).messages
    gap, zero = jaxsi.reward_by(length)(None, [(messages, "axe red cat.", "axe."), (messages, "?", "axe.")], "{prompt}")
    np.testing.assert_array_equal(gap, [2.0, np.nan])
    np.testing.assert_array_equal(zero, [0.0, 0.0])


def critic(prompt: str, response: str) -> str:
    return load_critique_template().write("Too short.", "Say all.", 4, f"{response} And {prompt}.")


def test_function_of_texts_is_a_critic() -> None:
    prompt, template = jaxsi.Prompt.of("0", REVERSE[0]), load_critique_template()
    response = dataclasses.replace(tiny.response(prompt, 0, [5]), text="axe.")
    [critique] = jaxsi.critique_by(critic)([prompt], [response], template, None)
    assert (critique.score, critique.weaknesses) == (4.0, "Too short.")
    assert critique.improved == "axe. And Reverse: cat red axe."


def test_judge_takes_texts() -> None:
    judgments = jaxsi.judge(tiny.make_lm(), ["Sort: a"], ["a"], cfg=jaxsi.JudgeConfig(num_samples=1, max_new_tokens=4))
    assert [judgment.id for judgment in judgments] == ["0#0"]
    with pytest.raises(ValueError, match="2 responses to 1 prompts; give one text for each prompt"):
        jaxsi.judge(tiny.make_lm(), ["Sort: a"], ["a", "b"])


def test_sft_and_dpo_take_texts_and_resume(tmp_path) -> None:
    lm = tiny.make_lm()
    config = jaxsi.TrainConfig(max_length=64, batch_size=8, remat="none", dtype="float32", min_length=16,
                               optim=jaxsi.OptimConfig(learning_rate=1e-3))  # fmt: skip
    tuned = jaxsi.sft(lm, [(prompt, "axe red.") for prompt in REVERSE], tmp_path / "sft", config)
    again = jaxsi.sft(lm, [(prompt, "axe red.") for prompt in REVERSE], tmp_path / "sft", config)
    assert tuned.fingerprint == again.fingerprint != lm.fingerprint
    with pytest.raises(RunConfigError, match="data: "):
        jaxsi.sft(lm, [(prompt, "red axe.") for prompt in REVERSE], tmp_path / "sft", config)
    pairs = [(prompt, "axe red.", "Sure thing: axe") for prompt in REVERSE]
    aligned = jaxsi.dpo(tuned, pairs, tmp_path / "dpo", jaxsi.DPOConfig(train=config), reference=lm)
    assert aligned.fingerprint != tuned.fingerprint
    first = json.loads((tmp_path / "dpo" / "iter_1" / "train.jsonl").read_text().splitlines()[0])
    assert first["margin"] != 0.0, "the reference is another model than the start"
    assert jaxsi.load(tmp_path / "dpo", tiny.mesh(), "float32").fingerprint == aligned.fingerprint
