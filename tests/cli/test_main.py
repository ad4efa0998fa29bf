"""The command line with a tiny model: results on stdout, errors in one line, exit codes, runs that resume."""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxsi
import tiny
from jaxsi import lm as lmlib
from jaxsi.cli import generate, judge, judges, output_file, train
from jaxsi.cli.command import UsageError
from jaxsi.cli.main import COMMANDS, main
from jaxsi.cli.run import _full_flag, configure, field_flags
from jaxsi.cli.stored import Mesh, mesh_for
from jaxsi.cli.supervisor import cpu_devices
from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.hf.config import HFError
from jaxsi.lm import HubError, LoadError
from jaxsi.methods.preflight import PreflightError
from jaxsi.model.decoder import ModelError
from jaxsi.model.mesh import MeshError
from jaxsi.runs.config_file import ConfigFileError, load_config
from jaxsi.runs.config_snapshot import RunConfigError, describe_config
from jaxsi.runs.errors import InputError
from jaxsi.runs.records import Judgment, RecordError, Response, read_jsonl, write_jsonl
from jaxsi.runs.run import StaleRecordsError
from jaxsi.stages.datasets import SourceError
from jaxsi.stages.judges import JudgeError
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.prompts.comparison import RubricError
from jaxsi.text.chat_template import ChatTemplateError
from jaxsi.text.tokenizer import TokenizerError
from jaxsi.toyworld.evaluate import ToyEvaluation

ROOT = Path(__file__).parents[2]
TOY = ROOT / "configs" / "self_rewarding" / "toy.py"

# A whole run of one iteration: prompts from a file, no SFT, and expected scores, because a model with random weights
# writes no verdicts.
CONFIG = """
from jaxsi.toyworld.evaluate import ToyEvaluation
from jaxsi.stages.judge import JudgeConfig
from jaxsi.methods.self_rewarding import Config, PairConfig, PromptFile
from jaxsi.training.optim import OptimConfig
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.toyworld.corpus import RUBRIC
from jaxsi.training.train import DPOConfig, TrainConfig


def config():
    adam = OptimConfig(learning_rate=1e-3)
    train = TrainConfig(optim=adam, batch_size=8, max_length=64, remat="none", dtype="float32")
    return Config(
        model={model!r},
        seed_data=None,
        prompts=PromptFile(path={prompts!r}),
        sampling=SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=8, batch_size=16, dtype="float32"),
        judge=JudgeConfig(num_samples=1, max_new_tokens=8, expected=True),
        rubric=RUBRIC,
        pairs=PairConfig(cut_off=True),
        sft=None,
        dpo=DPOConfig(train=train),
        evaluate=ToyEvaluation(num_prompts=8, num_samples=2, max_new_tokens=4, judged_prompts=2),
        iterations=2,
    )
"""

