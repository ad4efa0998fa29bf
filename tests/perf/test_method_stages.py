"""The stages of each shipped config, against the words of its method."""

import dataclasses
from pathlib import Path

import pytest

from jaxsi.perf.architectures import published
from jaxsi.perf.method_stages import Assumed, Sampling, Scoring, Training, iterations, stages
from jaxsi.runs.config_file import load_config
from jaxsi.stages.self_instruct import PromptFile

CONFIGS = Path(__file__).parents[2] / "configs"
REAL = sorted(path for path in CONFIGS.rglob("*.py") if not path.stem.startswith("toy"))
ASSUMED = Assumed(prompts=600, examples=300, prompt_tokens=200)


def of(name: str, assumed: Assumed = ASSUMED, **changes) -> dict:
    cfg = dataclasses.replace(load_config(CONFIGS / name), **changes)
    made = stages(cfg, assumed, published(cfg.model).max_positions, packs=True)
    named = {stage.name: stage for stage in made}
    assert len(named) == len(made)
    return named


def test_self_rewarding_counts_candidates_judgments_and_pairs():
    named = of("self_rewarding/llama2_70b_v5p128.py")
    assert list(named)[:5] == ["sft", "new prompts", "candidates", "judgments", "dpo"]
    candidates, judgments, dpo = named["candidates"], named["judgments"], named["dpo"]
    assert (candidates.prompts, candidates.samples, candidates.new_tokens) == (8000, 4, 1024)
    assert (judgments.prompts, judgments.samples, judgments.new_tokens) == (8000 * 4, 3, 512)
    assert judgments.prompt_tokens == 200 + 1024 and judgments.shared_tokens > 100  # prompt and response; the rubric
    assert dpo.steps == 8000 / 16
    assert [stage.each for stage in named.values()][:2] == [False, True]
    assert iterations(load_config(CONFIGS / "self_rewarding/llama2_70b_v5p128.py")) == 2


def test_a_file_of_prompts_is_counted_and_shared_among_the_iterations(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n' * 50, encoding="utf-8")
    name = "self_rewarding/qwen3_0p6b_1gpu.py"
    assert of(name, prompts=PromptFile(path=str(path)))["candidates"].prompts == 25
    assert of(name, prompts=PromptFile(path=str(path), max_prompts=20))["candidates"].prompts == 10
    assert of(name, prompts=PromptFile(path=str(path), repeat=True))["candidates"].prompts == 50
    assert of(name, prompts=PromptFile(path="absent.jsonl"))["candidates"].prompts == 600


def test_expected_scores_are_scored():
    scores = of("self_rewarding/qwen3_0p6b_1gpu.py")["expected scores"]
    assert isinstance(scores, Scoring) and scores.rows == 600 * 4 * 3


def test_responses_shorter_than_their_limit():
    half = of("self_rewarding/llama2_70b_v5p128.py", dataclasses.replace(ASSUMED, fill=0.5))
    assert half["candidates"].new_tokens == 512 and half["judgments"].prompt_tokens == 200 + 512


def test_srt_learns_from_the_critic_once_then_from_itself():
    named = of("srt/tulu2_7b_8xh100.py")
    assert list(named) == ["drafts of the base", "sft", "drafts", "critiques", "checks", "dpo"]
    assert [stage.each for stage in named.values()] == [False, False, True, True, True, True]
    assert named["drafts of the base"].prompts == 25_000


def test_pit_reinforces_with_all_its_models_held():
    named = of("pit/llama3_8b_hh_8xh100.py")
    updates, responses = named["rl: updates"], named["rl: responses"]
    assert isinstance(updates, Training) and updates.steps == 400 and updates.objective == "rl"
    assert isinstance(responses, Sampling) and responses.prompts == 400 * 128 and responses.samples == 4
    assert responses.held.models == updates.held.models + 3  # the training state is no argument of sampling


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_has_stages_within_the_models_positions(path):
    cfg = load_config(path)
    positions = published(cfg.model).max_positions
    made = stages(cfg, Assumed(), positions, packs=True)
    assert any(stage.each for stage in made) and iterations(cfg) >= 1
    for stage in made:
        match stage:
            case Sampling():
                assert stage.shared_tokens + stage.prompt_tokens + stage.new_tokens <= positions
                assert min(stage.prompts, stage.samples, stage.prompt_tokens, stage.new_tokens) >= 1
            case Scoring() | Training():
                assert 1 <= stage.length <= positions


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"fill": 0.0}, {"fill": 1.5}, {"prompt_tokens": -1}])
def test_assumptions_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1, fill"):
        Assumed(**wrong)
