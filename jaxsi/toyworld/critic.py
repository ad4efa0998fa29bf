"""The embedded world's exact critic: language feedback, a score and a better response, in the words of the world.

It names every fault but mends only the gravest, as a patient teacher does. So what a model learns from it can be
applied again to the result.
"""

from collections import Counter
from collections.abc import Sequence

import jax

from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Critique, Prompt, Response
from jaxsi.stages.prompts.critique import CritiqueTemplate
from jaxsi.toyworld.world import Task, grade_task, parse, response_items

TEMPLATE = CritiqueTemplate(
    name="toy",
    request="Task: {prompt}\nAnswer: {response}\nCheck:",
    feedback="Judge:",
    weaknesses="Check:",
    suggestions=" Write:",  # with the space the word is one token; without it, it would be spelt
    score=" Score: {score}",
    improved="Answer:",
    separator=" ",
    low=0,
    high=10,
)


@stored_as("toyworld.critic.exact_critic")
def exact_critic(
    prompts: Sequence[Prompt], responses: Sequence[Response], template: CritiqueTemplate, key: jax.Array
) -> list[Critique]:
    """One critique of each response: its faults, the gravest first; which items to drop or to add; the exact grade,
    rounded to the template's range; and the response with its gravest fault mended.

    If the prompt is not an instruction of the world, all parts of the critique are missing.
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
    """The faults, the gravest first, each named by a word that is one token: too many items (`repeats`), missing items
    (`items`), items only out of order (`wrong`), talk (`style`), a missing period (`form`); `good` without a fault."""
    grade, written, expected = grade_task(task, response), Counter(response_items(response)), Counter(task.answer)
    found = {
        "repeats": written - expected,
        "items": expected - written,
        "wrong": grade.content < 1 and written == expected,
        "style": talk_of(response),
        "form": not grade.period,
    }
    return " ".join([word for word, is_there in found.items() if is_there] or ["good"])


def suggestions_of(task: Task, response: str) -> str:
    """What to do: `Drop red add bat`, or `good`."""
    written, expected = Counter(response_items(response)), Counter(task.answer)
    steps = [f"Drop {item}" for item in (written - expected).elements()]
    steps += [f"add {item}" for item in (expected - written).elements()]
    return " ".join(steps or ["good"])


def mended(task: Task, response: str) -> str:
    """The response with its gravest fault mended: its items, else its talk, else its missing period."""
    grade, correct = grade_task(task, response), " ".join(task.answer)
    period = "." if grade.period else ""
    if grade.content < 1:
        return talk_of(response) + correct + period
    return correct + (period if talk_of(response) else ".")


def talk_of(response: str) -> str:
    """The text before the first item of a response."""
    items = response_items(response)
    return response[: max(0, response.lower().find(items[0]))] if items else ""
