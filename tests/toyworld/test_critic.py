"""The embedded world's exact critic: its critiques are true, and mended responses are better."""

import jax
import pytest

import tiny
from jaxsi.runs.records import Prompt
from jaxsi.toyworld import careless, world
from jaxsi.toyworld.critic import TEMPLATE, exact_critic, mended, suggestions_of, talk_of, weaknesses_of

TASK = world.parse("Reverse: cat red dog")


@pytest.mark.parametrize(
    ("response", "weaknesses", "suggestions", "better"),
    [
        ("dog red cat.", "good", "good", "dog red cat."),
        ("dog red cat", "form", "good", "dog red cat."),
        ("Sure thing: dog red cat", "style form", "good", "dog red cat"),
        ("Sure thing: dog red.", "items style", "add cat", "Sure thing: dog red cat."),
        ("dog red red", "repeats items form", "Drop red add cat", "dog red cat"),
        ("red dog cat.", "wrong", "good", "dog red cat."),
        ("Well", "repeats items form", "Drop well add dog add red add cat", "dog red cat"),
        ("", "items form", "add dog add red add cat", "dog red cat"),
    ],
)
def test_critic_names_every_fault_and_mends_the_gravest(response, weaknesses, suggestions, better):
    assert weaknesses_of(TASK, response) == weaknesses
    assert suggestions_of(TASK, response) == suggestions
    assert mended(TASK, response) == better


def test_mending_always_raises_the_grade_and_ends_in_the_correct_response():
    for ranking in careless.preferences(50, 3, per_prompt=4):
        task = world.parse(ranking.messages[-1]["content"])
        for response in ranking.responses:
            grades = [world.grade_task(task, response).total]
            while grades[-1] < 10:
                response = mended(task, response)
                grades.append(world.grade_task(task, response).total)
                assert grades[-1] > grades[-2]
            assert len(grades) <= 4


def test_template_reads_the_critique_that_it_wrote():
    prompt = Prompt.of("p", "Reverse: cat red dog")
    other = Prompt.of("q", "Tell me a story")
    responses = [tiny.response(p, 0, [5]) for p in (prompt, other)]
    first, second = exact_critic([prompt, other], responses, TEMPLATE, jax.random.key(0))
    assert TEMPLATE.parse(first.text) == (first.weaknesses, first.suggestions, first.score, first.improved)
    assert first.finish_reason == "stop" and first.score == round(first.score)
    assert (second.weaknesses, second.suggestions, second.score, second.improved) == (None,) * 4


def test_text_before_the_items_is_talk():
    assert talk_of("Sure thing: cat red.") == "Sure thing: "
    assert talk_of("cat red.") == "" == talk_of("Hello.")
