"""Judges on the command line: how they are named, and the commands that take one."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsi.cli import main as cli
from jaxsi.cli.command import UsageError
from jaxsi.cli.judges import critic_of, is_judge, judge_of
from jaxsi.lm import export, load
from jaxsi.runs.records import Improvement, Judgment, read_jsonl
from jaxsi.stages.critique import LocalCritic
from jaxsi.stages.endpoint import EndpointJudge
from jaxsi.stages.judges import ModelJudge, RewardJudge, Verifier
from jaxsi.training.reward import with_scalar_head

SEED_MODEL = Path(__file__).parents[2] / "jaxsi" / "toyworld" / "seed_model"
CACHE = Path("answers.jsonl")


def test_words_name_judges(tmp_path):
    assert judge_of("model:some/folder", CACHE) == judge_of("some/folder", CACHE) == ModelJudge("some/folder")
    assert judge_of("reward:r,batch_size=8", CACHE) == RewardJudge("r", batch_size=8)
    assert judge_of("verifier:a.jsonl,prompt=question", CACHE) == Verifier("a.jsonl", prompt="question")
    word = "endpoint:org/model-1,base_url=http://localhost:8000/v1,max_cost=2.5,prompt_price=1,sends_temperature=false"
    assert judge_of(word, CACHE) == EndpointJudge(
        model="org/model-1", base_url="http://localhost:8000/v1", cache="answers.jsonl", max_cost=2.5,
        prompt_price=1.0, sends_temperature=False,
    )  # fmt: skip
    assert judge_of("endpoint:m,cache=mine.jsonl", CACHE).cache == "mine.jsonl"
    assert critic_of("model:big,max_new_tokens=64", CACHE) == LocalCritic(model="big", max_new_tokens=64)
    (tmp_path / "reward:x").mkdir()
    assert is_judge("self") and is_judge("reward:x") and not is_judge("some/folder") and not is_judge("RUN@2")
    assert not is_judge(str(tmp_path / "reward:x"))


@pytest.mark.parametrize(
    ("word", "fault"),
    [
        ("model:", "nothing stands after model:"),
        ("endpoint:m,url=x", r"'url=x' is not a setting; it may have .*base_url"),
        ("endpoint:m,concurrency=many", "concurrency is 'many'; give a whole number"),
        ("endpoint:m,sends_temperature=maybe", "sends_temperature is 'maybe'; give true or false"),
        ("endpoint:m,concurrency=0", "concurrency is 0; the least is 1"),
        ("endpoint:m,max_cost=1", "both prices are 0"),
        ("function:mine.py", "give function:FILE.py:NAME"),
        ("function:absent.py:f", r"absent\.py: no such file"),
        ("function:{file}:g", r"has no function g\(\)"),
    ],
)
def test_wrong_words_are_refused_with_what_is_right(word, fault, tmp_path):
    (tmp_path / "mine.py").write_text("def f(prompt, response):\n    return 1.0\n")
    with pytest.raises(UsageError, match=fault):
        judge_of(word.format(file=tmp_path / "mine.py"), CACHE)


def command(capsys, *words) -> dict:
    assert cli.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_judge_and_best_of_n_take_judges_of_other_kinds(tmp_path, capsys):
    """A function judges, a file of known answers judges, a model compares in pairs; best-of-n goes by each."""
    (tmp_path / "mine.py").write_text("def longest(prompt, response):\n    return len(response)\n")
    prompts, responses = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    asked = ["Reverse: cat red axe", "Reverse: dog red axe"]
    rows = [{"id": str(i), "prompt": text, "answer": "axe red cat."} for i, text in enumerate(asked)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [("0", 0, "axe red cat."), ("1", 0, "dog."), ("0", 1, "cat."), ("1", 1, "axe red dog.")]
    answered = [{"prompt_id": p, "sample": n, "id": f"{p}#{n}", "text": text} for p, n, text in texts]
    responses.write_text("".join(json.dumps(row) + "\n" for row in answered))
    pairwise = tmp_path / "pairwise.txt"
    pairwise.write_text("Task: {prompt}\nA: {response_a}\nB: {response_b}\nVerdict:")
    given = ["--prompts", prompts, "--responses", responses]

    def judged(name: str, judge: str, *options) -> dict[str, float | None]:
        command(capsys, "judge", judge, *given, "-o", tmp_path / name, *options)
        return {judgment.id: judgment.score for judgment in read_jsonl(tmp_path / name, Judgment)}

    function = f"function:{tmp_path / 'mine.py'}:longest"
    assert judged("f.jsonl", function) == {"0#0": 12.0, "1#0": 4.0, "0#1": 4.0, "1#1": 12.0}
    assert judged("v.jsonl", f"verifier:{prompts}") == {"0#0": 1.0, "1#0": 0.0, "0#1": 0.0, "1#1": 0.0}
    reward_lm = with_scalar_head(load(SEED_MODEL, dtype="float32"))
    head = np.random.default_rng(0).normal(size=reward_lm.weights["score"].shape).astype(np.float32)
    reward_lm = dataclasses.replace(reward_lm, weights=reward_lm.weights | {"score": jnp.asarray(head)})
    export(reward_lm, tmp_path / "reward", dtype="float32")
    rewards = judged("r.jsonl", f"reward:{tmp_path / 'reward'}", "--dtype", "float32")
    assert list(rewards) == ["0#0", "1#0", "0#1", "1#1"] and len(set(rewards.values())) == 4
    options = ["--rubric", pairwise, "--expected", "--num-samples", 1, "--max-new-tokens", 1, "--dtype", "float32"]
    scores = judged("p.jsonl", str(SEED_MODEL), *options)
    assert list(scores) == ["0#0", "0#1", "1#0", "1#1"]  # by prompt: the responses to a prompt are judged together
    assert scores["0#0"] + scores["0#1"] == pytest.approx(1.0) and scores["0#0"] != 0.5

    few = ["--num-samples", 3, "--max-new-tokens", 8, "--dtype", "float32", "--rounds", 2, "--temperature", 1.5]
    for name, options in {
        "function": ["--critic", function],
        "pairs": ["--rubric", pairwise, "--judgments", 1, "--judge-tokens", 1, "--expected"],
    }.items():
        out = tmp_path / name
        command(capsys, "improve", "best-of-n", SEED_MODEL, "--prompts", prompts, "-o", out, *few, *options)
        rounds = [read_jsonl(out / f"round_{r}" / "responses.jsonl", Improvement) for r in range(3)]
        assert all(record.score is not None for record in rounds[2])
        if name == "function":
            for records in zip(*rounds, strict=True):
                assert records[2].score == max(records[1].score, records[2].score) == len(records[2].response.text)
    assert cli.main(["improve", "self-refine", str(SEED_MODEL), "--prompts", str(prompts), "-o", str(tmp_path / "x"),
                     "--judge", "self", "--rubric", "ranking_judge"]) == 2  # fmt: skip
    assert "--judge measures each response" in capsys.readouterr().err
