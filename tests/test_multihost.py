"""Two real processes against one with as many devices: the same responses, judgments and scores, and the same run of a
whole method, also where a signal stops both or a kill one of them."""

import hashlib
import json
import math
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import ROOT, ended, free_port, start, start_command

import tiny
from jaxsi import lm as lmlib
from jaxsi.cli.main import main
from jaxsi.model import decoder
from jaxsi.model.mesh import MeshConfig, make_mesh
from jaxsi.runs import checkpoint
from jaxsi.toyworld.seed import SHIPPED
from jaxsi.training import optim, train
from jaxsi.training.optim import OptimConfig

SAMPLING = """
import json, sys
import jax
index, count, port = map(int, sys.argv[1:])
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
import jaxsi
from jaxsi import feedback
from jaxsi.text.chat import render_prompt
from jaxsi.runs.records import to_json
from jaxsi.sampling.scoring import score_choices
from jaxsi.toyworld import world
from jaxsi.toyworld.corpus import RUBRIC
from jaxsi.toyworld.seed import SHIPPED
lm = jaxsi.load(SHIPPED, dtype="float32")
assert lm.mesh.devices.size == 2
prompts = world.prompts(6, seed=3, held_out=False)
responses = jaxsi.generate(lm, prompts, num_samples=2, max_new_tokens=16, batch_size=8)
judging = feedback.JudgeConfig(num_samples=2, max_new_tokens=24)
judgments = feedback.judge(lm, prompts, responses, RUBRIC, judging, jax.random.key(0))
scores = jaxsi.score(lm, [prompt for prompt in prompts for _ in range(2)], responses)
texts = [render_prompt(lm.tokenizer, prompt.messages) for prompt in prompts]
choices = score_choices(lm, texts, [[[7], [8]]] * len(texts))
records = [to_json(record) for record in [*responses, *judgments]]
print(json.dumps([records, [*scores.tolist(), *choices.ravel().tolist()], lm.fingerprint]))
"""


def sampled(count: int, devices: int) -> list[list]:
    port = free_port()
    said = ended([start(["-c", SAMPLING, index, count, port], devices) for index in range(count)])
    assert [code for code, _, _ in said] == [0] * count, said
    return [json.loads(out.splitlines()[-1]) for _, out, _ in said]


@pytest.mark.slow
def test_two_processes_sample_judge_and_score_as_one():
    (records, scores, fingerprint), *_ = sampled(count=1, devices=2)
    assert len(records) == 12 + 12
    for other_records, other_scores, other_fingerprint in sampled(count=2, devices=1):
        assert other_records == records
        assert other_scores == pytest.approx(scores, abs=1e-4)
        assert other_fingerprint == fingerprint


SAVING = """
import dataclasses, hashlib, json, sys
import jax, numpy as np
index, count, port = map(int, sys.argv[1:4])
jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
sys.path.insert(0, "tests")
import tiny
from jaxsi import checkpoint, data, mesh, train
from jaxsi.training.optim import OptimConfig
lm = tiny.make_lm(sys.argv[4])
optimizer = OptimConfig(learning_rate=1e-2)
loss = train.SFTLoss(lm.config, lm.mesh, "float32", "none")
sequences = [data.encode_pair(lm.tokenizer, pair)[0] for pair in tiny.preference_pairs(12)]
batches, parts = data.packed(sequences, 64, 8, lm.mesh, epochs=1, seed=0), []
collate = batches.collate
batch = dataclasses.replace(batches, collate=lambda part: parts.append(part[1:]) or collate(part))[0]
assert parts == [(4 * index, 4 * index + 4)], parts  # the rows of its own devices
state, _ = train.train_step(
    train.initial_state(lm.weights, optimizer), batch, 1e-2, loss=loss, optimizer=optimizer, accumulate=1
)
checkpoint.save(sys.argv[5], state._asdict(), {})
leaves = jax.tree.leaves(mesh.fetch(state._asdict()))
print(json.dumps([hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in leaves]))
"""


