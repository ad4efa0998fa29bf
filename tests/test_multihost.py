"""Two real processes against one with as many devices: the same responses, judgments and scores, and the same run of a
whole method, also if a signal stops both or a kill ends one of them."""

import hashlib
import json
import math
import os
import signal
import time
from pathlib import Path

import endpoint_server
import jax
import numpy as np
import pytest
import two_processes
from micro_runs import artefacts, journal, micro
from processes import ended, free_port, start, start_command

import tiny
from jaxsi import lm as lmlib
from jaxsi.cli.main import main
from jaxsi.model import decoder
from jaxsi.model.mesh import MeshConfig, make_mesh
from jaxsi.runs import checkpoint
from jaxsi.toyworld.seed import SHIPPED
from jaxsi.training import optim, train
from jaxsi.training.optim import OptimConfig

# One worker has the tests of a fixture, so that its processes start only once.
pair_of_processes = pytest.mark.xdist_group("two processes")
pod = pytest.mark.xdist_group("pod")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes print of each part, process by process; and the folder of their files."""
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    outcomes = ended([start(["tests/two_processes.py", index, port, folder], 4) for index in range(2)])
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    return [json.loads(out.splitlines()[-1]) for _, out, _ in outcomes], folder


@pair_of_processes
@pytest.mark.slow
def test_two_processes_write_the_records_of_one(two, tmp_path):
    one = two_processes.sampled(tmp_path)
    assert len(one["records"]) == 12 + 12 and len(one["prompts"]) == 6
    for process in two[0]:
        other = process["sampled"]
        assert other["records"] == one["records"]
        assert other["prompts"] == one["prompts"]
        assert other["scores"] == pytest.approx(one["scores"], abs=1e-4)
        assert other["fingerprint"] == one["fingerprint"]


@pair_of_processes
@pytest.mark.slow
def test_state_of_two_processes_restores_to_the_same_bits_on_any_mesh(two):
    hashes = [process["saved"] for process in two[0]]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) > 20
    for sizes in ((1, 8, 1), (1, 2, 1), (1, 1, 1), (2, 2, 2), (4, 1, 2)):
        devices = jax.devices()[: math.prod(sizes)]
        mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))), devices)
        weights = decoder.abstract_weights(tiny.CONFIG, mesh, np.dtype("float32"))
        optimizer, step = OptimConfig(learning_rate=1e-2), jax.ShapeDtypeStruct((), np.int32)
        moments = jax.eval_shape(optim.make_optimizer(optimizer).init, weights)
        shapes, layout = train.State(weights, moments, step, step), train.state_layout(weights, optimizer)
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        restored = checkpoint.restore(two[1] / "state", jax.tree.map(place, shapes, layout)._asdict())
        leaves = jax.tree.leaves(restored)
        assert [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in leaves] == hashes[0], sizes
        assert {x.sharding.mesh.devices.shape for x in leaves} == {sizes}


@pair_of_processes
@pytest.mark.slow
def test_each_process_writes_its_own_files_of_an_export_and_reads_its_own_slices(two, tmp_path):
    one, halves = two_processes.exported(tmp_path), [process["exported"] for process in two[0]]
    assert one["same"] and len(one["files"]) > 2
    assert [half["files"] for half in halves] == [one["files"][0::2], one["files"][1::2]]
    for half in halves:
        assert half["same"] and half["read"] == half["size"] // 2, "what is on a process's devices, once"
    contents = [
        {path.name: path.read_bytes() for path in (folder / "model").iterdir()} for folder in (tmp_path, two[1])
    ]
    assert contents[0] == contents[1] and set(one["files"]) < set(contents[0])
    assert sorted(path.name for path in two[1].iterdir()) == ["answers.jsonl", "model", "state"]


@pair_of_processes
@pytest.mark.slow
def test_two_processes_ask_in_an_evaluation_as_one_does(two, tmp_path):
    one = two_processes.asked(tmp_path)
    assert one["asked"][0] > 1 and sum(one["asked"][1:]) == 0 and one["lines"] == one["asked"][0]
    for process in two[0]:
        assert process["asked"] == one
    assert (two[1] / "answers.jsonl").read_bytes() == (tmp_path / "answers.jsonl").read_bytes()
    assert not (two[1] / "unknown.jsonl").exists(), "the first process writes alone"


@pair_of_processes
@pytest.mark.slow
def test_two_processes_ask_an_endpoint_once_for_each_row(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", endpoint_server.KEY)
    tasks = [f"task {i}" for i in range(5)]
    for side, text in (("a", "a long response"), ("b", "short")):
        rows = [{"instruction": task, "output": f"{text} to {task}", "generator": side} for task in tasks]
        (tmp_path / f"{side}.json").write_text(json.dumps(rows))

    def play(name: str, before: int) -> endpoint_server.Reply:
        """The long response wins. What comes first about task 4 is no verdict."""
        wins = "A" if name.index("a long") < name.index("short") else "B"
        return endpoint_server.replied("I cannot say" if "task 4" in name and not before else f"Verdict: {wins}")

    with endpoint_server.serving(play) as server:
        judge = f"endpoint:m,base_url={server.url},cache={tmp_path / 'paid.jsonl'}"
        words = ["eval", "compare", tmp_path / "a.json", tmp_path / "b.json", "--judge", judge, "-o", tmp_path / "out"]
        for asked in (5, 0):
            outcomes = ended(start_command(*words, "--judge-batch", 2, "--json", count=2, devices=1))
            assert [code for code, _, _ in outcomes] == [0, 0], outcomes
            value = json.loads(outcomes[0][1])
            assert outcomes[1][1] == "" and (value["judged"], value["unreadable"], value["wins"]) == (asked, 1, 4)
            assert len(server.bodies) == 2 * len(tasks), "each order of each row once; no verdict is paid for, too"
    assert len((tmp_path / "out" / "judge_answers.jsonl").read_text().splitlines()) == 5


@pair_of_processes
@pytest.mark.slow
def test_two_processes_generate_the_file_that_one_generates(tmp_path, capsys):
    lines = [json.dumps({"id": f"p{i}", "prompt": f"Reverse: cat red {word}"}) for i, word in enumerate(("axe", "egg"))]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def words(out: str) -> list:
        command = ["generate", SHIPPED, "--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / out]
        return [*map(str, command), "--num-samples", "3", "--max-new-tokens", "12", "--dtype", "float32"]

    outcomes = ended(start_command(*words("two.jsonl"), count=2, devices=4))
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert "tokens_per_second" in outcomes[0][1] and outcomes[1][1] == ""
    assert main(words("one.jsonl")) == 0
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "one.jsonl", "two.jsonl"}


# ---- a whole run -----------------------------------------------------------------------------------------------------

HEARTBEAT, MARGIN = 10, 5  # seconds
DEVICES = 4  # of all processes together


def start_run(directory: Path, count: int = 2) -> list:
    command = ("run", micro("pod"), "--run-dir", directory)
    return start_command(*command, count=count, devices=DEVICES // count, heartbeat=HEARTBEAT)


def finished_run(directory: Path, count: int = 2) -> Path:
    outcomes = ended(start_run(directory, count))
    assert [code for code, _, _ in outcomes] == [0] * count, outcomes
    assert "complete" in outcomes[0][1] and all(out == "" for _, out, _ in outcomes[1:])
    return directory


def wait_for(directory: Path, place: str, processes: list) -> None:
    """Returns once the journal says that the stage has begun."""
    beginning, deadline = (*place.split("/"), "start"), time.monotonic() + 300
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if any((entry["scope"], entry["stage"], entry["event"]) == beginning for entry in journal(directory)):
            return
        time.sleep(0.02)
    pytest.fail(f"{place} never began: {ended(processes, 60)}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of two processes."""
    return finished_run(tmp_path_factory.mktemp("pod") / "whole")


