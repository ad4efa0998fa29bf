"""Meta-Rewarding on the micro world: what its records hold, when the judge is trained, what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest
from micro_runs import micro, micro_run

from jaxsi.cli.command import UsageError
from jaxsi.cli.judges import with_judges
from jaxsi.methods.meta_rewarding import MetaPairs, PromptList
from jaxsi.methods.preflight import PreflightError, check
from jaxsi.runs.config_file import load_config
from jaxsi.runs.records import Judgment, PreferencePair, Prompt, RecordError, Response, read_jsonl
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.meta_judge import MetaJudgeConfig, contests

pytestmark = pytest.mark.xdist_group("meta_rewarding")  # the worker of all tests of its finished run

MICRO = micro("meta_rewarding")


@pytest.fixture(scope="module")
def whole() -> Path:
    return micro_run("meta_rewarding").whole


def counts(folder: Path) -> dict:
    return json.loads((folder / "judge_pairs_counts.json").read_text())


@pytest.mark.slow
def test_judge_is_trained_in_its_iterations_alone(whole):
    first, second, third = json.loads((whole / "summary.json").read_text())["iterations"]
    assert "judge_pairs" not in first and second["judge_pairs"] > 0 and third["judge_pairs"] == 0
    assert second["position_bias"] == 0.5 and 0 <= second["prefers_higher"] <= 1
    assert third["position_bias"] is None and not (whole / "iter_3" / "comparisons.jsonl").exists()
    trained = [json.loads((whole / f"iter_{t}" / "dpo_data.json").read_text())["pairs"] for t in (2, 3)]
    assert trained == [second["pairs"] + second["judge_pairs"], third["pairs"]]
    assert second["judge_pairs"] <= 0.15 * trained[0]
    assert all(line["judge_quality"]["pairs"] > 0 for line in (first, second, third))


@pytest.mark.slow
def test_judge_pairs_are_judgments_of_the_iterations_own_judge(whole):
    cfg, it = load_config(MICRO), whole / "iter_2"
    judgments = {j.id: j for j in read_jsonl(it / "judgments.jsonl", Judgment)}
    prompts, candidates = read_jsonl(it / "prompts.jsonl", Prompt), read_jsonl(it / "candidates.jsonl", Response)
    found = {c.request.id: c for c in contests(prompts, candidates, list(judgments.values()), cfg.rubric)}
    pairs = read_jsonl(it / "judge_pairs.jsonl", PreferencePair)
    assert counts(it)["contests"] == len(found) and counts(it)["pairs"] == len(pairs) > 0
    for pair in pairs:
        contest, judgment = found[pair.chosen.prompt_id], judgments[pair.chosen.prompt_id]
        assert pair.messages == contest.request.messages and pair.chosen_score > pair.rejected_score
        for side in (pair.chosen, pair.rejected):
            assert any(text.startswith(side.text) for text in judgment.texts)
            assert side.text[-1].isdigit()
        chosen, rejected = (
            abs(next(e.score for e in contest.entries if e.text == side.text) - judgment.score)
            for side in (pair.chosen, pair.rejected)
        )
        assert chosen < rejected


def test_settings_that_do_not_fit_are_refused(tmp_path):
    cfg = load_config(MICRO)
    one = dataclasses.replace(cfg.judge, num_samples=1)
    with pytest.raises(ValueError, match="a pair of judgments needs at least 2"):
        dataclasses.replace(cfg, judge=one)
    actor_alone = MetaPairs(meta=MetaJudgeConfig(judge_iterations=0))
    assert dataclasses.replace(cfg, judge=one, pairs=actor_alone).judge is one
    with pytest.raises(UsageError, match="needs one that gives each a score"):
        with_judges(cfg, tmp_path, judging=None, rubric="pairwise_judge", critic=None)
    word = "model:jaxsi/toyworld/careless_model"
    assert with_judges(cfg, tmp_path, judging=word, rubric=None, critic=None).judging.model in word


def test_lengths_and_supply_are_checked_before_any_work(tmp_path):
    cfg = load_config(MICRO)
    check(cfg, tmp_path)
    wordy = MetaPairs(meta=MetaJudgeConfig(judge=JudgeConfig(max_new_tokens=4096)))
    with pytest.raises(PreflightError, match=r"pairs\.meta\.judge\.max_new_tokens is 4096 .* leaves no room"):
        check(dataclasses.replace(cfg, pairs=wordy), tmp_path)
    with pytest.raises(RecordError, match="1 prompts for 2 iterations of new prompts"):
        check(dataclasses.replace(cfg, prompts=PromptList(("Sort A to Z: red cat",))), tmp_path)
