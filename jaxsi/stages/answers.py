"""Prompts together with the responses to them: what a judge or a reviser reads in one piece."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxsi.lm import LM
from jaxsi.runs.records import Prompt, Response

Record = TypeVar("Record")


class Answers(NamedTuple):
    """A prompt and all responses to it."""

    prompt: Prompt
    responses: tuple[Response, ...]


def answers(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Answers]:
    """The responses by prompt, prompts and responses in their order."""
    by_prompt: dict[str, list[Response]] = {}
    for response in responses:
        by_prompt.setdefault(response.prompt_id, []).append(response)
    return [Answers(prompt, tuple(by_prompt[prompt.id])) for prompt in prompts]


def read_answers(
    answers: Sequence[Answers], reader: Callable[..., list[Record]], lm: LM, *settings: Any
) -> list[Record]:
    """What ``reader(lm, prompts, responses, *settings)``, a judge or a reviser, makes of these answers: as a stage for
    ``Scope.sharded``."""
    responses = [response for answer in answers for response in answer.responses]
    return reader(lm, [answer.prompt for answer in answers], responses, *settings)
