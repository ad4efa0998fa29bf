"""Methods x properties: a method joins the battery with one line in ``METHODS`` and a micro config. What else it needs
is in docs/add_a_method.md."""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from micro_runs import artefacts, journal, micro, micro_run, run_method
from processes import ended, start_command

from jaxsi.cli.main import main
from jaxsi.lm import load
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config
from jaxsi.runs.config_snapshot import describe_config
from jaxsi.runs.run import Run
from jaxsi.toyworld import methods_table
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig

LN2 = math.log(2)
DPO_STEP_0 = {"preference_loss": LN2, "margin": 0.0, "chosen_shift": 0.0}  # DPO, whatever its likelihood term
ON_POLICY = {"ratio": 1.0, "kl": 0.0, "kl_k3": 0.0, "clipped": 0.0}
KILL, TERM = signal.SIGKILL, signal.SIGTERM


class Variant(NamedTuple):
    """A mesh, and what differs in all training on it."""

    mesh: MeshConfig
    training: dict[str, Any]


TENSOR = Variant(MeshConfig(data=2, fsdp=2, tensor=2), {})
PARTS = Variant(MeshConfig(data=1, fsdp=8, tensor=1), {"remat": "full", "accumulate": 2})


class Method(NamedTuple):
    """What is special to a method.

    signals: they end the run, one after the other, in these stages; a training is hit in its midst.
    truths: what the first training step of a scope must show, whatever the data.
    differs: the config fields in which the control arm differs, with spaces between them.
    variant: training on this mesh gives the same model.
    """

    signals: tuple[tuple[signal.Signals, str], ...]
    truths: dict[str, dict[str, float]]
    differs: str | None
    variant: Variant


METHODS = {
    "self_rewarding": Method(
        ((TERM, "iter_2/candidates"), (KILL, "iter_2/dpo")),
        {"iter_2": DPO_STEP_0}, "judging", TENSOR,
    ),
    "srt": Method(((TERM, "iter_0/sft"),), {"iter_1": DPO_STEP_0}, "direction", TENSOR),
    "seft": Method(((KILL, "iter_1/sft"),), {}, "reviser", PARTS),
    "pit": Method(
        ((KILL, "iter_1/rl"),),
        {"gap_reward": {"loss": 5 * LN2}, "policy_reward": {"loss": LN2}, "policy_rl": ON_POLICY,
         "iter_1": ON_POLICY, "iter_2": {"ratio": 1.0, "clipped": 0.0}},
        "rewarding", TENSOR,
    ),
    "spin": Method(((KILL, "iter_1/dpo"),), {"iter_1": DPO_STEP_0, "iter_2": DPO_STEP_0}, None, PARTS),
    "grpo": Method(((KILL, "iter_1/rl"),), {"iter_1": ON_POLICY, "iter_2": ON_POLICY}, "judging", TENSOR),
    "online_dpo": Method(
        ((TERM, "iter_1/rl"),), {"iter_1": DPO_STEP_0 | {"kl": 0.0}, "iter_2": {}}, "judging", TENSOR,
    ),
    "cream": Method(((KILL, "iter_2/dpo"),), {"iter_2": DPO_STEP_0}, "consistency", TENSOR),
    "temporal": Method(
        ((TERM, "iter_2/dpo"),), {"iter_2": DPO_STEP_0, "future_2": DPO_STEP_0}, "judging", PARTS,
    ),
    "meta_rewarding": Method(
        ((TERM, "iter_2/comparisons"),),
        {"iter_2": DPO_STEP_0, "iter_3": DPO_STEP_0}, "judging pairs", PARTS,
    ),
}  # fmt: skip
# One worker has all tests of a method: its programs are compiled in one process, and no other worker waits for its run.
# Newer interpreters run one method, the smallest.
LINES = {
    name: pytest.param(name, marks=[pytest.mark.xdist_group(name), *([] if name == "spin" else [pytest.mark.slow])])
    for name in METHODS
}
each_method = pytest.mark.parametrize("name", LINES.values())


# --------------------------------------------------------------------------------------------------- stops and signals


@each_method
def test_run_stopped_at_both_ends_of_every_stage_ends_the_same(name):
    run = micro_run(name)
    stages = {(entry["scope"], entry["stage"]) for entry in journal(run.whole) if entry["event"] == "start"}
    stops = {tuple(stop) for stop in run.stops}
    assert {(scope, stage) for scope, stage, place in stops if place == "start"} == stages
    assert {(scope, stage) for scope, stage, place in stops if place in ("records", "end")} == stages
    in_shards = {"shard"} if name not in ("grpo", "online_dpo") else set()  # these sample within their training alone
    assert {place for _, _, place in stops} == {"start", "records", "resume", "end"} | in_shards
    assert artefacts(run.stopped) == artefacts(run.whole)


def under_way(name: str, directory: Path, place: str) -> subprocess.Popen[str]:
    """The command line's run, once it has begun the stage ``place``, and logged a step if the stage is a training."""
    [process] = start_command("run", micro(name), "--run-dir", directory, count=1, devices=1)
    scope, stage = place.split("/")
    log = directory / scope / "train.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        begun = any((entry["scope"], entry["stage"], entry["event"]) == (scope, stage, "start")
                    for entry in journal(directory))  # fmt: skip
        if begun and (stage not in ("sft", "dpo", "rl") or (log.exists() and log.stat().st_size)):
            return process
        time.sleep(0.01)
    pytest.fail(f"{place} never began: {process.communicate()}")


