"""The embedded world's seed data and the judges of its control arms."""

from collections import defaultdict

import jax
import numpy as np
import pytest

import tiny
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Judgment, Prompt
from jaxsi.stages import judge
from jaxsi.stages.judge import JudgeConfig
from jaxsi.toyworld import seed_data, world
from jaxsi.toyworld.corpus import RUBRIC

CFG = JudgeConfig(num_samples=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def lm():
    return tiny.make_lm()


def answered(lm, texts):
    """A prompt of the world and one response for each text."""
    prompt = Prompt.of("p", "Reverse: cat red axe")
    return [prompt], [
        tiny.response(prompt, n, [*lm.tokenizer.encode_text(text), lm.tokenizer.eos_id]) for n, text in enumerate(texts)
    ]


def test_seed_data_is_repeatable_and_for_training():
    ift, rankings = seed_data.toy_ift(), seed_data.toy_rankings()
    test = [record.messages[0]["content"] for record in seed_data.toy_judge_test()]
    assert len(set(test)) == 100 and all(map(world.is_held_out, test))
    assert (ift, rankings) == (seed_data.toy_ift(), seed_data.toy_rankings())
    texts = [record.messages[-1]["content"] for record in (*ift, *rankings)]
    assert len(ift) == 256
    assert len(rankings) == 128
    assert not any(world.is_held_out(text) for text in texts)


def test_exact_judge_gives_half_the_grade(lm):
    prompts, responses = answered(lm, ["axe red cat.", "axe red cat", "cat red axe."])
    judgments = seed_data.exact_judge(lm, prompts, responses, RUBRIC, CFG, jax.random.key(0))
    grades = [world.grade(prompts[0].text, response.text).total for response in responses]
    assert grades[0] == 10
    assert [judgment.score for judgment in judgments] == [grade / 2 for grade in grades]
    assert [judgment.id for judgment in judgments] == [response.id for response in responses]
    assert all(judgment.scores == (judgment.score,) * 2 for judgment in judgments)
    assert all(judgment.fingerprint == lm.fingerprint for judgment in judgments)


def test_exact_judge_gives_no_score_outside_the_world(lm):
    prompt = Prompt.of("x", "Tell me a joke")
    response = tiny.response(prompt, 0, [*lm.tokenizer.encode_text("cat."), lm.tokenizer.eos_id])
    (judgment,) = seed_data.exact_judge(lm, [prompt], [response], RUBRIC, CFG, jax.random.key(0))
    assert judgment.score is None
    assert judgment.scores == (None, None)


def test_permuted_judge_shuffles_the_same_scores(lm, monkeypatch):
    prompts = [Prompt.of(f"p{i}", "Reverse: cat red axe") for i in range(20)]
    responses = [tiny.response(prompt, n, [20 + n, lm.tokenizer.eos_id]) for prompt in prompts for n in range(4)]

    def judge_in_order(lm, prompts, responses, rubric, cfg, key):
        exact = seed_data.exact_judge(lm, prompts, responses, rubric, cfg, key)
        return [Judgment(**{**vars(j), "score": float(i % 4), "scores": (float(i % 4),)}) for i, j in enumerate(exact)]

    monkeypatch.setattr(judge, "judge", judge_in_order)
    shuffled = seed_data.permuted_judge(lm, prompts, responses, RUBRIC, CFG, jax.random.key(0))
    groups = defaultdict(list)
    for judgment in shuffled:
        groups[judgment.prompt_id].append(judgment.score)
    assert [judgment.id for judgment in shuffled] == [response.id for response in responses]
    assert all(sorted(scores) == [0.0, 1.0, 2.0, 3.0] for scores in groups.values())
    firsts = np.asarray([scores[0] for scores in groups.values()])
    assert len(set(firsts)) > 1  # not the order in which they came
    other = seed_data.permuted_judge(lm, prompts, responses, RUBRIC, CFG, fold(jax.random.key(0), "iter_3"))
    assert [j.score for j in other] != [j.score for j in shuffled]  # another iteration, another permutation
    half = seed_data.permuted_judge(lm, prompts[:10], responses[:40], RUBRIC, CFG, jax.random.key(0))
    assert half == shuffled[:40]  # a shard gets the same scores as in the whole
