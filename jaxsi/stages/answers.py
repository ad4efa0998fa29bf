"""Prompts together with their responses, as a judge, critic or reviser reads them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxsi.lm import LM
from jaxsi.runs.records import Prompt, Response, as_prompts
from jaxsi.text.chat import prompt_length
from jaxsi.text.chat_config import written_thought

Record = TypeVar("Record")


class Answers(NamedTuple):
    """A prompt and all responses to it."""

    prompt: Prompt
    responses: tuple[Response, ...]


def answers(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Answers]:
    """Groups the responses by prompt; both keep their order. A prompt without a response is left out."""
    by_prompt: dict[str, list[Response]] = {}
    for response in responses:
        by_prompt.setdefault(response.prompt_id, []).append(response)
    return [Answers(prompt, tuple(by_prompt[prompt.id])) for prompt in prompts if prompt.id in by_prompt]


def with_prompts(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[tuple[Prompt, Response]]:
    """Each response behind its prompt, in the order of the responses. Thoughts in texts that no model sampled here are
    taken out: whoever reads a response reads its answer.

    Raises: ValueError if a response's prompt is not among ``prompts``, or if a response's id occurs twice.
    """
    by_id, seen = {prompt.id: prompt for prompt in prompts}, set[str]()
    for response in responses:
        if response.prompt_id not in by_id:
            raise ValueError(
                f"response {response.id!r} answers prompt {response.prompt_id!r}, which is not among the {len(by_id)} "
                "prompts; pass the prompts that were sampled"
            )
        if response.id in seen:
            raise ValueError(f"two responses have the id {response.id!r}; ids are unique")
        seen.add(response.id)
    return [(by_id[response.prompt_id], _answer(response)) for response in responses]


def _answer(response: Response) -> Response:
    thought = written_thought(response.text)
    if response.token_ids or thought.answer == response.text:
        return response
    return dataclasses.replace(
        response,
        text=thought.answer,
        reasoning=thought.reasoning,
        finish_reason=response.finish_reason if thought.closed else "length",
    )


def with_room(lm: LM, prompts: Sequence[Prompt], longest: int) -> list[Prompt]:
    """The prompts that leave room for ``longest`` tokens in the context of ``lm``."""
    room = lm.config.max_positions - longest
    return [prompt for prompt in prompts if prompt_length(lm.tokenizer, prompt) <= room]


def read_answers(
    answers: Sequence[Answers], reader: Callable[..., list[Record]], lm: LM, *settings: Any
) -> list[Record]:
    """Calls ``reader(lm, prompts, responses, *settings)``, a judge, critic or reviser, on these answers; a stage for
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