# One worker has all tests of the finished run, so it is run only once.
one_run = pytest.mark.xdist_group("finished run")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, prompts and a config."""
    folder = tmp_path_factory.mktemp("world")
    lmlib.export(tiny.make_lm("1x8x1"), folder / "model", dtype="float32")
    rows = [
        json.dumps({"id": f"p{i}", "prompt": f"Reverse: cat red {word}"})
        for i, word in enumerate(("axe", "egg", "saw"))
    ]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    text = CONFIG.format(model=str(folder / "model"), prompts=str(folder / "prompts.jsonl"))
    (folder / "micro.py").write_text(text)
    (folder / "rubric.txt").write_text(load_config(TOY).rubric.template)
    return folder


@pytest.fixture(scope="module")
def finished(world):
    """The run of that config: (its directory, the object that --json printed)."""
    directory = world / "run"
    process = subprocess_main("run", world / "micro.py", "--run-dir", directory, "--json")
    assert process.returncode == 0, process.stderr
    return directory, json.loads(process.stdout)


def subprocess_main(*argv):
    """A command in its own process, on one device."""
    command = [sys.executable, "-m", "jaxsi", *map(str, argv)]
    environment = os.environ | cpu_devices(os.environ, 1)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def called(capsys, *argv):
    """(exit code, stdout, stderr) of a command in this process."""
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


def json_of(capsys, *argv):
    code, out, err = called(capsys, *argv, "--json")
    assert code == 0, err
    assert len(out.splitlines()) == 1
    return json.loads(out)


@one_run
@pytest.mark.slow
def test_run_prints_only_its_summary_on_stdout(finished):
    directory, value = finished
    assert value["status"] == "complete"
    assert value["already_complete"] is False
    assert [line["iteration"] for line in value["iterations"]] == [1, 2]
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["iterations"] == value["iterations"]
    assert 0 <= value["iterations"][1]["quality"]["mean"] <= 100
    assert value["iterations"][1]["pairs"] >= 1


@one_run
@pytest.mark.slow
def test_finished_run_does_nothing_and_says_so(finished, world, capsys):
    directory, _ = finished
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != ".lock" and path.is_file()}
    code, out, _ = called(capsys, "run", world / "micro.py", "--run-dir", directory)
    assert code == 0
    assert "complete, nothing left to do" in out
    assert "quality" in out
    after = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.name != ".lock" and path.is_file()}
    assert after == before


@one_run
@pytest.mark.slow
def test_finished_run_no_longer_needs_its_prompts(finished, world, capsys):
    prompts = world / "prompts.jsonl"
    text = prompts.read_text()
    prompts.unlink()
    try:
        assert json_of(capsys, "run", world / "micro.py", "--run-dir", finished[0])["already_complete"]
    finally:
        prompts.write_text(text)


@one_run
@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "generate", "judge", "improve", "export"])
def test_model_argument_accepts_run_iteration_and_checkpoint(command, finished, world, tmp_path, capsys, monkeypatch):
    """RUN_DIR, RUN_DIR@2 and its checkpoint are the same model; RUN_DIR@1 has other weights."""
    run, prompts = finished[0], ["--prompts", world / "prompts.jsonl"]
    write_jsonl(tmp_path / "responses.jsonl", read_jsonl(run / "iter_2" / "candidates.jsonl", Response)[:3])
    responses = ["--prompts", run / "iter_2" / "prompts.jsonl", "--responses", tmp_path / "responses.jsonl"]
    few = ["--max-new-tokens", "4", "--dtype", "float32", "--mesh.fsdp", "-1"]

    def contents(model, name):
        out = tmp_path / name
        match command:
            case "eval":  # its figures have their own test
                figures = {"quality": {"mean": 1.0, "ci95": [0.0, 2.0]}}
                monkeypatch.setattr(ToyEvaluation, "measure", lambda *_: figures)
                return json_of(capsys, "eval", "toy", model, "--dtype", "float32", "--mesh.fsdp", "-1")["fingerprint"]
            case "generate":
                json_of(capsys, "generate", model, *prompts, "-o", out, "--temperature", "0", *few)
                return read_jsonl(out, Response)[0].fingerprint
            case "judge":
                rubric = ["--rubric", world / "rubric.txt", "--num-samples", "1", "--expected"]
                json_of(capsys, "judge", model, *responses, "-o", out, *rubric, *few)
                return [judgment.score for judgment in read_jsonl(out, Judgment)]
            case "improve":
                rubric = ["--rubric", world / "rubric.txt", "--num-samples", "2", "--judge-tokens", "4"]
                json_of(capsys, "improve", "best-of-n", model, *prompts, "-o", out, *rubric, *few)
                return sorted(path.read_bytes() for path in out.rglob("*.jsonl") if path.name != "journal.jsonl")
            case _:
                return json_of(capsys, "export", model, out, "--mesh.fsdp", "-1")["fingerprint"]

    newest, first, second = (contents(model, f"out{i}") for i, model in enumerate((run, f"{run}@1", f"{run}@2")))
    assert contents(run / "iter_2" / "checkpoint", "checkpoint") == second == newest != first


@one_run
@pytest.mark.slow
def test_run_with_another_config_is_refused_with_the_difference(finished, world, capsys):
    code, out, err = called(capsys, "run", world / "micro.py", "--run-dir", finished[0], "--dpo.learning-rate", "0.5")
    assert code == 2
    assert out == ""
    assert "dpo.train.optim.learning_rate: 0.001 -> 0.5" in err
    assert "Traceback" not in err


@one_run
@pytest.mark.slow
def test_status_shows_stages_and_iterations(finished, capsys):
    value = json_of(capsys, "status", finished[0])
    assert value["status"] == "complete"
    assert value["live"] is False
    assert {(row["scope"], row["stage"]) for row in value["stages"]} >= {
        ("iter_2", "candidates"),
        ("iter_2", "judgments"),
    }
    code, out, _ = called(capsys, "status", finished[0])
    assert code == 0
    assert "complete, 2 of 2 iterations" in out


@one_run
@pytest.mark.slow
def test_eval_toy_repeats_the_figures_of_the_summary(finished):
    line = finished[1]["iterations"][1]
    process = subprocess_main("eval", "toy", f"{finished[0]}@2", "--json")
    assert process.returncode == 0, process.stderr
    value = json.loads(process.stdout)
    for name in ("quality", "greedy", "judge_agreement", "parse_rate", "mean_length", "fingerprint"):
        assert value[name] == line[name], name


@one_run
@pytest.mark.slow
def test_eval_toy_gives_same_figures_on_another_mesh(finished, capsys):
    line = finished[1]["iterations"][1]
    mesh = ["--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2]
    value = json_of(capsys, "eval", "toy", f"{finished[0]}@2", *mesh)
    assert value["quality"]["mean"] == pytest.approx(line["quality"]["mean"], abs=1e-5)
    assert value["fingerprint"] == line["fingerprint"]


@one_run
@pytest.mark.slow
def test_model_of_a_run_has_same_fingerprint_in_every_dtype(finished, world, tmp_path, capsys):
    model, fingerprint = f"{finished[0]}@2", finished[1]["iterations"][1]["fingerprint"]
    for dtype in ("bfloat16", "float16"):
        out = tmp_path / f"{dtype}.jsonl"
        options = ["--max-new-tokens", 4, "--max-prompts", 1, "--dtype", dtype]
        json_of(capsys, "generate", model, "--prompts", world / "prompts.jsonl", "-o", out, *options)
        assert [response.fingerprint for response in read_jsonl(out, Response)] == [fingerprint]
    assert json_of(capsys, "eval", "toy", model, "--dtype", "bfloat16")["fingerprint"] == fingerprint


@one_run
@pytest.mark.slow
def test_generate_judge_and_export(finished, world, tmp_path, capsys):
    model, responses, judgments = f"{finished[0]}@2", tmp_path / "responses.jsonl", tmp_path / "judgments.jsonl"
    prompts, few = ["--prompts", world / "prompts.jsonl"], ["--max-new-tokens", 8, "--dtype", "float32"]
    value = json_of(capsys, "generate", model, *prompts, "-o", responses, "--num-samples", 2, "--max-prompts", 2, *few)
    records = read_jsonl(responses, Response)
    assert [response.id for response in records] == ["p0#0", "p0#1", "p1#0", "p1#1"]
    assert {response.fingerprint for response in records} == {finished[1]["iterations"][1]["fingerprint"]}
    assert value["responses"] == 4
    assert value["tokens"] == sum(len(response.token_ids) for response in records)
    options = ["--responses", responses, "--num-samples", 1, "--expected"]
    value = json_of(capsys, "judge", model, *prompts, *options, "-o", judgments, *few)
    assert value["rubric"] == "toy"  # the rubric of the run
    assert [judgment.id for judgment in read_jsonl(judgments, Judgment)] == [response.id for response in records]
    value = json_of(capsys, "export", model, tmp_path / "exported", "--dtype", "float32")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(value["files"])
    assert lmlib.load(tmp_path / "exported", dtype="float32").fingerprint == finished[1]["iterations"][1]["fingerprint"]
    code, _, err = called(capsys, "export", model, tmp_path / "exported")
    assert code == 2
    assert "exists" in err


@pytest.mark.slow
def test_sft_and_dpo_train_on_files_and_resume(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "mesh_for", lambda *_: tiny.mesh())
    demonstrations, pairs = tmp_path / "rows.csv", tmp_path / "pairs.jsonl"
    demonstrations.write_text(
        "ask,say\n" + "".join(f"Reverse: cat {w},{w} cat.\n" for w in ("axe", "dog", "pie", "sun"))
    )
    rows = [{"prompt": f"Reverse: cat {w}", "chosen": f"{w} cat.", "rejected": f"cat {w}."} for w in ("axe", "dog")]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = [
        "--epochs",
        2,
        "--batch-size",
        2,
        "--max-length",
        64,
        "--dtype",
        "float32",
        "--log-every",
        1,
        "--mesh.fsdp",
        1,
    ]
    columns = ["--column", "prompt=ask", "--column", "response=say", "--learning-rate", "1e-3"]
    command = ["sft", world / "model", "--data", demonstrations, "--run-dir", tmp_path / "sft", *columns, *few]
    value = json_of(capsys, *command)
    assert value["examples"] == 4 and value["loss"] > 0
    assert json_of(capsys, *command)["fingerprint"] == value["fingerprint"]  # nothing is trained twice
    command = ["dpo", tmp_path / "sft", "--data", pairs, "--run-dir", tmp_path / "dpo", "--loss", "ipo", *few]
    tuned = json_of(capsys, *command)
    assert tuned["pairs"] == 2 and tuned["fingerprint"] != value["fingerprint"]
    assert lmlib.load(tmp_path / "dpo", dtype="float32").fingerprint == tuned["fingerprint"]
    assert "beta is 0" in failure(capsys, *command, "--beta", 0)


def test_output_that_is_read_or_exists_is_refused(world, tmp_path, capsys):
    """Before the model is loaded: there is none here."""
    prompts, responses = shutil.copy(world / "prompts.jsonl", tmp_path), tmp_path / "responses.jsonl"
    responses.write_text("precious")
    before = Path(prompts).read_bytes()
    command = ["generate", "nothing", "--prompts", prompts, "-o"]
    assert "is also read by this command" in failure(capsys, *command, prompts, "--overwrite")
    assert "exists; give another name, or --overwrite" in failure(capsys, *command, responses)
    command = ["judge", "nothing", "--prompts", prompts, "--responses", responses, "--overwrite", "-o"]
    assert "is also read by this command" in failure(capsys, *command, tmp_path / "." / "responses.jsonl")
    assert (Path(prompts).read_bytes(), responses.read_text()) == (before, "precious")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "unknown command 'nonsense'"),
        (["eval"], "unknown command 'eval'"),
        (["eval", "nonsense"], "unknown command 'eval nonsense'"),
        (["run"], "give a config first"),
        (["run", "absent.py"], "absent.py: no such config file"),
        (["run", str(TOY), "--nonsense", "3"], "--nonsense"),
        (["run", str(TOY), "--iterations", "many"], "many"),
        (["run", str(TOY), "--iterations", "0"], "iterations is 0"),
        (["run", str(TOY), "--max-prompts", "4"], "give --prompts FILE as well"),
        (["run", str(TOY), "--prompts", "x.jsonl", "--max-prompts", "0"], "it is at least 1"),
        (["run", str(TOY), "--prompts", "x.jsonl", "--column", "promt=x"], "is not of the form COLUMN=NAME"),
        (["run", str(TOY), "--column", "prompt=x"], "--column needs a file of prompts"),
        (["generate", "model"], "--prompts"),
        (["generate", "model", "--prompts", "x.jsonl", "-o", "absent/out.jsonl"], "the folder absent does not exist"),
        (["bench", "methods", "--seeds", "0"], "at least 1 seed"),
        (["bench", "methods", "--arms", "magic"], "arms of method, control, exact"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_command_line_exits_with_2(argv, message, capsys):
    code, out, err = called(capsys, *argv)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_missing_command_shows_the_commands(capsys):
    code, out, _ = called(capsys)
    assert code == 2
    assert all(name in out for name in COMMANDS)
    code, out, _ = called(capsys, "eval", "--help")
    assert code == 0
    assert "eval toy" in out
    assert "export" not in out.split("Commands:")[1].split("--help")[0]
    code, out, _ = called(capsys, "--version")
    assert (code, out) == (0, "jaxsi 0.1.0\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name, capsys):
    code, out, _ = called(capsys, *name.split(), "--help")
    assert code == 0
    assert "Examples:" in out
    assert f"jaxsi {name} " in out
    assert "--json" in out


@pytest.mark.parametrize("name", ["generate", "judge", "eval toy", "export"])
def test_commands_with_a_model_take_a_mesh(name, capsys):
    _, out, _ = called(capsys, *name.split(), "--help")
    assert all(f"--mesh.{axis}" in out for axis in ("data", "fsdp", "tensor"))


def test_generate_help_says_what_batch_size_changes(capsys):
    _, out, _ = called(capsys, "generate", "--help")
    text = " ".join(out.replace("│", " ").split())
    assert "In float32 it does not change the responses; in bfloat16 it changes them" in text


def test_mesh_for_uses_the_flags_then_the_mesh_of_the_run(tmp_path):
    flags = Mesh(data=2, tensor=4)
    assert tuple(mesh_for("somewhere", flags).shape.values()) == (2, 1, 4)
    assert tuple(mesh_for("somewhere", Mesh()).shape.values()) == (1, 8, 1)
    (tmp_path / "journal.jsonl").touch()
    (tmp_path / "config.json").write_text(json.dumps({"mesh": {"data": -1, "fsdp": 2, "tensor": 2}}))
    assert tuple(mesh_for(f"{tmp_path}@2", Mesh()).shape.values()) == (2, 2, 2)
    assert tuple(mesh_for(str(tmp_path), flags).shape.values()) == (2, 1, 4)
    (tmp_path / "config.json").write_text(json.dumps({"method": "seft"}))  # as from `jaxsi improve`
    assert tuple(mesh_for(str(tmp_path), Mesh()).shape.values()) == (1, 8, 1)


def test_rubric_defaults_to_that_of_the_run(tmp_path):
    (tmp_path / "journal.jsonl").touch()
    stored = describe_config(load_config(TOY).rubric)
    (tmp_path / "config.json").write_text(json.dumps({"rubric": stored}))
    assert judges.rubric_for(None, f"{tmp_path}@2") == load_config(TOY).rubric
    (tmp_path / "config.json").write_text(json.dumps({"critic_prompts": 8}))  # a method without a judge
    assert judges.rubric_for(None, str(tmp_path)) == load_rubric()
    assert judges.rubric_for(None, "somewhere") == load_rubric()


def interrupt_second_call(monkeypatch, name):
    """Interrupts the second call of a function; returns a list that grows by one with each call."""
    calls, original = [], pkgutil.resolve_name(name)

    def call(*args, **options):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(name, call)
    return calls


def set_part_size(monkeypatch, size):
    monkeypatch.setattr(output_file, "CHUNK", size)
    for command in (generate, judge):  # on one device: programs for eight take longer to compile
        monkeypatch.setattr(command, "mesh_for", lambda *_: tiny.mesh())


def test_interrupted_generate_goes_on_after_its_last_part(world, tmp_path, capsys, monkeypatch):
    set_part_size(monkeypatch, 1)
    command = ["generate", world / "model", "--prompts", world / "prompts.jsonl", "--max-new-tokens", 4]
    command += ["--dtype", "float32", "--num-samples", 2, "--batch-size", 2]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    value = json_of(capsys, *command, "-o", whole)
    calls = interrupt_second_call(monkeypatch, "jaxsi.sampling.generate.generate")
    code, _, err = called(capsys, *command, "-o", out)
    assert code == 130
    assert "what is finished is kept" in err
    assert not out.exists()

    message = failure(capsys, *command, "-o", out, "--temperature", "0.9")
    assert "out.jsonl.shards holds parts of out.jsonl" in message
    _, _, err = called(capsys, *command, "-o", out, "--max-prompts", 2, "--seed", 1)
    assert "prompts: '3 records" in err
    assert "seed: 0 -> 1" in err
    assert len(calls) == 2

    # What counts is the content: copies at another place are the same, another chat template is not.
    copies = shutil.copytree(world, tmp_path / "copies", ignore=shutil.ignore_patterns("run"))
    template = copies / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + "\n\n")
    command[1], command[3] = copies / "model", copies / "prompts.jsonl"
    assert "was sampled by weights" in failure(capsys, *command, "-o", out)
    assert len(calls) == 2
    shutil.copy(world / "model" / "chat_template.jinja", template)
    again = json_of(capsys, *command, "-o", out)
    shutil.rmtree(copies)
    assert len(calls) == 4  # the second and third prompts
    assert out.read_bytes() == whole.read_bytes()
    assert again["tokens"] == value["tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("name", ["generate", "judge"])
def test_command_with_dtype_auto_keeps_the_dtype_of_its_finished_parts(name, world, tmp_path, capsys, monkeypatch):
    set_part_size(monkeypatch, 1)
    loaded = []
    monkeypatch.setattr("jaxsi.lm.load", lambda model, mesh, dtype, **_: loaded.append(dtype) or tiny.make_lm())
    write_jsonl(tmp_path / "responses.jsonl", [tiny_response(f"p{i}", 0) for i in range(2)])
    command = [name, world / "model", "--prompts", world / "prompts.jsonl", "--max-new-tokens", 4, "--num-samples", 1]
    command += ["-o", tmp_path / "out.jsonl"]
    if name == "judge":
        command += ["--responses", tmp_path / "responses.jsonl", "--expected", "--rubric", world / "rubric.txt"]
    stage = {"generate": "jaxsi.sampling.generate.generate", "judge": "jaxsi.stages.judge.judge"}[name]
    interrupt_second_call(monkeypatch, stage)
    for fast in ("float32", "bfloat16"):  # it goes on where another dtype is fast
        monkeypatch.setattr("jaxsi.model.compute_dtype._announced", lambda fast=fast: fast)
        code, _, err = called(capsys, *command)
        assert code == (130 if fast == "float32" else 0), err
        stored = tmp_path / "out.jsonl.shards" / "config.json"
        assert not stored.exists() or json.loads(stored.read_text())["settings"]["dtype"] == "float32"
    assert loaded == ["float32", "float32"] and "dtype auto: float32, as this run began" in err


def test_interrupted_judge_goes_on_after_its_last_part(world, tmp_path, capsys, monkeypatch):
    set_part_size(monkeypatch, 2)
    prompts, responses = world / "prompts.jsonl", tmp_path / "responses.jsonl"
    records = [tiny_response(f"p{i}", sample) for i in range(3) for sample in range(2)]
    write_jsonl(responses, records)
    command = ["judge", world / "model", "--responses", responses, "--prompts", prompts, "--dtype", "float32"]
    command += ["--max-new-tokens", 4, "--num-samples", 1, "--expected", "--rubric", world / "rubric.txt"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    json_of(capsys, *command, "-o", whole)
    calls = interrupt_second_call(monkeypatch, "jaxsi.stages.judge.judge")
    assert called(capsys, *command, "-o", out)[0] == 130
    write_jsonl(responses, records[:5])
    _, _, err = called(capsys, *command, "-o", out)
    assert "responses: '6 records" in err
    write_jsonl(responses, records)
    json_of(capsys, *command, "-o", out)
    assert len(calls) == 4
    assert out.read_bytes() == whole.read_bytes()
    assert not out.with_name("out.jsonl.shards").exists()


def tiny_response(prompt_id, sample):
    """A response as from another model."""
    return Response(
        id=f"{prompt_id}#{sample}",
        prompt_id=prompt_id,
        sample=sample,
        text=f"cat {sample}",
        token_ids=(1, 2),
        logps=(-1.0, -1.0),
        finish_reason="stop",
        fingerprint="",
        template="",
    )


def failure(capsys, *argv, code=2):
    """The line with the error of a command that fails with this exit code."""
    found, out, err = called(capsys, *argv)
    assert found == code
    assert out == ""
    assert "Traceback" not in err
    return next(line for line in err.splitlines() if line.startswith("jaxsi: error: "))


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_row_that_the_template_refuses_is_named(world, tmp_path, capsys):
    """File, line, id, the template's own words and the fix, before any work."""
    model = shutil.copytree(world / "model", tmp_path / "model")
    (model / "chat_template.jinja").write_text(GEMMA)
    good, system = {"role": "user", "content": "Reverse: cat"}, {"role": "system", "content": "Be brief."}
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    for bad, says in (
        ([system, good], "message 0 of 2 (system: 'Be brief.'): System role not supported; the roles are system, "
         "user. Put the text of the system message into the user's, or change the model's chat template"),
        ([good, good], "message 1 of 2 (user: 'Reverse: cat'): Conversation roles must alternate user/assistant; the "
         "roles are user, user. Change the messages, or change the model's chat template"),
    ):  # fmt: skip
        rows = [{"key": "a", "messages": [good]}, {"key": "b", "messages": bad}]
        prompts.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
        for command in (
            ["generate", model, "-o", out, "--max-new-tokens", 4],
            ["improve", "self-refine", model, "-o", out, "--max-new-tokens", 4],
            ["run", world / "micro.py", "--model", model, "--run-dir", tmp_path / "run"],
        ):
            message = failure(capsys, *command, "--prompts", prompts, "--column", "id=key")
            assert message == (
                f"jaxsi: error: {prompts}:3: prompt 'b': the chat template refuses the conversation at {says}"
            )
        prompts.write_text("".join(json.dumps(row | {"response": "tac"}) + "\n" for row in rows))
        command = ["sft", model, "--data", prompts, "--column", "id=key", "--run-dir", tmp_path / "sft"]
        message = failure(capsys, *command, "--batch-size", 8)
        assert message == f"jaxsi: error: example 'b': the chat template refuses the conversation at {says}"
        shutil.rmtree(tmp_path / "sft")
    assert not out.exists() and not (tmp_path / "run").exists()


