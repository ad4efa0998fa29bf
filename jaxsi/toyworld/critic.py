"""The embedded world's exact critic: language feedback, a score and a better response, in the words of the world.

It sees all that is wrong and mends the gravest of it, as a patient teacher does: one thing at a time. So what a model
learns from it can be used again on its own result.
"""

from collections import Counter
from collections.abc import Sequence

import jax

from jaxsi.runs.records import Critique, Prompt, Response
from jaxsi.stages.prompts.critique import CritiqueTemplate
from jaxsi.toyworld.world import Task, grade_task, parse, response_items

TEMPLATE = CritiqueTemplate(
    name="toy",
    request="Task: {prompt}\nAnswer: {response}\nCheck:",
    feedback="Judge:",
    weaknesses="Check:",
    suggestions=" Write:",  # a space before the word: so it is one token, and not spelt
    score=" Score: {score}",
    improved="Answer:",
    separator=" ",
    low=0,
    high=10,
)


def exact_critic(
    prompts: Sequence[Prompt], responses: Sequence[Response], template: CritiqueTemplate, key: jax.Array
) -> list[Critique]:
    """One critique of each response: what is wrong with it, the gravest first, which items to leave out or to write,
    the exact grade rounded to the template's range, and the response with the gravest mended.

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
        weaknesses, suggestions = weaknesses_of(task, response.text), suggestions_of(task, response.text)
        better = mended(task, response.text)
        parts = (weaknesses, suggestions, score, better, template.write(weaknesses, suggestions, score, better))
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
    """What is wrong, each a word that is one token, the gravest first: items too many (`repeats`) or missing (`items`)
    or only out of order (`wrong`), talk (`style`), no period (`form`); or `good`."""
    grade, given, expected = grade_task(task, response), Counter(response_items(response)), Counter(task.answer)
    found = {
        "repeats": given - expected,
        "items": expected - given,
        "wrong": grade.content < 1 and given == expected,
        "style": talk_of(response),
        "form": not grade.period,
    }
    return " ".join([word for word, is_there in found.items() if is_there] or ["good"])


def suggestions_of(task: Task, response: str) -> str:
    """What to do: `Drop red add bat`, or `good`."""
    given, expected = Counter(response_items(response)), Counter(task.answer)
    steps = [f"Drop {item}" for item in (given - expected).elements()]
    steps += [f"add {item}" for item in (expected - given).elements()]
    return " ".join(steps or ["good"])


def mended(task: Task, response: str) -> str:
    """The response with the gravest of its flaws mended: its items, else its talk, else its missing period."""
    grade, correct = grade_task(task, response), " ".join(task.answer)
    period = "." if grade.period else ""
    if grade.content < 1:
        return talk_of(response) + correct + period
    return correct + (period if talk_of(response) else ".")


def talk_of(response: str) -> str:
    """What stands before the first item of a response."""
    items = response_items(response)
    return response[: max(0, response.lower().find(items[0]))] if items else ""