@pytest.mark.slow
def test_a_state_of_two_processes_restores_to_the_same_bits_on_any_mesh(tmp_path):
    """A step on a batch, of which each process has made its own rows, gives the state."""
    port = free_port()
    words = [["-c", SAVING, index, 2, port, "2x2x2", tmp_path / "state"] for index in range(2)]
    said = ended([start(line, 4) for line in words])
    assert [code for code, _, _ in said] == [0, 0], said
    hashes = [json.loads(out.splitlines()[-1]) for _, out, _ in said]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) > 20
    for sizes in ((1, 8, 1), (1, 2, 1), (1, 1, 1), (2, 2, 2), (4, 1, 2)):
        devices = jax.devices()[: math.prod(sizes)]
        mesh = make_mesh(MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))), devices)
        weights = decoder.abstract_weights(tiny.CONFIG, mesh, np.dtype("float32"))
        optimizer, step = OptimConfig(learning_rate=1e-2), jax.ShapeDtypeStruct((), np.int32)
        moments = jax.eval_shape(optim.make_optimizer(optimizer).init, weights)
        shapes, layout = train.State(weights, moments, step, step), train.state_layout(weights, optimizer)
        place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        restored = checkpoint.restore(tmp_path / "state", jax.tree.map(place, shapes, layout)._asdict())
        leaves = jax.tree.leaves(restored)
        assert [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in leaves] == hashes[0], sizes
        assert {x.sharding.mesh.devices.shape for x in leaves} == {sizes}


EXPORTING = """
import json, sys
import jax
index, count, port = map(int, sys.argv[1:4])
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
sys.path.insert(0, "tests")
import tiny
from pathlib import Path
from jaxsi import hf, hf_export
lm = tiny.make_lm("1x8x1")
folder, written, read = Path(sys.argv[4]), [], []
save_file, open_file = hf_export.save_file, hf._open
hf_export.save_file = lambda tensors, path, **rest: (written.append(path.name), save_file(tensors, path, **rest))

class Slices:
    def __init__(self, tensor):
        self.tensor = tensor
    def __getitem__(self, index):
        read.append(self.tensor[index].nbytes)
        return self.tensor[index]

class File:
    def __init__(self, file):
        self.file = file
    def get_slice(self, name):
        return Slices(self.file.get_slice(name))

hf_export.export(folder, lm.config, lm.weights, dtype="float32", max_shard_bytes=50_000)
hf._open = lambda stack, file: File(open_file(stack, file))
loaded = hf.load_weights(folder, lm.config, lm.mesh)
same = [bool((a == b).all()) for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(lm.weights), strict=True)]
norms = sum(w.nbytes for w in jax.tree.leaves(loaded) if w.sharding.is_fully_replicated)
print(json.dumps([written, sum(read) - norms, sum(w.nbytes for w in jax.tree.leaves(loaded)) - norms, all(same)]))
"""


