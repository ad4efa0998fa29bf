"""Methods x properties: a method joins the battery with one line in ``METHODS`` and a micro config."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxsi.lm import load
from jaxsi.methods import method_of
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config
from jaxsi.runs.config_snapshot import describe_config
from jaxsi.runs.run import Run
from jaxsi.toyworld import methods_table
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig

ROOT = Path(__file__).parents[1]
LN2 = math.log(2)
DPO_STEP_0 = {"preference_loss": LN2, "margin": 0.0, "chosen_shift": 0.0}  # DPO, whatever its likelihood term
ON_POLICY = {"ratio": 1.0, "kl": 0.0, "kl_k3": 0.0, "clipped": 0.0}


class Method(NamedTuple):
    """``killed`` in these stages, one after the other, it ends the same. ``truths``: what the first training step of a
    scope must show, whatever the data. ``differs``: the config field in which the control arm differs."""

    killed: tuple[str, ...]
    truths: dict[str, dict[str, float]]
    differs: str | None


METHODS = {
    "self_rewarding": Method(("sft_baseline/sft", "iter_1/eft_judgments", "iter_2/prompts", "iter_2/candidates",
                              "iter_2/judgments", "iter_2/dpo"), {"iter_2": DPO_STEP_0}, "judging"),
    "srt": Method(("iter_0/sft", "iter_1/drafts", "iter_1/critiques", "iter_1/dpo"), {"iter_1": DPO_STEP_0},
                  "direction"),
    "seft": Method(("warm_reviser/sft", "reviser/labels", "reviser/sft", "iter_1/revisions", "iter_1/sft"), {},
                   "reviser"),
    "pit": Method(("policy_rl/rl", "iter_0/sft", "gap_reward/reward", "iter_1/rl", "iter_2/references", "iter_2/rl"),
                  {"gap_reward": {"loss": 5 * LN2}, "policy_reward": {"loss": LN2}, "policy_rl": ON_POLICY,
                   "iter_1": ON_POLICY, "iter_2": {"ratio": 1.0, "clipped": 0.0}}, "rewarding"),
    "spin": Method(("iter_1/responses", "iter_1/dpo", "iter_2/responses"),
                   {"iter_1": DPO_STEP_0, "iter_2": DPO_STEP_0}, None),
}  # fmt: skip
# One worker has all tests of a method, so that it runs the method but once.
LINES = {name: pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in METHODS}
each_method = pytest.mark.parametrize("name", LINES.values())


def micro(name: str) -> Path:
    return Path(__file__).parent / "micro" / f"{name}.py"


# ------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def environment():
    """Of another process: one CPU device."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def start(name: str, directory: Path, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxsi", "run", str(micro(name)), "--run-dir", str(directory)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(name: str, directory: Path, environment: dict[str, str]) -> str:
    process = start(name, directory, environment)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out.decode()
    return out.decode()


def kill_during(name: str, directory: Path, environment: dict[str, str], place: str) -> None:
    """SIGKILL of the whole process group once the journal says that the stage has begun."""
    process = begun(name, directory, environment, place)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def begun(name: str, directory: Path, environment: dict[str, str], place: str) -> subprocess.Popen:
    """A run that has begun the stage."""
    process = start(name, directory, environment)
    journal = directory / "journal.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        lines = journal.read_text().splitlines() if journal.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        if any((f"{e['scope']}/{e['stage']}", e["event"]) == (place, "start") for e in entries):
            break
        time.sleep(0.01)
    else:
        pytest.fail(f"{place} never began: {process.communicate()[0].decode()}")
    return process


def artefacts(directory: Path) -> dict[str, str]:
    """Hash of every record file and of every training log, and the fingerprint of every model."""
    files = {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*.jsonl"))
        if path.name != "journal.jsonl"
    }
    weights = {
        str(path.relative_to(directory)): json.loads(path.read_text())["meta"]["fingerprint"]
        for path in sorted(directory.glob("**/checkpoint/weights/jaxsi.json"))
    }
    assert len(weights) >= 2
    return files | weights


@pytest.fixture(scope="module")
def done(tmp_path_factory, environment):
    """The finished run of each method by the command line, made when it is first asked for."""

    @functools.cache
    def run_of(name: str) -> Path:
        directory = tmp_path_factory.mktemp("done") / name
        finish(name, directory, environment)
        return directory

    return run_of


