"""A critic and a judge behind an OpenAI-compatible endpoint."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import may_change, stored_as
from jaxsi.runs.records import Critique, Judgment, Prompt, Response
from jaxsi.stages.critique import critic_requests, critique
from jaxsi.stages.endpoint_client import OPENAI, Answer, Endpoint, EndpointError, Request
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.prompts.critique import CritiqueTemplate
from jaxsi.stages.verdicts import JudgeConfig, judged
from jaxsi.text.chat_config import split_thought

TOP = 5  # likeliest first tokens that a server names; OpenAI's least limit, and that of AlpacaEval's judge


@stored_as("endpoint.EndpointCritic")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointCritic(Endpoint):
    """An endpoint as SRT's critic. ``temperature`` None sends no temperature, for models that accept only their own."""

    temperature: float | None = 0.0
    max_new_tokens: int = 2048

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], template: CritiqueTemplate, key: jax.Array
    ) -> list[Critique]:
        """One critique of each response. After a refusal, an empty answer, half a template or a request that is too
        long for the model, the critique lacks the missing parts; the filters drop and count it.

        Raises: EndpointError: as ``Endpoint.answers``.
        """
        requests = [
            Request(request.text, self.max_new_tokens, self.temperature)
            for request in critic_requests(prompts, responses, template)
        ]
        return [
            self._critique(response, answer, template)
            for response, answer in zip(responses, self.answers(requests), strict=True)
        ]

    def _critique(self, response: Response, answer: Answer, template: CritiqueTemplate) -> Critique:
        if answer.finish_reason == "refusal":  # no part of its text is feedback
            return dataclasses.replace(critique(response, "", "stop", template, self.model), text=answer.text)
        text = split_thought(answer.text)
        reason = answer.finish_reason if text.closed else "length"
        return critique(response, text.answer, reason, template, self.model)


@stored_as("endpoint.EndpointJudge")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointJudge(Endpoint):
    """An endpoint as a judge, in place of ``judge.judge``. The run's JudgeConfig says how its texts are sampled, but
    ``sends_temperature`` False leaves temperature and top_p out, for models that accept only their own."""

    base_url: str = dataclasses.field(default=OPENAI, metadata=may_change())
    cache: str = dataclasses.field(default="judge_answers.jsonl", metadata=may_change())
    sends_temperature: bool = True

    def __call__(
        self,
        lm: LM | None,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        rubric: AnyRubric,
        cfg: JudgeConfig,
        key: jax.Array,
    ) -> list[Judgment]:
        """As ``judge.judge``; ``lm`` and ``key`` are not used. A refusal, and a request that is too long for the model,
        have no score.

        Raises: EndpointError: as ``Endpoint.answers``, or if expected scores are asked for.
        """
        if cfg.expected:
            raise EndpointError(f"{self.model} at an endpoint gives no expected scores; set judge.expected to False")
        return judged(self, prompts, responses, rubric, cfg, key)

    @property
    def fingerprint(self) -> str:
        return self.model

    @property
    def template(self) -> str:
        return ""

    def write(
        self,
        requests: Sequence[Prompt],
        cfg: JudgeConfig,
        key: jax.Array,
        num_samples: int,
        forced: Sequence[str] = (),
        *,
        first: int = 0,
    ) -> dict[str, list[Response]]:
        """As ``Writer.write``. The samples have the numbers from ``first`` on: the same numbers give the same texts."""
        temperature = cfg.temperature if self.sends_temperature else None
        top_p = cfg.top_p if temperature else 1.0
        asked = [
            Request(text, cfg.max_new_tokens, temperature, top_p, first + k, before)
            for before, text in map(_split, requests)
            for k in range(num_samples)
        ]
        answers = iter(self.answers(asked))
        written: dict[str, list[Response]] = {}
        for request in requests:
            samples = [next(answers) for _ in range(num_samples)]
            if any(answer.finish_reason != "length" or answer.prompt_tokens for answer in samples):  # or it is too long
                written[request.id] = [_written(request, k, answer) for k, answer in enumerate(samples)]
        return written

    def expected(self, requests: Any, written: Any, rubric: Any, cfg: Any) -> dict[str, list[float | None]]:
        raise EndpointError("an endpoint gives no expected scores")

    def choice_logps(
        self, requests: Sequence[Prompt], choices: Sequence[str], cfg: JudgeConfig, *, sample: int = 0
    ) -> dict[str, list[float]]:
        """As ``LocalWriter.choice_logps``, for choices of one token. A choice that is not among the ``TOP`` likeliest
        tokens has -inf.

        Raises: EndpointError: as ``Endpoint.answers``, or if the server names no log-probs.
        """
        asked = [Request(text, 1, 1.0, 1.0, sample, before, TOP) for before, text in map(_split, requests)]
        answers = zip(requests, self.answers(asked), strict=True)
        return {
            request.id: [answer.first_logps.get(choice, -math.inf) for choice in choices]
            for request, answer in answers
            if answer.first_logps is not None  # or the request is refused, or too long
        }


def _split(request: Prompt) -> tuple[tuple[tuple[str, str], ...], str]:
    """The messages before the last one, and the text of that."""
    *before, last = request.messages
    return tuple((message["role"], message["content"]) for message in before), last["content"]


def _written(request: Prompt, sample: int, answer: Answer) -> Response:
    """An answer as a text without its thought; it is cut off if the thought has no end."""
    thought = split_thought(answer.text)
    text = "" if answer.finish_reason == "refusal" else thought.answer
    whole = answer.finish_reason != "length" and thought.closed
    response = Response.of(f"{request.id}#{sample}", request.id, sample, text)
    return dataclasses.replace(response, finish_reason="stop" if whole else "length")