def test_missing_folder_is_named(world, tmp_path, capsys):
    prompts, out = world / "prompts.jsonl", tmp_path / "out.jsonl"
    assert "nowhere: no such folder" in failure(capsys, "generate", "./nowhere", "--prompts", prompts, "-o", out)
    assert "no such folder" in failure(capsys, "export", "./nowhere", tmp_path / "exported", "--mesh.fsdp", -1)
    assert "holds no run" in failure(capsys, "status", tmp_path, code=1)


def test_broken_line_of_a_prompts_file_is_named(world, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "one"}\n{"prompt": \n')
    message = failure(capsys, "generate", world / "model", "--prompts", bad, "-o", tmp_path / "out.jsonl")
    assert f"{bad}:2: broken JSON" in message
    message = failure(capsys, "run", world / "micro.py", "--prompts", bad, "--run-dir", tmp_path / "run")
    assert f"{bad}:2: broken JSON" in message
    assert not (tmp_path / "run").exists()


def test_too_long_prompt_is_refused_before_any_work(world, tmp_path, capsys):
    long = tmp_path / "long.jsonl"
    long.write_text(
        json.dumps({"id": "short", "prompt": "cat"}) + "\n" + json.dumps({"id": "big", "prompt": "cat " * 300})
    )
    message = failure(capsys, "run", world / "micro.py", "--prompts", long, "--run-dir", tmp_path / "run")
    assert "long.jsonl:2: prompt 'big' has 305 tokens, the limit is 63" in message
    assert "dpo.train.max_length is 64" in message
    assert not (tmp_path / "run").exists()
    message = failure(
        capsys, "generate", world / "model", "--prompts", long, "-o", tmp_path / "out.jsonl", "--max-new-tokens", 56
    )
    assert "prompt 'big' has 305 tokens, the limit is 200" in message


def test_mesh_that_does_not_fit_is_refused_before_any_work(world, tmp_path, capsys):
    run = ["run", world / "micro.py", "--run-dir", tmp_path / "run"]
    assert "needs 3 devices, there are 8" in failure(capsys, *run, "--mesh.fsdp", 3)
    assert "dpo.train.batch_size 12" in failure(capsys, *run, "--dpo.train.batch-size", 12)
    assert "heads = 2 of the model is not divisible by 8" in failure(capsys, *run, "--mesh.fsdp", 1, "--mesh.tensor", 8)
    assert "3 prompts for 4 iterations" in failure(capsys, *run, "--iterations", 5)
    assert not (tmp_path / "run").exists()


def test_judge_refuses_empty_or_incomplete_responses(world, tmp_path, capsys):
    responses = tmp_path / "responses.jsonl"
    command = ["judge", world / "model", "--responses", responses, "--prompts", world / "prompts.jsonl"]
    command += ["-o", tmp_path / "out.jsonl"]
    responses.write_text("")
    assert "no responses in this file" in failure(capsys, *command)
    responses.write_text('{"id": "x"}\n')
    assert f"{responses}:1: key 'fingerprint' of a Response is missing" in failure(capsys, *command)


def with_cause(error, cause):
    error.__cause__ = cause
    return error


def test_errors_of_wrong_input_share_a_base_class():
    """They lead to exit code 2, because the same command would fail again. Add an error here only for that reason."""
    for module in pkgutil.walk_packages(jaxsi.__path__, "jaxsi."):
        if module.name != "jaxsi.__main__":
            importlib.import_module(module.name)
    errors = {ChatTemplateError, ConfigFileError, HFError, LoadError, MeshError, ModelError}
    errors |= {PreflightError, RecordError, RunConfigError, StaleRecordsError, TokenizerError}
    errors |= {EvaluationError, JudgeError, RubricError, SourceError}
    found = set(InputError.__subclasses__())
    assert {error for error in found if error.__module__.startswith("jaxsi.")} == errors
    assert not any(error.transient for error in errors)
    assert set(LoadError.__subclasses__()) == {HubError} and HubError.transient


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; what is finished is kept"),
        (ValueError("a value"), 1, "jaxsi: error: a value\n"),
        (MeshError("8 devices"), 2, "jaxsi: error: 8 devices\n"),
        (LoadError("x: no such folder"), 2, "jaxsi: error: x: no such folder\n"),
        (HubError("a/b: no such folder, and the hub"), 1, "and the hub"),
        (with_cause(RecordError("a.jsonl", None, "cannot be read"), FileNotFoundError()), 2, "a.jsonl: cannot be read"),
        (
            with_cause(RecordError("a.jsonl", None, "cannot be read"), OSError(5, "Input/output error")),
            1,
            "cannot be read",
        ),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (KeyError("k"), 1, "jaxsi: error: KeyError: 'k' (--debug shows where)"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore"), 1, "lower the batch size"),
    ],
    ids=repr,
)
def test_errors_become_exit_codes(error, code, message, capsys, monkeypatch):
    def fail(argv):
        raise error

    monkeypatch.setattr("jaxsi.cli.status.status", fail)
    found, out, err = called(capsys, "status", "x")
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    if code == 1:
        _, _, err = called(capsys, "status", "x", "--debug")
        assert "Traceback" in err