@pytest.mark.slow
@each_method
def test_killed_in_any_stage_it_ends_the_same(name, done, tmp_path, environment):
    directory = tmp_path / "killed"
    for place in METHODS[name].killed:
        kill_during(name, directory, environment, place)
    finish(name, directory, environment)
    assert artefacts(directory) == artefacts(done(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [LINES["self_rewarding"], LINES["pit"]])
def test_stopped_by_a_signal_it_says_what_is_kept_and_ends_the_same(name, done, tmp_path, environment):
    directory = tmp_path / "stopped"
    for place in {"self_rewarding": ("iter_1/sft", "iter_2/candidates"), "pit": ("policy_rl/rl",)}[name]:
        process = begun(name, directory, environment, place)
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=200)[0].decode()
        assert process.returncode == 75, out
        # In the midst of training its step, elsewhere what is finished: that depends on when the signal comes.
        assert re.search("jaxsi: stopped by SIGTERM; .* kept.*, and the same command goes on from there", out), out
        assert "Traceback" not in out
    finish(name, directory, environment)
    assert artefacts(directory) == artefacts(done(name))


@each_method
def test_a_finished_run_says_so_and_does_nothing(name, done, environment):
    before, journal = artefacts(done(name)), (done(name) / "journal.jsonl").read_text()
    assert "complete, nothing left to do" in finish(name, done(name), environment)
    assert artefacts(done(name)) == before
    assert (done(name) / "journal.jsonl").read_text() == journal


@each_method
def test_the_summary_is_that_of_every_method(name, done):
    summary = json.loads((done(name) / "summary.json").read_text())
    assert (summary["status"], summary["method"]) == ("complete", name)
    assert set(summary["semantics"]) == {"init_from", "reference", "data", "optimizer"}
    numbers = [line["iteration"] for line in summary["iterations"]]
    assert len(numbers) >= 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    for line in summary["iterations"]:
        low, high = line["quality"]["ci95"]
        assert 0 <= low <= line["quality"]["mean"] <= high <= 100
        assert line["mean_length"] > 0 and sum(line["seconds"].values()) > 0
    assert len({line["fingerprint"] for line in summary["iterations"]}) == len(numbers)


@each_method
def test_the_truths_of_the_first_step(name, done):
    for scope, figures in METHODS[name].truths.items():
        first = json.loads((done(name) / scope / "train.jsonl").read_text().splitlines()[0])
        assert first["step"] == 1
        for figure, value in figures.items():
            assert first[figure] == pytest.approx(value, abs=2e-4), f"{scope}: {figure}"


# ----------------------------------------------------------------------------------------------- meshes, remat, control


def run_in_process(cfg: Any, directory: Path) -> Path:
    with Run.open(directory, cfg) as run:
        method_of(cfg)(cfg, run)
    return directory


def update(cfg: Any, directory: Path) -> np.ndarray:
    """What a run changed in the weights of its model, as one vector."""
    before, after = (load(path, dtype="float32").weights for path in (cfg.model, directory))
    both = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    return np.concatenate([(np.asarray(a) - np.asarray(b)).ravel() for a, b in both])


def same_direction(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine; Adam makes steps of equal size where a gradient is next to nothing, so it is not quite 1."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def with_training(cfg: Any, **changes: Any) -> Any:
    """The config with ``changes`` in each TrainConfig and RLConfig inside it."""
    if isinstance(cfg, TrainConfig | RLConfig):
        return dataclasses.replace(cfg, **changes)
    inner = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    found = {n: with_training(value, **changes) for n, value in inner.items() if dataclasses.is_dataclass(value)}
    return dataclasses.replace(cfg, **found)


@each_method
@pytest.mark.parametrize(
    ("mesh", "training"),
    [
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), {}, id="2x2x2"),
        pytest.param(
            MeshConfig(data=1, fsdp=8, tensor=1), {"remat": "full", "accumulate": 2}, id="1x8x1 remat accumulate"
        ),
    ],
)
def test_meshes_remat_and_accumulation_change_nothing(name, mesh, training, done, tmp_path):
    cfg = dataclasses.replace(load_config(micro(name)), mesh=mesh, evaluate=None)
    other = run_in_process(with_training(cfg, **training), tmp_path / "run")
    assert same_direction(update(cfg, done(name)), update(cfg, other)) > 0.98


@pytest.mark.parametrize("name", [LINES[name] for name, method in METHODS.items() if method.differs])
def test_the_control_arm_differs_in_its_signal_alone(name, done, tmp_path):
    cfg, control = load_config(micro(name)), load_config(micro(name), "control")
    given, changed = describe_config(cfg), describe_config(control)
    assert [field for field in given if given[field] != changed[field]] == [METHODS[name].differs]
    control = dataclasses.replace(control, evaluate=None)
    with Run.open(tmp_path / "run", control) as run:
        before = set(run.path.iterdir())
        methods_table.share(dataclasses.replace(cfg, evaluate=None), done(name), control, run.path)
        shared = {path.name for path in set(run.path.iterdir()) - before}
        assert shared <= set(type(cfg).SHARED)
        assert bool(shared) == (METHODS[name].differs in type(cfg).ARM_FIELDS)
        method_of(control)(control, run)
    assert not np.array_equal(update(cfg, done(name)), update(cfg, tmp_path / "run"))