@pod
@pytest.mark.slow
def test_run_resumes_to_the_same_bytes_after_a_kill_of_one_process_and_signals_to_it(whole, tmp_path):
    directory = tmp_path / "run"
    processes = start_run(directory)
    wait_for(directory, "iter_1/responses", processes)
    os.killpg(processes[1].pid, signal.SIGKILL)
    began = time.monotonic()
    (code, _, err), _ = ended(processes, 120)
    assert time.monotonic() - began < HEARTBEAT + MARGIN
    assert code in (1, -signal.SIGABRT), err

    # A stage that is not cut in parts, then training. Until its first step nobody asks for signals, since a program is
    # compiled: the other process has time to hear of it.
    for place in ("iter_1/eval_responses", "iter_2/dpo"):
        processes = start_run(directory)
        wait_for(directory, place, processes)
        processes[1].send_signal(signal.SIGTERM)
        (code, _, err), (other, _, _) = ended(processes, 120)
        assert (code, other) == (75, 75), err
    [point] = (directory / "iter_2" / "resume").iterdir()
    saved = f"{directory / 'iter_2'}: training is saved up to step {int(point.name)} of"
    assert f"jaxsi: stopped by SIGTERM; {saved}" in err

    assert artefacts(finished_run(directory)) == artefacts(whole)


@pod
@pytest.mark.slow
def test_run_of_two_processes_is_that_of_one_up_to_rounding(whole, tmp_path):
    """The data before the first update are the same bytes. A gradient's sum is rounded in another order."""
    one = finished_run(tmp_path / "one", count=1)
    hashes, others = artefacts(one), artefacts(whole)
    assert hashes.keys() == others.keys()
    for name in ("iter_0/demonstrations.jsonl", "iter_0/eval_responses.jsonl", "iter_1/responses.jsonl"):
        assert hashes[name] == others[name]
    losses = [json.loads((run / "iter_1" / "train.jsonl").read_text().splitlines()[0]) for run in (one, whole)]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-6)
    for folder in ("iter_1", "iter_2"):
        weights = [lmlib.load(run / folder / "checkpoint", dtype="float32").weights for run in (one, whole)]
        for a, b in zip(*map(jax.tree.leaves, weights), strict=True):
            assert np.linalg.norm(np.asarray(a) - np.asarray(b)) < 1e-5 * np.linalg.norm(np.asarray(a))
