"""The frame around a method's iterations: the model as given, and the lines of summary.json."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import tiny
from jaxsi import lm as lmlib
from jaxsi.methods.lifecycle import begin, keep, report
from jaxsi.model.mesh import MeshConfig, MeshError
from jaxsi.runs.records import Prompt
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


def test_prompts_come_from_a_file_or_a_function(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert [p.text for p in read_source(PromptFile(path=str(file), max_prompts=1))] == ["one"]
    assert [p.id for p in read_source(lambda: [Prompt.of("a", "x")])] == ["a"]
    with pytest.raises(ValueError, match="returned no prompts"):
        read_source(list)
    with pytest.raises(ValueError, match="1 ids more than once, the first is 'a'"):
        read_source(lambda: [Prompt.of("a", "x"), Prompt.of("a", "y")])
