"""The world of checked requests: what is held out, that rules mend what checkers miss, critics, judges and controls."""

import random
from pathlib import Path

import jax
import pytest

from jaxsi.checkedworld import world
from jaxsi.checkedworld.constraints import KINDS, fit
from jaxsi.checkedworld.critic import TEMPLATE, exact_critic, stray_critic
from jaxsi.checkedworld.data import GradedDrafts, shuffled_verifier, verifier
from jaxsi.checkedworld.evaluate import quality
from jaxsi.checkedworld.requests import HELD_OUT, TRAINING
from jaxsi.evals.ifeval import read_instructed
from jaxsi.runs.records import Response
from jaxsi.stages.critique import has_all_parts
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.verdicts import JudgeConfig

IFEVAL = Path(__file__).parents[3] / "shared" / "data" / "ifeval" / "data.json.gz"
TEXTS = (
    "Sure, here is a walk in the rain. It falls softly, and very few people can see it.\n\n1. **Bring an umbrella**: "
    "you will stay dry.\n2. Wear boots, because puddles are everywhere.",
    "A short answer, which is in one sentence.",
    'The wind blows over the hills - and the sea.\n\n- one thing\n- another thing [here]\n\n"Good night", she said.',
)


def test_sets_share_no_request_and_no_combination_of_kinds():
    assert not set(TRAINING) & set(HELD_OUT)
    assert len(set(TRAINING)) == len(TRAINING) and len(set(HELD_OUT)) == len(HELD_OUT)
    assert not any("," in request for request in TRAINING + HELD_OUT)
    kinds = {split: {frozenset(k) for k in world.combinations(split)} for split in ("training", "held_out")}
    assert not kinds["training"] & kinds["held_out"]
    for split, requests in (("training", TRAINING), ("held_out", HELD_OUT)):
        tasks = world.tasks(split)
        assert {task.request for task in tasks} == set(requests)
        assert {frozenset(kind for kind, _ in task.constraints) for task in tasks} <= kinds[split]
        assert len({task.text for task in tasks}) == len(tasks)
        assert all(fit(tuple(kind for kind, _ in task.constraints)) for task in tasks)
    assert {kind for task in world.tasks("held_out") for kind, _ in task.constraints} == set(KINDS)
    assert (len(world.tasks("training")), len(world.tasks("held_out"))) == (720, 200)


@pytest.mark.skipif(not IFEVAL.is_file(), reason="IFEval's prompts are not here")
def test_no_request_is_in_a_prompt_of_ifeval():
    prompts = [prompt.prompt.lower() for prompt in read_instructed(IFEVAL)]
    assert not [r for r in TRAINING + HELD_OUT if any(r.lower().rstrip(".") in prompt for prompt in prompts)]


# ------------------------------------------------------------------------------------------- with IFEval's checkers


@pytest.fixture
def checkers():
    pytest.importorskip("lm_eval", reason="the checkers need lm-eval: pip install 'jaxsi[ifeval]'")
    pytest.importorskip("langdetect", reason="the checkers need langdetect: pip install 'jaxsi[ifeval]'")


def response(task, text, number=0):
    return Response.of(f"{task.id}#{number}", task.id, number, text)


def test_rules_mend_what_a_response_misses(checkers):
    rng = random.Random(0)
    left = []
    tasks = rng.sample(world.tasks("training"), 120) + rng.sample(world.tasks("held_out"), 60)
    for task in tasks:
        for text in TEXTS:
            better = world.mended(task, text)
            assert world.grade(task, better) >= world.grade(task, text)
            left += [k for (k, _), met in zip(task.constraints, world.met(task, better), strict=True) if not met]
    mended = [kind for kind in left if kind not in ("language", "small letters", "capital letters")]
    assert len(mended) <= 0.02 * sum(len(task.constraints) for task in tasks) * len(TEXTS)


def test_a_response_that_meets_all_stays_as_it_is(checkers):
    task = next(t for t in world.tasks("training") if [k for k, _ in t.constraints] == ["no commas"])
    assert world.mended(task, "Fine as it is.") == "Fine as it is."
    assert (world.grade(task, "Fine as it is."), world.grade(task, "Not fine, as it is.")) == (1, 0)


def test_critics_write_what_the_template_reads(checkers):
    prompts = world.prompts("training")[:40]
    responses = [response(task, TEXTS[i % 3]) for i, task in enumerate(world.tasks("training")[:40])]
    key = jax.random.key(0)
    exact, stray = (critic(prompts, responses, TEMPLATE, key) for critic in (exact_critic, stray_critic))
    assert all(map(has_all_parts, [*exact, *stray]))
    for task, answer, critique in zip(world.tasks("training"), responses, exact, strict=False):
        assert critique.score == round(10 * world.grade(task, answer.text))
        assert world.grade(task, critique.improved) >= world.grade(task, answer.text)
    assert sum(a.weaknesses != b.weaknesses for a, b in zip(exact, stray, strict=True)) > 30


def test_verifier_scores_by_the_share_and_its_control_deals_the_same_scores(checkers):
    tasks, prompts = world.tasks("training")[:30], world.prompts("training")[:30]
    responses = [response(task, text, i) for task in tasks for i, text in enumerate(TEXTS)]
    asked = (None, prompts, responses, load_rubric(), JudgeConfig(), jax.random.key(1))
    by_id = {task.id: task for task in tasks}
    scores, dealt = ([j.score for j in judge(*asked)] for judge in (verifier, shuffled_verifier))
    assert scores == [world.grade(by_id[r.prompt_id], r.text) for r in responses]
    assert scores != dealt
    for i in range(0, len(scores), 3):
        assert sorted(scores[i : i + 3]) == sorted(dealt[i : i + 3])


def test_graded_drafts_are_ranked_by_grade(checkers):
    task, prompt = world.tasks("training")[0], world.prompts("training")[0]
    drafts = GradedDrafts(model="unused", tasks=1)
    ranked = drafts._ranked(prompt, list(TEXTS))
    grades = [world.grade(task, text) for text in ranked.responses]
    assert all((a < b) == (x > y) for a, x in zip(grades, ranked.ranks, strict=True)
               for b, y in zip(grades, ranked.ranks, strict=True))  # fmt: skip
    assert max(grades) == 1 and ranked.responses[-1] == world.mended(
        task, min(TEXTS, key=lambda t: world.grade(task, t))
    )


def test_quality_is_the_mean_share_with_its_interval(checkers):
    tasks, prompts = world.tasks("held_out")[:50], world.prompts("held_out")[:50]
    figures = quality(prompts, [response(task, TEXTS[0]) for task in tasks])
    shares = [100 * world.grade(task, TEXTS[0]) for task in tasks]
    assert figures["by_prompt"] == pytest.approx(shares)
    assert figures["quality"]["mean"] == pytest.approx(sum(shares) / 50)
    assert figures["quality"]["ci95"][0] < figures["quality"]["mean"] < figures["quality"]["ci95"][1]
    assert figures["all_met"] == sum(share == 100 for share in shares) / 50
