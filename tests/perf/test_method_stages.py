"""The stages of each shipped config, compared with the description of its method."""

import dataclasses
from pathlib import Path

import pytest

from jaxsi.evals.held_out import Evaluations, HeldOutWinRate
from jaxsi.evals.ifeval import IFEval
from jaxsi.methods.seft import Round
from jaxsi.methods.srt import FirstStage
from jaxsi.perf.architectures import published
from jaxsi.perf.method_stages import iterations, stages
from jaxsi.perf.planned_stages import Assumptions, Sampling, Scoring, Training
from jaxsi.runs.config_file import load_config
from jaxsi.stages.early_stop import EarlyStop
from jaxsi.stages.judges import ModelJudge
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.reviser import revise
from jaxsi.stages.self_instruct import PromptFile

CONFIGS = Path(__file__).parents[2] / "configs"
REAL = sorted(path for path in CONFIGS.rglob("*.py") if not path.stem.startswith("toy"))
ASSUMPTIONS = Assumptions(prompts=600, examples=300, prompt_tokens=200)


def stages_of(name: str, assumptions: Assumptions = ASSUMPTIONS, **changes) -> dict:
    """The stages of a config by name."""
    cfg = dataclasses.replace(load_config(CONFIGS / name), **changes)
    found = stages(cfg, assumptions, published(cfg.model).max_positions)
    by_name = {stage.name: stage for stage in found}
    assert len(by_name) == len(found)
    return by_name


def test_self_rewarding_stages_count_candidates_judgments_and_pairs():
    by_name = stages_of("self_rewarding/llama2_70b_v5p128.py")
    assert list(by_name)[:5] == ["sft", "new prompts", "candidates", "judgments", "dpo"]
    candidates, judgments, dpo = by_name["candidates"], by_name["judgments"], by_name["dpo"]
    assert (candidates.prompts, candidates.samples, candidates.new_tokens) == (8000, 4, 1024)
    assert (judgments.prompts, judgments.samples, judgments.new_tokens) == (8000 * 4, 3, 512)
    assert judgments.prompt_tokens == 200 + 1024 and judgments.shared_tokens > 100  # prompt and response; the rubric
    assert dpo.steps == 8000 / 16
    assert [stage.each for stage in by_name.values()][:2] == [False, True]
    assert iterations(load_config(CONFIGS / "self_rewarding/llama2_70b_v5p128.py")) == 2


def test_evaluation_and_early_stopping_compare_two_responses_in_both_orders():
    by_name = stages_of("self_rewarding/qwen3_0p6b_1gpu.py")
    responses, judgments = by_name["evaluation: responses"], by_name["evaluation: judgments"]
    assert (responses.prompts, responses.samples, responses.each) == (66, 1, True)
    assert (judgments.prompts, judgments.samples) == (66 * 2 * 2, 1), "over two models, in both orders"
    assert judgments.prompt_tokens == 200 + 2 * responses.new_tokens
    assert stages_of("self_rewarding/smollm2_cpu.py")["evaluation: responses"].prompts == 6
    assert "evaluation: responses" not in stages_of("self_rewarding/smollm2_cpu.py", evaluate=None)
    for most, prompts in ((None, 541), (64, 64)):
        both = Evaluations((HeldOutWinRate(), IFEval("absent.jsonl", most=most)))
        assert stages_of("self_rewarding/qwen3_0p6b_1gpu.py", evaluate=both)["IFEval: responses"].prompts == prompts
    paper = stages_of("self_rewarding/llama2_70b_v5p128.py")
    assert paper["early stop: judgments"].prompt_tokens == 200 + 2 * 1024
    stop = EarlyStop(prompts=list, rubric=load_rubric(), checkpoints=False)
    spin = stages_of("spin/tulu2_7b_v5e64.py", early_stop=stop)
    assert spin["early stop: judgments"].prompt_tokens == 200 + 512, "each response by itself"
    other = dataclasses.replace(stop, judging=ModelJudge("other"))
    assert "early stop: judgments" not in stages_of("spin/tulu2_7b_v5e64.py", early_stop=other)


def test_dtype_auto_is_bfloat16_on_the_hardware_of_a_plan():
    cfg = load_config(CONFIGS / "srt/qwen3_4b_1xh200.py")
    assert cfg.sampling.dtype == cfg.sft.dtype == cfg.critic.dtype == "auto"
    found = stages(cfg, ASSUMPTIONS, published(cfg.model).max_positions)
    assert {s.settings.dtype if isinstance(s, Training) else s.dtype for s in found} == {"bfloat16"}
    exact = dataclasses.replace(cfg, sampling=dataclasses.replace(cfg.sampling, dtype="float32"))
    found = stages(exact, ASSUMPTIONS, published(cfg.model).max_positions)
    assert {s.dtype for s in found if isinstance(s, Sampling) and s.model is None} == {"float32"}


