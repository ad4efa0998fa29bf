"""The critic of this world, in words: what a response misses, what to do, a score, and the response mended by rule."""

from collections.abc import Sequence

import jax

from jaxsi.checkedworld import world
from jaxsi.checkedworld.constraints import KINDS
from jaxsi.checkedworld.world import Task
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Critique, Prompt, Response
from jaxsi.stages.critique import critique
from jaxsi.stages.prompts.critique import CritiqueTemplate

# Short headings: a small model learns to write them, and every one of their tokens costs a step of decoding.
TEMPLATE = CritiqueTemplate(
    name="checked",
    request="Request: {prompt}\n\nResponse: {response}\n\nCheck the response.",
    feedback="### Feedback",
    weaknesses="Missing:",
    suggestions="To do:",
    score="Score: {score}",
    improved="### Better",
    low=0,
    high=10,
)


@stored_as("checkedworld.critic.exact_critic")
def exact_critic(
    prompts: Sequence[Prompt], responses: Sequence[Response], template: CritiqueTemplate, key: jax.Array
) -> list[Critique]:
    """One critique of each response: the kinds of constraints that it misses, how the prompt asks for them, ten times
    the share that it meets, and the response mended by rule."""
    tasks = {prompt.id: world.task_of(prompt) for prompt in prompts}
    return [_critique(tasks[response.prompt_id], response, template) for response in responses]


@stored_as("checkedworld.critic.stray_critic")
def stray_critic(
    prompts: Sequence[Prompt], responses: Sequence[Response], template: CritiqueTemplate, key: jax.Array
) -> list[Critique]:
    """The control: the same words about the constraints of another prompt, which teach nothing about one's own."""
    tasks = [world.task_of(prompt) for prompt in prompts]
    strays = {prompt.id: tasks[(i + len(tasks) // 2) % len(tasks)] for i, prompt in enumerate(prompts)}
    return [_critique(strays[response.prompt_id], response, template) for response in responses]


def _critique(task: Task, response: Response, template: CritiqueTemplate) -> Critique:
    met = world.met(task, response.text)
    missed = [constraint for constraint, is_met in zip(task.constraints, met, strict=True) if not is_met]
    text = template.write(
        ", ".join(kind for kind, _ in missed) or "nothing",
        " ".join(KINDS[kind].say(arguments) for kind, arguments in missed) or "Nothing.",
        template.low + round((template.high - template.low) * sum(met) / len(met)),
        world.mended(task, response.text),
    )
    return critique(response, text, "stop", template, "exact")
