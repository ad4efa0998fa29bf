"""A file that a config names has changed between a kill and the resume: the run refuses it and names it, or it does not
matter, since the run has kept what was in it."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxsi.evals import held_out
from jaxsi.evals.held_out import Evaluations, HeldOutWinRate
from jaxsi.evals.ifeval import IFEval, InstructionChecks
from jaxsi.evals.judging import identity
from jaxsi.methods.lifecycle import early_stop_of
from jaxsi.methods.seeded import SeedData, next_prompts
from jaxsi.methods.seft import Stopping, held_out_prompts
from jaxsi.runs.config_snapshot import RunConfigError, check_config, describe_config, describe_settled, stored_as
from jaxsi.runs.records import Prompt, RankedResponses, RecordError, Response, SFTExample
from jaxsi.runs.run import Run
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.datasets import tulu2_mixture
from jaxsi.stages.early_stop import EarlyStop
from jaxsi.stages.judge import judge_by
from jaxsi.stages.judges import GapsBy, RewardsBy, ScoringBy, TargetsBy, Verifier
from jaxsi.stages.rankings import RankingFile
from jaxsi.stages.self_instruct import PromptFile, next_part
from jaxsi.stages.user_data import read_prompts


@stored_as("test.files.Config")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    part: Any = None
    seed: int = 0


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- refused ---------------------------------------------------------------------------------------------------------

NAMED: dict[str, tuple[str, Callable[[str], Any]]] = {
    "verifier": ("part.answers", Verifier),
    "checks": ("part.prompts", InstructionChecks),
    "scoring": ("part.judging.answers", lambda path: ScoringBy(judging=Verifier(path))),
    "targets": ("part.judging.answers", lambda path: TargetsBy(judging=Verifier(path))),
    "reward": ("part.judging.prompts", lambda path: RewardsBy(judging=InstructionChecks(path, partial=True))),
    "gaps": ("part.judging.answers", lambda path: GapsBy(judging=Verifier(path))),
    "early stop": ("part.judging.answers", lambda path: EarlyStop(prompts=list, judging=Verifier(path))),
    "evaluation": ("part.data", IFEval),
    "evaluations": ("part.parts.1.data", lambda path: Evaluations((HeldOutWinRate(), IFEval(path, most=3)))),
    "held out": ("part.parts.0.judging.answers", lambda p: Evaluations((HeldOutWinRate(judging=Verifier(p)),))),
    "settings": ("part.judging.answers", lambda path: {"judging": Verifier(path)}),
    "partial": ("part.kwargs.judging.answers", lambda path: functools.partial(rewarded, judging=Verifier(path))),
}


@stored_as("test.files.rewarded")
def rewarded(prompts: Any, responses: Any, judging: Any) -> Any:
    return None


@pytest.mark.parametrize("name", NAMED)
def test_a_file_that_is_read_again_and_again_may_move_but_not_change(name, tmp_path):
    field, part = NAMED[name]
    path = Path(written(tmp_path / "known.jsonl", {"prompt": "2 + 2", "answer": "4"}))
    run, moved = tmp_path / "run", tmp_path / "elsewhere.jsonl"
    Run.open(run, Config(part=part(str(path)))).close()
    Run.open(run, Config(part=part(str(path)))).close()
    shutil.move(path, moved)
    Run.open(run, Config(part=part(str(moved)))).close()
    assert str(moved) in (run / "config.json").read_text()
    moved.write_text(moved.read_text().replace('"4"', '"5"'))
    with pytest.raises(RunConfigError) as caught:
        Run.open(run, Config(part=part(str(moved))))
    [difference] = caught.value.differences
    assert difference.startswith(f"{field}: the content of {moved} has changed (sha256 ")
    now = moved.read_text()
    moved.unlink()  # what needs it says so, if anything does
    Run.open(run, Config(part=part(str(moved)))).close()
    with pytest.raises(RunConfigError, match=r"known\.jsonl'"):
        Run.open(run, Config(part=part(str(path))))
    moved.write_text(now)
    with pytest.raises(RunConfigError, match="has changed"):
        Run.open(run, Config(part=part(str(moved))))
    moved.write_text(now.replace('"5"', '"4"'))
    Run.open(run, Config(part=part(str(moved)))).close()


def test_files_of_a_folder_are_compared(tmp_path):
    folder = tmp_path / "answers"
    folder.mkdir()
    written(folder / "a.jsonl", {"prompt": "a", "answer": "1"})
    Run.open(tmp_path / "run", Config(part=Verifier(str(folder)))).close()
    written(folder / "b.jsonl", {"prompt": "b", "answer": "1"})
    with pytest.raises(RunConfigError, match=r"part\.answers: the content of .*answers has changed"):
        Run.open(tmp_path / "run", Config(part=Verifier(str(folder))))


def test_run_stored_without_hashes_resumes_and_keeps_them_from_then_on(tmp_path):
    path = written(tmp_path / "known.jsonl", {"prompt": "a", "answer": "1"})
    cfg = Config(part=Verifier(path))
    stored = describe_config(cfg)
    assert "files" not in stored and describe_settled(cfg)["files"].keys() == {"part.answers"}
    check_config(tmp_path, stored, cfg)
    other = written(tmp_path / "other.jsonl", {"prompt": "a", "answer": "1"})
    with pytest.raises(RunConfigError, match=r"part\.answers: "):
        check_config(tmp_path, stored, Config(part=Verifier(other)))
    run = tmp_path / "run"
    Run.open(run, cfg).close()
    (run / "config.json").write_text(json.dumps(stored))
    Run.open(run, cfg).close()
    written(tmp_path / "known.jsonl", {"prompt": "a", "answer": "2"})
    with pytest.raises(RunConfigError, match="has changed"):
        Run.open(run, cfg)


def test_answers_about_another_file_are_asked_anew(tmp_path):
    path = written(tmp_path / "known.jsonl", {"prompt": "a", "answer": "1"})
    judges = (Verifier(path), InstructionChecks(path))
    before = [identity(judge) for judge in judges]
    written(tmp_path / "known.jsonl", {"prompt": "a", "answer": "2"})
    assert all(a != b for a, b in zip(before, map(identity, judges), strict=True))


def test_a_changed_file_is_read_again_in_the_same_process(tmp_path):
    path = tmp_path / "known.jsonl"
    prompts, responses = [Prompt.of("x", "a")], [Response.of("x#0", "x", 0, "1")]
    for answer, score in (("1", 1.0), ("2", 0.0), ("10", 0.0), ("1", 1.0)):
        judge = Verifier(written(path, {"prompt": "a", "answer": answer}))
        assert [judgment.score for judgment in judge(None, prompts, responses)] == [score]


def test_parts_in_a_tuple_are_compared_field_by_field(tmp_path):
    cfg = Config(part=Evaluations((HeldOutWinRate(most=3), IFEval("none.jsonl", most=3))))
    stored = json.loads(json.dumps(describe_config(cfg)))
    del stored["part"]["parts"][0]["most"], stored["part"]["parts"][1]["without_nltk_data"]
    with pytest.raises(RunConfigError) as caught:
        check_config(tmp_path, stored, cfg)
    assert caught.value.differences == ("part.parts.0.most: None -> 3",), "a newer field counts as its default"
    fewer = Config(part=Evaluations((HeldOutWinRate(most=3),)))
    with pytest.raises(RunConfigError, match=r"part\.parts\.1\.data: 'none\.jsonl' -> \(absent\)"):
        check_config(tmp_path, describe_config(cfg), fewer)


def test_dtype_auto_in_a_tuple_is_decided_before_the_run(tmp_path):
    cfg = Config(part=Evaluations((IFEval("none.jsonl", sampling=SamplingConfig(dtype="auto")),)))
    with pytest.raises(RunConfigError, match=r'part\.parts\.0\.sampling\.dtype is "auto"'):
        Run.open(tmp_path / "run", cfg)
    from jaxsi.model.compute_dtype import settled

    with Run.open(tmp_path / "run", ready := settled(cfg, tmp_path / "run")):
        assert ready.part.parts[0].sampling.dtype in ("float32", "bfloat16")
    Run.open(tmp_path / "run", settled(cfg, tmp_path / "run")).close()


# ---- kept by the run -------------------------------------------------------------------------------------------------


def rows(*texts: str) -> list[dict[str, Any]]:
    return [{"id": str(i), "prompt": text} for i, text in enumerate(texts)]


def reading(path: str) -> Callable[[], list[Prompt]]:
    return functools.partial(read_prompts, path)


def test_prompts_of_win_rates_are_those_of_the_beginning(tmp_path, monkeypatch):
    path = written(tmp_path / "prompts.jsonl", *rows("one", "two"))
    monkeypatch.setattr(held_out, "with_room", lambda lm, prompts, longest: prompts)
    seen: list[list[str]] = []

    def respond(prompts: list[Prompt], *_: object) -> list[Response]:
        seen.append([prompt.text for prompt in prompts])
        return [Response.of(f"{p.id}#0", p.id, 0, p.text) for p in prompts]

    evaluation = HeldOutWinRate(prompts=reading(path), judging=judge_by(lambda p, r: len(r)), respond=respond)
    cfg = SimpleNamespace(sampling=SamplingConfig(), model="given")
    model: Any = SimpleNamespace(fingerprint="f", tokenizer=SimpleNamespace(template_hash="t"))
    with Run.open(tmp_path / "run", Config()) as run:
        run.update_summary({"iterations": []})
        evaluation(model, cfg, run.at("iter_0"))
        run.update_summary({"iterations": [{"iteration": 0}]})
        written(tmp_path / "prompts.jsonl", *rows("two", "one"))
    with Run.open(tmp_path / "run", Config()) as run:
        figures = evaluation(model, cfg, run.at("iter_1"))
    assert seen == [["one", "two"]] * 2
    assert figures["evals"]["held-out"]["over_first"]["mean"] == 0.5


def test_held_out_prompts_of_methods_are_those_of_the_beginning(tmp_path):
    path = written(tmp_path / "prompts.jsonl", *rows("one", "two"))
    own = written(tmp_path / "own.jsonl", *rows("One", "three", "four"))
    methods = SimpleNamespace(
        early_stop=EarlyStop(prompts=reading(path)), stop=Stopping(held_out=reading(path)),
        seed_data=SeedData(held_out=reading(path)), prompts=PromptFile(path=own), iterations=3,
    )  # fmt: skip
    for _ in range(2):
        with Run.open(tmp_path / "run", Config()) as run:
            stop = early_stop_of(methods, run)
            assert stop is not None and [prompt.text for prompt in stop.prompts()] == ["one", "two"]
            assert [prompt.text for prompt in held_out_prompts(methods.stop, run)] == ["one", "two"]
            assert [p.text for p in next_prompts(methods, None, run, 2)[0]] == ["three"]  # type: ignore[arg-type]
        written(tmp_path / "prompts.jsonl", *rows("three", "four"))


SETS = {
    "rankings": (RankingFile, {"prompt": "p", "responses": ["good", "bad"]}, RankedResponses),
    "data set": (
        lambda path: functools.partial(tulu2_mixture, path),
        {"id": "a", "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "good"}]},
        SFTExample,
    ),
}


@pytest.mark.parametrize("kind", SETS)
def test_human_data_are_those_of_the_beginning(kind, tmp_path):
    """As the methods take them: in a stage."""
    source, row, record = SETS[kind]
    path = written(tmp_path / "data.jsonl", row)
    found = []
    for _ in range(2):
        with Run.open(tmp_path / "run", Config()) as run:  # a function of the config file calls the source
            found.append(run.at("iter_0").records("data", source(path), of=record))
        written(tmp_path / "data.jsonl", json.loads(json.dumps(row).replace("good", "evil")))
    assert found[0] == found[1] and "good" in str(found[0])


def test_prompts_of_a_function_that_a_run_has_used_have_to_stay(tmp_path):
    path = written(tmp_path / "prompts.jsonl", *rows("one", "two", "three"))
    used = next_part(reading(path), [], 3)
    written(tmp_path / "prompts.jsonl", *rows("one", "two", "three", "more"))
    assert [prompt.text for prompt in next_part(reading(path), used, 1)] == ["two", "three", "more"]
    written(tmp_path / "prompts.jsonl", *rows("uno", "two", "three"))
    with pytest.raises(RecordError, match=r"prompts\.jsonl.*1 of which are not among its prompts now.*'one'"):
        next_part(reading(path), used, 1)
