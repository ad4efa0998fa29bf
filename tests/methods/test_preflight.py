"""Input that is refused before any work, and before the run directory is touched."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxsi.lm import LoadError
from jaxsi.methods.preflight import check
from jaxsi.methods.self_rewarding import EarlyStop, PromptFile
from jaxsi.methods.srt import FirstStage
from jaxsi.methods.start import nothing_is_left
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config
from jaxsi.runs.records import Prompt, RecordError, write_jsonl

CONFIGS = Path(__file__).parents[2] / "configs"
TOY = load_config(CONFIGS / "self_rewarding" / "toy.py")
TOY = dataclasses.replace(TOY, mesh=MeshConfig(data=1, fsdp=8))


def test_toy_config_passes(tmp_path):
    check(TOY, tmp_path)


@pytest.mark.parametrize("section", ["judge", "prompts"])
def test_text_that_fills_all_positions_is_refused(section, tmp_path):
    cfg = dataclasses.replace(TOY, **{section: dataclasses.replace(getattr(TOY, section), max_new_tokens=99_999)})
    with pytest.raises(ValueError, match=rf"{section}\.max_new_tokens is 99999 .* no room for a prompt"):
        check(cfg, tmp_path)


def test_missing_generator_and_rows_beyond_the_positions_are_refused(tmp_path):
    with pytest.raises(LoadError, match="no such folder"):
        check(dataclasses.replace(TOY, prompts=dataclasses.replace(TOY.prompts, generator="./absent")), tmp_path)
    train = dataclasses.replace(TOY.dpo.train, max_length=99_999)
    with pytest.raises(ValueError, match=r"dpo\.train\.max_length is 99999"):
        check(dataclasses.replace(TOY, dpo=dataclasses.replace(TOY.dpo, train=train)), tmp_path)


def test_models_that_a_stage_borrows_are_looked_up_before_any_work(tmp_path):
    srt, seft = (dataclasses.replace(load_config(CONFIGS / name / "toy.py"), mesh=TOY.mesh) for name in ("srt", "seft"))
    for cfg in (
        dataclasses.replace(srt, first_stage=FirstStage(drafts="./absent")),
        dataclasses.replace(seft, internal=dataclasses.replace(seft.internal, drafts="./absent")),
        dataclasses.replace(seft, external=dataclasses.replace(seft.external, reviser="./absent")),
    ):
        with pytest.raises(LoadError, match=r"\./absent: no such folder"):
            check(cfg, tmp_path)


def test_too_long_early_stop_prompt_is_refused(tmp_path):
    stop = EarlyStop(prompts=lambda: [Prompt.of("long", "cat " * 5000)])
    with pytest.raises(RecordError, match=r"early_stop\.prompts: prompt 'long' has"):
        check(dataclasses.replace(TOY, early_stop=stop), tmp_path)


def test_raised_iterations_need_unused_prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"id": f"p{i}", "prompt": "Reverse: cat"}) + "\n" for i in range(2)))
    run = tmp_path / "run"
    for t in (2, 3):
        (run / f"iter_{t}").mkdir(parents=True)
        write_jsonl(run / f"iter_{t}" / "prompts.jsonl", [Prompt.of(f"p{t - 2}", "Reverse: cat")])
    (run / "summary.json").write_text('{"status": "complete"}')
    (run / "config.json").write_text('{"iterations": 3}')
    cfg = dataclasses.replace(TOY, prompts=PromptFile(path=str(file)))
    check(cfg, run)
    more = dataclasses.replace(cfg, iterations=4)
    assert nothing_is_left(run, cfg) and not nothing_is_left(run, more)
    with pytest.raises(RecordError, match=r"0 prompts for 1 iterations of new prompts \(2 are used\)"):
        check(more, run)
    check(dataclasses.replace(more, prompts=dataclasses.replace(cfg.prompts, repeat=True)), run)


def test_changed_prompts_are_refused_before_any_work(tmp_path):
    """Also by a method that reads its prompts once: the run has them, but the file is no longer theirs."""
    file, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    texts = ["Reverse: cat axe", "Reverse: dog pie", "Reverse: sun axe"]
    prompts = [Prompt.of(str(i), text) for i, text in enumerate(texts)]
    write_jsonl(file, prompts)
    (run / "iter_0").mkdir(parents=True)
    write_jsonl(run / "iter_0" / "prompts.jsonl", prompts)
    cfg = WithoutTraining(prompts=PromptFile(path=str(file)))
    check(cfg, run)
    write_jsonl(file, [Prompt.of("new", "Reverse: new"), *prompts])
    check(cfg, run)
    write_jsonl(file, [prompts[0], Prompt.of("1", "Reverse: dog"), prompts[2]])
    with pytest.raises(RecordError, match=r"prompts\.jsonl: this run has used 3 .* the first is '1'"):
        check(cfg, run)


def test_prompts_given_as_texts_are_checked_like_those_of_a_file(tmp_path):
    with pytest.raises(RecordError, match="prompts: 1 prompts for 2 iterations"):
        check(dataclasses.replace(TOY, prompts=["Reverse: cat"]), tmp_path)
    with pytest.raises(RecordError, match=r"prompts: prompt '1' has .* positions, .* takes .*max_length is"):
        check(dataclasses.replace(TOY, prompts=["Reverse: cat", "cat " * 5000]), tmp_path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithoutTraining:
    model: str = TOY.model
    prompts: PromptFile
    mesh: MeshConfig = TOY.mesh


def test_config_without_training_and_sampling_is_checked(tmp_path):
    file = tmp_path / "prompts.jsonl"
    write_jsonl(file, [Prompt.of("short", "Reverse: cat")])
    check(WithoutTraining(prompts=PromptFile(path=str(file))), tmp_path)
    write_jsonl(file, [Prompt.of("long", "cat " * 5000)])
    with pytest.raises(RecordError, match="prompt 'long' has"):
        check(WithoutTraining(prompts=PromptFile(path=str(file))), tmp_path)
