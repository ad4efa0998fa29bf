"""Prompts together with their responses, as a judge or a reviser reads them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxsi.lm import LM
from jaxsi.runs.records import Prompt, Response, as_prompts

Record = TypeVar("Record")


class Answers(NamedTuple):
    """A prompt and all responses to it."""

    prompt: Prompt
    responses: tuple[Response, ...]


def answers(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Answers]:
    """Groups the responses by prompt; both keep their order."""
    by_prompt: dict[str, list[Response]] = {}
    for response in responses:
        by_prompt.setdefault(response.prompt_id, []).append(response)
    return [Answers(prompt, tuple(by_prompt[prompt.id])) for prompt in prompts]


def read_answers(
    answers: Sequence[Answers], reader: Callable[..., list[Record]], lm: LM, *settings: Any
) -> list[Record]:
    """Calls ``reader(lm, prompts, responses, *settings)``, a judge or a reviser, on these answers; a stage for
    ``Scope.sharded``."""
    responses = [response for answer in answers for response in answer.responses]
    return reader(lm, [answer.prompt for answer in answers], responses, *settings)


def as_records(
    prompts: Sequence[Prompt | str], responses: Sequence[Response | str]
) -> tuple[list[Prompt], list[Response]]:
    """Prompts and responses as records. A text becomes a prompt whose id is its index; response i, if it is a text,
    answers prompt i.

    Raises: ValueError if some responses are texts, and there is not exactly one response for each prompt.
    """
    records = as_prompts(prompts)
    if any(isinstance(response, str) for response in responses) and len(responses) != len(records):
        raise ValueError(f"{len(responses)} responses to {len(records)} prompts; give one text for each prompt")
    return records, [
        response if isinstance(response, Response) else Response.of(f"{records[i].id}#0", records[i].id, 0, response)
        for i, response in enumerate(responses)
    ]