def test_prompts_of_a_file_are_divided_among_iterations(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n' * 50, encoding="utf-8")
    name = "self_rewarding/qwen3_0p6b_1gpu.py"
    assert stages_of(name, prompts=PromptFile(path=str(path)))["candidates"].prompts == 25
    assert stages_of(name, prompts=PromptFile(path=str(path), max_prompts=20))["candidates"].prompts == 10
    assert stages_of(name, prompts=PromptFile(path=str(path), repeat=True))["candidates"].prompts == 50
    assert stages_of(name, prompts=PromptFile(path="absent.jsonl"))["candidates"].prompts == 600


def test_expected_scores_are_a_scoring_stage():
    scores = stages_of("self_rewarding/qwen3_0p6b_1gpu.py")["expected scores"]
    assert isinstance(scores, Scoring) and scores.rows == 600 * 4 * 3


def test_meta_judge_compares_every_two_judgments_in_both_orders():
    name = "meta_rewarding/qwen3_0p6b_1gpu.py"
    by_name = stages_of(name)
    judging = ["candidates", "judgments", "expected scores", "comparisons", "expected verdicts"]
    assert list(by_name) == [*judging, "dpo", "evaluation: responses", "evaluation: judgments"]
    judgments, comparisons = by_name["judgments"], by_name["comparisons"]
    assert (judgments.prompts, judgments.samples) == (600 * 7, 11)
    assert (comparisons.prompts, comparisons.samples) == (600 * 11 * 10, 1)
    assert comparisons.prompt_tokens > judgments.prompt_tokens + 2 * judgments.new_tokens
    assert by_name["dpo"].steps == -(-round(600 / 0.85) // 16)
    alone = dataclasses.replace(load_config(CONFIGS / name).pairs.meta, judge_iterations=0)
    actor = stages_of(name, pairs=dataclasses.replace(load_config(CONFIGS / name).pairs, meta=alone))
    assert "comparisons" not in actor and actor["dpo"].steps == -(-600 // 16)
    assert iterations(load_config(CONFIGS / name)) == 4


def test_fill_shortens_responses():
    half = stages_of("self_rewarding/llama2_70b_v5p128.py", dataclasses.replace(ASSUMPTIONS, fill=0.5))
    assert half["candidates"].new_tokens == 512 and half["judgments"].prompt_tokens == 200 + 512


def test_srt_stages_use_the_critic_once_then_the_model_itself():
    by_name = stages_of("srt/tulu2_7b_8xh100.py")
    assert list(by_name)[:6] == ["drafts of the base", "sft", "drafts", "critiques", "checks", "dpo"]
    assert [stage.each for stage in by_name.values()][:6] == [False, False, True, True, True, True]
    assert by_name["drafts of the base"].prompts == 25_000


def test_steps_and_warm_up_are_those_of_the_paper():
    """22,000 records of SRT's stage 1 in batches of 32, five epochs, 10 % warm-up; 3,200 + 1,630 of Self-Rewarding in
    batches of 16. TPUs once had a sixth of these steps, since a batch counted packed rows."""
    paper = load_config(CONFIGS / "srt/tulu2_7b_8xh100.py")
    sft = stages_of("srt/tulu2_70b_v5p128.py", critic_prompts=22_000)["sft"]
    assert (sft.steps, sft.settings.batch_size) == (5 * 688, paper.sft.batch_size) and sft.warmup_share == 0.1
    sft = stages_of("self_rewarding/llama2_70b_v5p128.py", Assumptions(examples=2415))["sft"]
    assert (sft.steps, sft.warmup_share) == (302, 0)


def test_stages_with_a_borrowed_model_name_it():
    first = FirstStage(drafts="allenai/tulu-2-7b", rounds=3)
    by_name = stages_of("srt/qwen3_4b_1xh200.py", first_stage=first)
    assert by_name["drafts of another model"].model == "allenai/tulu-2-7b"
    critiques, checks = by_name["critiques of the critic"], by_name["checks of the critic"]
    assert checks.prompts == 3 * critiques.prompts and checks.new_tokens == critiques.new_tokens
    lent = Round(target=revise, drafts="WRITER", reviser="STRONGER")
    by_name = stages_of("seft/nectar_8b_8xh100.py", external=lent)
    assert (by_name["drafts"].model, by_name["revisions"].model) == ("WRITER", "STRONGER")
    own = stages_of("seft/nectar_8b_8xh100.py")
    assert own["revisions"].model is None and own["revisions"].held.copies < by_name["revisions"].held.copies


def test_pit_stages_hold_all_models_during_rl():
    by_name = stages_of("pit/llama3_8b_hh_8xh100.py")
    updates, responses = by_name["rl: updates"], by_name["rl: responses"]
    assert isinstance(updates, Training) and updates.steps == 400 and updates.objective == "rl"
    assert isinstance(responses, Sampling) and responses.prompts == 400 * 128 and responses.samples == 4
    assert responses.held.models == updates.held.models + 3  # sampling does not take the training state as an argument


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_stages_of_shipped_configs_fit_the_models_positions(path):
    cfg = load_config(path)
    positions = published(cfg.model).max_positions
    found = stages(cfg, Assumptions(), positions)
    assert any(stage.each for stage in found) and iterations(cfg) >= 1
    for stage in found:
        match stage:
            case Sampling():
                assert stage.shared_tokens + stage.prompt_tokens + stage.new_tokens <= positions
                assert min(stage.prompts, stage.samples, stage.prompt_tokens, stage.new_tokens) >= 1
            case Scoring() | Training():
                assert 1 <= stage.length <= positions


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"fill": 0.0}, {"fill": 1.5}, {"prompt_tokens": -1}])
def test_assumptions_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1, and fill"):
        Assumptions(**wrong)
