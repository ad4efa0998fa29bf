"""The frame around a method's iterations: the model as given, and the lines of summary.json."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from micro_runs import micro

import tiny
from jaxsi import lm as lmlib
from jaxsi.lm import LoadError
from jaxsi.methods.lifecycle import begin, iteration_of, keep, report, same_model
from jaxsi.methods.start import finish
from jaxsi.model.mesh import MeshConfig, MeshError
from jaxsi.runs.config_file import load_config
from jaxsi.runs.config_snapshot import RunConfigError, RunError
from jaxsi.runs.records import Prompt, RecordError
from jaxsi.runs.run import Run, StaleRecordsError
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.self_instruct import PromptFile, next_part, read_source
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import TrainConfig

MESH = MeshConfig(data=1, fsdp=8)
EIGHT = TrainConfig(optim=OptimConfig(learning_rate=1e-3), batch_size=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    model: str
    first: TrainConfig | None
    second: TrainConfig | None
    mesh: MeshConfig = MESH
    sampling: SamplingConfig = SamplingConfig(dtype="bfloat16")


def config(model: Path, first: TrainConfig | None = None, second: TrainConfig | None = None) -> Method:
    return Method(model=str(model), first=first, second=second)


def test_earlier_iteration_of_a_run_is_read_back(tmp_path: Path) -> None:
    lm = tiny.make_lm()
    with Run.open(tmp_path / "run", Config()) as run:
        keep(tiny.make_lm(seed=1), run.at("iter_1"))
        assert iteration_of(lm, run, 1).fingerprint == tiny.make_lm(seed=1).fingerprint
        with pytest.raises(RunError, match=r"iter_2.checkpoint is gone or damaged; put it back"):
            iteration_of(lm, run, 2)


def test_changed_model_is_refused_on_resume(tmp_path: Path) -> None:
    model = tmp_path / "model"
    lmlib.export(tiny.make_lm(), model, dtype="float32")
    with Run.open(tmp_path / "run", Config()) as run:
        first = begin(config(model), run)
        assert str(first.weights["final_norm"].dtype) == "float32" and str(first.dtype) == "bfloat16"
        assert begin(config(model), run).fingerprint == first.fingerprint
        lmlib.export(tiny.make_lm(seed=1), tmp_path / "other", dtype="float32")
        (tmp_path / "other" / "model.safetensors").replace(model / "model.safetensors")
        with pytest.raises(StaleRecordsError, match="this run began with"):
            begin(config(model), run)


def edit(file: Path, change: str, by: str) -> None:
    content = file.read_text()
    assert change in content
    file.write_text(content.replace(change, by))


def test_copied_model_is_the_same_and_any_other_is_refused(tmp_path: Path) -> None:
    """What counts is the content of the folder: weights, config, tokenizer and chat template."""
    lmlib.export(tiny.make_lm(), tmp_path / "model", dtype="float32")
    with Run.open(tmp_path / "run", Config()) as run:
        first = begin(config(tmp_path / "model"), run)
        shutil.copytree(tmp_path / "model", tmp_path / "copy")
        assert begin(config(tmp_path / "copy"), run).fingerprint == first.fingerprint
        for name, file, change, by, message in (
            ("rope", "config.json", '"rope_theta": 10000.0', '"rope_theta": 20000.0', r"has the rope .*20000\.0"),
            ("norm", "config.json", '"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06', "has the norm_eps 1e-06"),
            (
                "template",
                "chat_template.jinja",
                "bos_token }}",
                "bos_token }} ",
                "has the chat template [0-9a-f]{16}, this run began",
            ),
            ("ends", "generation_config.json", '"eos_token_id": [', '"eos_token_id": [5,', "has the tokenizer"),
        ):
            folder = shutil.copytree(tmp_path / "model", tmp_path / name)
            edit(folder / file, change, by)
            with pytest.raises(StaleRecordsError, match=message):
                begin(config(folder), run)


@pytest.mark.parametrize(
    "method",
    ["self_rewarding", "srt", "seft", "pit", "spin", "grpo", "online_dpo", "cream", "temporal", "meta_rewarding"],
)
def test_model_of_every_method_may_lie_elsewhere(method: str, tmp_path: Path) -> None:
    cfg = load_config(micro(method))
    Run.open(tmp_path, cfg).close()
    moved = dataclasses.replace(cfg, model="/elsewhere/model")
    Run.open(tmp_path, moved).close()
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "/elsewhere/model"
    with pytest.raises(RunConfigError, match=r"model.* may name another place with the same content"):
        Run.open(tmp_path, dataclasses.replace(cfg, seed=9))


def test_other_models_of_a_config_may_move_once_the_run_knows_them(tmp_path: Path) -> None:
    """In runs of earlier versions their fingerprint is not there, so their path is fixed."""
    cfg = load_config(micro("self_rewarding"))

    def with_generator(path: str) -> Any:
        return dataclasses.replace(cfg, prompts=dataclasses.replace(cfg.prompts, generator=path))

    Run.open(tmp_path, with_generator("a")).close()
    Run.open(tmp_path, with_generator("b")).close()  # nothing is made by it yet
    (tmp_path / "iter_2").mkdir()
    (tmp_path / "iter_2" / "prompts.jsonl").touch()
    with pytest.raises(RunConfigError, match=r"prompts\.generator: 'b' -> 'c'"):
        Run.open(tmp_path, with_generator("c"))
    lm = tiny.make_lm()
    with Run.open(tmp_path, with_generator("b")) as run:
        same_model(run.at("iter_0"), "generator", "b", lm)
    with Run.open(tmp_path, with_generator("c")) as run:
        same_model(run.at("iter_0"), "generator", "c", lm)
        with pytest.raises(StaleRecordsError, match="c now has the weights"):
            same_model(run.at("iter_0"), "generator", "c", tiny.make_lm(seed=1))


def test_batch_that_does_not_divide_is_refused_before_any_work(tmp_path: Path) -> None:
    lmlib.export(tiny.make_lm(), tmp_path / "model", dtype="float32")
    with (
        Run.open(tmp_path / "run", Config()) as run,
        pytest.raises(MeshError, match=r"second\.batch_size 4 .* do not divide over 8 devices"),
    ):
        begin(config(tmp_path / "model", EIGHT, dataclasses.replace(EIGHT, batch_size=4)), run)


def test_summary_has_one_line_per_iteration_and_the_base_apart(tmp_path: Path) -> None:
    lm, measured = tiny.make_lm(), {"quality": {"mean": 70.0, "ci95": [69.0, 71.0]}, "mean_length": 6.0, "moved": 0.5}
    cfg = SimpleNamespace(evaluate=lambda lm, cfg, it, context: measured | {"context": context})
    with Run.open(tmp_path / "run", Config()) as run:
        for t in ("base", 0, 1):
            found = report(cfg, run, run.at(f"x{t}"), t, lm, "c", figures=("moved", "other"), pairs=t, mean_length=1.0)
            assert found["context"] == "c"
        assert report(SimpleNamespace(evaluate=None), run, run.at("y"), 1, lm) == {}
        summary = run.summary
    assert summary["base"]["quality"]["mean"] == 70.0 and summary["base"]["iteration"] == "base"
    assert [line["iteration"] for line in summary["iterations"]] == [0, 1]
    assert summary["iterations"][0]["pairs"] == 0 and summary["iterations"][0]["moved"] == 0.5
    assert summary["iterations"][0]["mean_length"] == 6.0, "what was measured goes before what was counted"
    assert summary["iterations"][1]["quality"] is None and summary["iterations"][1]["fingerprint"] == lm.fingerprint


def test_complete_run_without_its_last_model_is_an_error(tmp_path: Path) -> None:
    cfg = dataclasses.replace(load_config(micro("self_rewarding")), iterations=1)
    with Run.open(tmp_path, cfg) as run:
        keep(tiny.make_lm(), run.at("iter_1"))
        run.update_summary({"status": "complete", "iterations": [{"iteration": 1}]})
    assert finish(cfg, tmp_path) is None
    shutil.rmtree(tmp_path / "iter_1" / "checkpoint" / "weights")
    with pytest.raises(LoadError, match=r"iteration|checkpoint"):
        finish(cfg, tmp_path)


def test_model_as_given_is_kept_once(tmp_path: Path) -> None:
    lm = tiny.make_lm()
    with Run.open(tmp_path / "run", Config()) as run:
        assert keep(lm, run.at("iter_0")) is lm
        saved = tmp_path / "run" / "iter_0" / "checkpoint" / "weights" / "jaxsi.json"
        first = saved.stat().st_mtime_ns
        keep(lm, run.at("iter_0"))
        assert saved.stat().st_mtime_ns == first
        assert lmlib.load(tmp_path / "run").fingerprint == lm.fingerprint


def test_lines_before_used_prompts_change_nothing(tmp_path: Path) -> None:
    """Without ids of their own, prompts are known by their content, since the numbers of their lines move."""
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}) + "\n" for text in ("one", "two", "three", "four")]
    file.write_text("".join(lines))
    used = next_part(PromptFile(path=str(file)), [], 2)
    assert [prompt.text for prompt in used] == ["one", "two"]
    file.write_text(json.dumps({"prompt": "new"}) + "\n" + "".join(lines))
    rest = next_part(PromptFile(path=str(file)), used, 1)
    assert [prompt.text for prompt in rest] == ["new", "three", "four"]


def test_used_prompts_have_to_stay_in_the_file_which_may_move(tmp_path: Path) -> None:
    file, moved = tmp_path / "prompts.jsonl", tmp_path / "elsewhere.jsonl"
    lines = [json.dumps({"id": text, "prompt": text}) + "\n" for text in ("one", "two", "three", "four")]
    file.write_text("".join(lines))
    used = next_part(PromptFile(path=str(file)), [], 2)
    moved.write_text("".join(lines))
    file.write_text("".join([lines[0], lines[1].replace('"two"}', '"too"}'), *lines[2:]]))
    with pytest.raises(RecordError) as caught:
        next_part(PromptFile(path=str(file)), used, 1)
    assert str(caught.value) == (
        f"{file}: this run has used 2 prompts, 1 of which are not in this file now; the first is 'two', 'two'. Put "
        "back what was removed or edited (added prompts are fine), or start a new run directory"
    )
    assert [prompt.text for prompt in next_part(PromptFile(path=str(moved)), used, 1)] == ["three", "four"]
    file.write_text("".join(lines[1:]))
    for repeat in (False, True):
        with pytest.raises(RecordError, match="the first is 'one'"):
            next_part(PromptFile(path=str(file), repeat=repeat), used, 1)
    added = [json.dumps({"id": text, "prompt": text}) + "\n" for text in ("Two", "Three")]
    file.write_text("".join([*added, *lines]))
    few = PromptFile(path=str(file), max_prompts=2)  # the added lines have moved the used ones beyond the limit
    assert [prompt.text for prompt in next_part(few, used, 1)] == ["Two", "Three"]


def test_prompts_come_from_a_file_or_a_function(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert [p.text for p in read_source(PromptFile(path=str(file), max_prompts=1))] == ["one"]
    assert [p.id for p in read_source(lambda: [Prompt.of("a", "x")])] == ["a"]
    with pytest.raises(ValueError, match="returned no prompts"):
        read_source(list)
    with pytest.raises(ValueError, match="1 ids more than once, the first is 'a'"):
        read_source(lambda: [Prompt.of("a", "x"), Prompt.of("a", "y")])
