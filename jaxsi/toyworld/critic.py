"""The embedded world's exact critic: language feedback, a score and the correct response, in the words of the world."""

from collections import Counter
from collections.abc import Sequence

import jax

from jaxsi.prompts.critique import CritiqueTemplate
from jaxsi.records import Critique, Prompt, Response
from jaxsi.toyworld.world import Task, grade_task, parse, response_items

TEMPLATE = CritiqueTemplate(
    name="toy",
    request="Task: {prompt}\nAnswer: {response}\nCheck:",
    feedback="Judge:",
    weaknesses="Check:",
    suggestions="Fix:",
    score="Score: {score}",
    improved="Answer:",
    separator=" ",
    low=0,
    high=10,
)


def exact_critic(
    prompts: Sequence[Prompt], responses: Sequence[Response], template: CritiqueTemplate, key: jax.Array
) -> list[Critique]:
    """One critique of each response: what is wrong with it, which items to leave out or to write, the exact grade
    rounded to the template's range, and the correct response.

    A response to a prompt that is no instruction of the world has a critique without any part.
    """
    tasks = {prompt.id: parse(prompt.text) for prompt in prompts}
    return [_critique(tasks[response.prompt_id], response, template) for response in responses]


def _critique(task: Task | None, response: Response, template: CritiqueTemplate) -> Critique:
    if task is None:
        parts = (None, None, None, None, "")
    else:
        grade = grade_task(task, response.text)
        score = template.low + int((template.high - template.low) * grade.total / 10 + 0.5)
        correct = " ".join(task.answer) + "."
        weaknesses, suggestions = weaknesses_of(task, response.text), suggestions_of(task, response.text)
        parts = (weaknesses, suggestions, score, correct, template.write(weaknesses, suggestions, score, correct))
    weaknesses, suggestions, score, improved, text = parts
    return Critique(
        id=response.id,
        prompt_id=response.prompt_id,
        weaknesses=weaknesses,
        suggestions=suggestions,
        score=None if score is None else float(score),
        improved=improved,
        text=text,
        finish_reason="stop",
        fingerprint="exact",
        template="",
    )


def weaknesses_of(task: Task, response: str) -> str:
    """What is wrong, in the words of the world: `talk extra missing period`, or `good`."""
    grade, given, expected = grade_task(task, response), Counter(response_items(response)), Counter(task.answer)
    talk = not response.startswith(given_first(response))
    found = {"talk": talk, "extra": given - expected, "missing": expected - given, "period": not grade.period}
    wrong = [word for word, is_there in found.items() if is_there]
    return " ".join(wrong or ["wrong" if grade.content < 1 else "good"])


def suggestions_of(task: Task, response: str) -> str:
    """What to do: `extra red right bat` (leave one red out, write bat), or `good`."""
    given, expected = Counter(response_items(response)), Counter(task.answer)
    steps = [f"extra {item}" for item in (given - expected).elements()]
    steps += [f"right {item}" for item in (expected - given).elements()]
    return " ".join(steps or ["good"])


def given_first(response: str) -> str:
    """The first item of a response; nothing where there is none."""
    return next(iter(response_items(response)), "")