@pytest.mark.slow
def test_each_of_two_processes_writes_its_files_of_an_export_and_reads_its_slices_alone(tmp_path):
    port = free_port()
    one = ended([start(["-c", EXPORTING, 0, 1, port, tmp_path / "one"], 8)])
    two = ended([start(["-c", EXPORTING, index, 2, port, tmp_path / "two"], 4) for index in range(2)])
    assert [code for code, _, _ in one + two] == [0] * 3, one + two
    (all_files, _, _, _), *halves = [json.loads(out.splitlines()[-1]) for _, out, _ in one + two]
    assert len(all_files) > 2
    assert [files for files, _, _, _ in halves] == [all_files[0::2], all_files[1::2]]
    for _, read, size, same in halves:
        assert same and read == size // 2, "what is on a process's devices, once"
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert contents[0] == contents[1] and set(all_files) < set(contents[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
def test_two_processes_generate_the_file_that_one_generates(tmp_path, capsys):
    lines = [json.dumps({"id": f"p{i}", "prompt": f"Reverse: cat red {word}"}) for i, word in enumerate(("axe", "egg"))]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def words(out: str) -> list:
        what = ["generate", SHIPPED, "--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / out]
        return [*map(str, what), "--num-samples", "3", "--max-new-tokens", "12", "--dtype", "float32"]

    said = ended(start_command(*words("two.jsonl"), count=2, devices=4))
    assert [code for code, _, _ in said] == [0, 0], said
    assert "tokens_per_second" in said[0][1] and said[1][1] == ""
    assert main(words("one.jsonl")) == 0
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "one.jsonl", "two.jsonl"}


# ---- a whole run -----------------------------------------------------------------------------------------------------

HEARTBEAT, MARGIN = 10, 5  # seconds
pod = pytest.mark.xdist_group("pod")  # one worker, so that the runs below are made but once


def start_run(directory: Path, count: int = 2) -> list:
    command = ("run", ROOT / "tests" / "micro" / "pod.py", "--run-dir", directory)
    return start_command(*command, count=count, devices=8 // count, heartbeat=HEARTBEAT)


def finished_run(directory: Path, count: int = 2) -> Path:
    said = ended(start_run(directory, count))
    assert [code for code, _, _ in said] == [0] * count, said
    assert "complete" in said[0][1] and all(out == "" for _, out, _ in said[1:])
    return directory


def wait_for(directory: Path, place: str, processes: list) -> None:
    """Until the journal says that the stage has begun."""
    journal, deadline = directory / "journal.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        lines = journal.read_text().splitlines() if journal.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        if any((f"{e['scope']}/{e['stage']}", e["event"]) == (place, "start") for e in entries):
            return
        time.sleep(0.02)
    pytest.fail(f"{place} never began: {ended(processes, 60)}")


def artefacts(directory: Path) -> dict[str, str]:
    """Hash of every record file and training log, and the fingerprint of every model."""
    files = [path for path in sorted(directory.rglob("*.jsonl")) if path.name != "journal.jsonl"]
    hashes = {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    for manifest in sorted(directory.glob("**/checkpoint/weights/jaxsi.json")):
        hashes[str(manifest.relative_to(directory))] = json.loads(manifest.read_text())["meta"]["fingerprint"]
    return hashes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of two processes with four devices each."""
    return finished_run(tmp_path_factory.mktemp("pod") / "whole")


@pod
@pytest.mark.slow
def test_a_run_that_a_kill_ends_and_a_signal_stops_goes_on_to_the_same_bytes(whole, tmp_path):
    directory = tmp_path / "run"
    processes = start_run(directory)
    wait_for(directory, "iter_1/eft_judgments", processes)
    os.killpg(processes[1].pid, signal.SIGKILL)
    began = time.monotonic()
    (code, _, err), _ = ended(processes, 120)
    assert time.monotonic() - began < HEARTBEAT + MARGIN
    assert code in (1, -signal.SIGABRT), err

    # A stage that is not cut in parts, then training. From there until the first step nobody asks, while a program is
    # made: time for the other one to hear of it.
    for place in ("iter_2/prompts", "iter_2/dpo"):
        processes = start_run(directory)
        wait_for(directory, place, processes)
        processes[1].send_signal(signal.SIGTERM)
        (code, _, err), (other, _, _) = ended(processes, 120)
        assert (code, other) == (75, 75), err
    [point] = (directory / "iter_2" / "resume").iterdir()
    kept = f"{directory / 'iter_2'}: training is kept up to step {int(point.name)} of"
    assert f"jaxsi: stopped by SIGTERM; {kept}" in err

    assert artefacts(finished_run(directory)) == artefacts(whole)


@pod
@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one_up_to_rounding(whole, tmp_path):
    """The data before the first update are the same bytes. A gradient's sum is rounded in another order."""
    one = finished_run(tmp_path / "one", count=1)
    both = artefacts(one), artefacts(whole)
    assert both[0].keys() == both[1].keys()
    for name in ("iter_1/ift.jsonl", "iter_1/rankings.jsonl"):
        assert both[0][name] == both[1][name]
    losses = [json.loads((run / "sft_baseline" / "train.jsonl").read_text().splitlines()[0]) for run in (one, whole)]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-6)
    for folder in ("sft_baseline", "iter_1", "iter_2"):
        weights = [lmlib.load(run / folder / "checkpoint", dtype="float32").weights for run in (one, whole)]
        for a, b in zip(*map(jax.tree.leaves, weights), strict=True):
            assert np.linalg.norm(np.asarray(a) - np.asarray(b)) < 1e-5 * np.linalg.norm(np.asarray(a))