def test_stdout_has_only_the_result():
    noise = """
import os, sys
import jaxsi.cli.status as module
from jaxsi.cli.command import Report
def status(argv):
    print("python noise")
    os.write(1, b"noise from below\\n")
    return Report({"a": 1}, "text")
module.status = status
from jaxsi.cli.main import main
sys.exit(main(["status", "--json"]))
"""
    process = subprocess.run(
        [sys.executable, "-c", noise], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert process.stdout == '{"a": 1}\n'
    assert "python noise" in process.stderr
    assert "noise from below" in process.stderr


def test_command_line_changes_fields_of_the_config():
    assert configure(TOY, []) == load_config(TOY)
    cfg = configure(TOY, ["--dpo.learning-rate", "5e-7", "--sft.batch-size=8", "--seed", "3"])
    assert (cfg.dpo.train.optim.learning_rate, cfg.sft.batch_size, cfg.seed) == (5e-7, 8, 3)
    cfg = configure(TOY, ["--prompts.repeat"], path="x.jsonl", max_prompts=64)
    assert (cfg.prompts.path, cfg.prompts.max_prompts, cfg.prompts.repeat) == ("x.jsonl", 64, True)


def test_short_flag_stands_for_one_field():
    flags = field_flags(load_config(TOY))
    assert _full_flag("--dpo.learning-rate", flags) == "--dpo.train.optim.learning-rate"
    assert _full_flag("--dpo.beta", flags) == "--dpo.beta"
    assert _full_flag("--dpo.nonsense", flags) == "--dpo.nonsense"
    assert _full_flag("5e-7", flags) == "5e-7"
    with pytest.raises(UsageError, match=r"fits several fields; write one of --a\.b\.x, --a\.c\.x"):
        _full_flag("--a.x", ["--a.b.x", "--a.c.x"])