def as_before_iteration(t: int, whole: Path, directory: Path) -> None:
    """Copies a run as it was when iteration t began."""
    later = {path.name for path in whole.glob("iter_*") if int(path.name.removeprefix("iter_")) >= t}
    shutil.copytree(whole, directory, ignore=lambda folder, names: later & set(names))
    lines = [entry for entry in journal(whole) if entry["scope"] not in later]
    (directory / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    summary = json.loads((whole / "summary.json").read_text())
    reported = [line for line in summary["iterations"] if line["iteration"] < t]
    (directory / "summary.json").write_text(json.dumps(summary | {"status": "running", "iterations": reported}))


@pytest.mark.slow
@each_method
def test_run_ended_by_signals_resumes_to_the_same_end(name, tmp_path):
    """Also: the command line on its own makes what Python makes. If a run of the method is long, it is taken up before
    the first signal's iteration."""
    directory = tmp_path / "run"
    first = int(METHODS[name].signals[0][1].split("/")[0].removeprefix("iter_"))
    if name in ("self_rewarding", "seft", "pit"):
        as_before_iteration(first, micro_run(name).whole, directory)
    for number, place in METHODS[name].signals:
        process = under_way(name, directory, place)
        os.killpg(process.pid, number)
        [(code, _, err)] = ended([process])
        if number == TERM:
            assert code == 75, err
            # In training it names the step, elsewhere what is finished: it depends on when the signal comes.
            said = "jaxsi: stopped by SIGTERM; .* (?:kept|saved).*, and the same command goes on from there"
            assert re.search(said, err), err
            assert "Traceback" not in err
    [(code, out, err)] = ended(start_command("run", micro(name), "--run-dir", directory, count=1, devices=1))
    assert code == 0, err
    assert "complete after" in out
    assert artefacts(directory) == artefacts(micro_run(name).whole)


@each_method
def test_finished_run_says_so_and_does_nothing(name, tmp_path, capsys):
    directory = shutil.copytree(micro_run(name).whole, tmp_path / "run")
    before = files(directory)
    assert main(["run", str(micro(name)), "--run-dir", str(directory)]) == 0
    assert "complete, nothing left to do" in capsys.readouterr().out
    assert files(directory) == before


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


# ----------------------------------------------------------------------------------------------------- a finished run


@each_method
def test_summary_has_what_every_method_reports(name):
    summary = json.loads((micro_run(name).whole / "summary.json").read_text())
    assert (summary["status"], summary["method"]) == ("complete", name)
    numbers = [line["iteration"] for line in summary["iterations"]]
    assert len(numbers) >= 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    for line in summary["iterations"]:
        low, high = line["quality"]["ci95"]
        assert 0 <= low <= line["quality"]["mean"] <= high <= 100
        assert line["mean_length"] > 0 and sum(line["seconds"].values()) > 0
    assert len({line["fingerprint"] for line in summary["iterations"]}) == len(numbers)


@each_method
def test_first_training_step_shows_known_values(name):
    for scope, figures in METHODS[name].truths.items():
        first = json.loads((micro_run(name).whole / scope / "train.jsonl").read_text().splitlines()[0])
        assert first["step"] == 1
        for figure, value in figures.items():
            assert first[figure] == pytest.approx(value, abs=2e-4), f"{scope}: {figure}"


# ----------------------------------------------------------------------------------------------- meshes, remat, control


def update(config: Any, directory: Path) -> np.ndarray:
    """What a run changed in the weights of its model, as one vector."""
    before, after = (load(path, dtype="float32").weights for path in (config.model, directory))
    both = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    return np.concatenate([(np.asarray(a) - np.asarray(b)).ravel() for a, b in both])


def same_direction(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine. Not quite 1: Adam takes steps of equal size even along directions with hardly any gradient."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def with_training(config: Any, **changes: Any) -> Any:
    """The config with ``changes`` in each TrainConfig and RLConfig inside it."""
    if isinstance(config, TrainConfig | RLConfig):
        return dataclasses.replace(config, **changes)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    parts = {name: with_training(value, **changes) for name, value in values.items() if dataclasses.is_dataclass(value)}
    return dataclasses.replace(config, **parts)


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """The run of each method's variant, made when it is first needed: (its config, its directory)."""

    @functools.cache
    def variant_of(name: str) -> tuple[Any, Path]:
        config = with_variant(load_config(micro(name)), METHODS[name].variant)
        return config, run_method(config, tmp_path_factory.mktemp("variant") / name)

    return variant_of


def with_variant(config: Any, variant: Variant) -> Any:
    return with_training(dataclasses.replace(config, mesh=variant.mesh, evaluate=None), **variant.training)


@each_method
def test_mesh_remat_and_accumulation_change_nothing(name, variants):
    config, directory = variants(name)
    assert same_direction(update(config, micro_run(name).whole), update(config, directory)) > 0.98


@pytest.mark.parametrize("name", [LINES[name] for name, method in METHODS.items() if method.differs])
def test_control_arm_differs_in_its_signal_alone(name, variants, tmp_path):
    """On the mesh of the variant, whose programs are compiled by now."""
    plain, changed = (describe_config(load_config(micro(name), arm)) for arm in ("config", "control"))
    differs = METHODS[name].differs.split()
    assert [field for field in plain if plain[field] != changed[field]] == differs
    config, method = variants(name)
    control, directory = with_variant(load_config(micro(name), "control"), METHODS[name].variant), tmp_path / "run"
    with Run.open(directory, control) as run:
        before = set(run.path.iterdir())
        methods_table.share(config, method, control, run.path)
        shared = {path.name for path in set(run.path.iterdir()) - before}
    in_common = methods_table.IN_COMMON[name]
    assert shared <= set(in_common.shared)
    assert bool(shared) == in_common.fields.issuperset(differs)
    run_method(control, directory)
    assert not np.array_equal(update(config, method), update(config, directory))
