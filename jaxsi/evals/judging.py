"""What an evaluation asks of a judge: texts, or the probabilities of some answers; each question once (see
`answer_cache`)."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar

import jax
import numpy as np

from jaxsi.evals.answer_cache import AnswerCache, Answered, Asker, EvaluationError, Failure, Question
from jaxsi.runs.config_snapshot import describe_config, file_hashes
from jaxsi.runs.records import Prompt, Response
from jaxsi.stages.endpoint import EndpointJudge
from jaxsi.stages.endpoint_client import Request
from jaxsi.stages.judges import Judge, ModelJudge, RewardJudge, placed
from jaxsi.stages.verdicts import JudgeConfig, LocalWriter, Writer
from jaxsi.text.chat import prompt_length

Row = TypeVar("Row")
TOO_LONG = "the judge's context has no room for the request"


def writes(judge: Writer | Judge) -> TypeGuard[Writer]:
    """Whether a judge writes texts: a model in this process, or one behind an endpoint."""
    return isinstance(judge, LocalWriter | EndpointJudge)


def identity(judging: Writer | Judge, cfg: JudgeConfig | None = None) -> str:
    """A judge as a text that changes when its answers may: weights, chat template and dtype of a model in this
    process, the name of one behind an endpoint, the content of the files that it names, the source of a function; and
    the sampling settings."""
    if isinstance(judging, LocalWriter):
        described: Any = [judging.fingerprint, judging.template, str(judging.lm.dtype)]
    elif isinstance(judging, EndpointJudge):
        described = ["endpoint", judging.model, judging.sends_temperature]
    else:
        described = [describe_config(judging)]
        if isinstance(judging, ModelJudge | RewardJudge):  # a path says nothing about the weights that are there now
            described.append(placed(judging.model, None).fingerprint)
        described += file_hashes(judging).values()
    settings = None if cfg is None else [cfg.temperature, cfg.top_p, cfg.max_new_tokens]
    return json.dumps([described, settings], sort_keys=True)


def ask_texts(
    cache: AnswerCache, writer: Writer, requests: Sequence[Prompt], cfg: JudgeConfig, *, seed: int = 0
) -> Answered:
    """What the writer says to each of the requests: values {"text", "finish_reason"} by the id of the request. A
    request that has no room in the writer's context, or gets an empty text, is a failure. Any other text is an answer,
    also one without a verdict: the same request would get the same text."""

    def ask(questions: Sequence[Question]) -> list[Any]:
        named = [Prompt(id=asker.key(q.content), messages=tuple(q.content)) for q in questions]
        if isinstance(writer, EndpointJudge):
            written = writer.write(named, cfg, jax.random.key(seed), 1, first=seed)
        else:
            written = writer.write(named, cfg, jax.random.key(seed), 1)
        return [_text_answer(written[request.id][0] if request.id in written else None) for request in named]

    asker = Asker(identity(writer, cfg), "", seed)
    return cache.answer(questions_of(requests), ask, asker, part_size=cfg.batch_size)


def _text_answer(response: Response | None) -> dict[str, Any] | Failure:
    if response is None:
        return Failure(TOO_LONG)
    if not response.text:
        return Failure("the judge wrote nothing")
    return {"text": response.text, "finish_reason": response.finish_reason}


def plan_texts(
    cache: AnswerCache, writer: Writer, requests: Sequence[Prompt], cfg: JudgeConfig, seeds: int = 1
) -> "Plan":
    """What ``ask_texts`` by that many seeds would ask."""
    who = identity(writer, cfg)

    def estimated(left: Sequence[Prompt]) -> Mapping[str, int]:
        return estimate(writer, left, cfg.max_new_tokens)

    askers = [Asker(who, "", seed) for seed in range(seeds)]
    return sum((plan_left(cache, requests, questions_of(requests), asker, estimated) for asker in askers), Plan())


def ask_choices(
    cache: AnswerCache,
    writer: Writer,
    requests: Sequence[Prompt],
    choices: Sequence[str],
    cfg: JudgeConfig,
    *,
    template: str,
    seed: int = 0,
) -> Answered:
    """The probability of each of ``choices`` as the beginning of the answer, divided by their sum: values [P, ...] by
    the id of the request. Nothing is sampled: another ``seed`` asks only an endpoint again."""

    def ask(questions: Sequence[Question]) -> list[Any]:
        named = [Prompt(id=asker.key(q.content), messages=tuple(q.content)) for q in questions]
        if isinstance(writer, EndpointJudge):
            logps = writer.choice_logps(named, choices, cfg, sample=seed)
        else:
            logps = writer.choice_logps(named, choices, cfg)
        return [_shares(logps.get(request.id)) for request in named]

    asker = choice_asker(writer, choices, template, seed)
    return cache.answer(questions_of(requests), ask, asker, part_size=cfg.batch_size)


def choice_asker(writer: Writer, choices: Sequence[str], template: str, seed: int) -> Asker:
    """Who answers ``ask_choices``."""
    seed = seed if isinstance(writer, EndpointJudge) else 0
    return Asker(json.dumps([identity(writer), list(choices)]), template, seed)


def questions_of(requests: Sequence[Prompt]) -> list[Question]:
    """Requests to a judge as questions to the cache."""
    return [Question(request.id, list(request.messages)) for request in requests]


def _shares(logps: Sequence[float] | None) -> list[float] | Failure:
    if logps is None:
        return Failure(TOO_LONG)
    logps_G = np.asarray(logps, np.float64)
    if np.isnan(logps_G).any() or not np.isfinite(logps_G.max()):
        return Failure("none of the choices is among the tokens that the judge names")
    p_G = np.exp(logps_G - logps_G.max())
    return (p_G / p_G.sum()).tolist()


class Plan(NamedTuple):
    """A dry run: of ``questions`` some are ``cached``; the others take so many calls and at most so many tokens. Plans
    are added up with +."""

    questions: int = 0
    cached: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @staticmethod
    def of(questions: int, missing: int, estimated: Mapping[str, int]) -> "Plan":
        """The plan of some questions, of which ``missing`` have no answer yet; ``estimated`` as `estimate` gives it."""
        return Plan(questions, questions - missing, **estimated)

    def __add__(self, other: "Plan") -> "Plan":  # type: ignore[override]
        return Plan(*(a + b for a, b in zip(self, other, strict=True)))


class _Named(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=_Named)


def plan_left(
    cache: AnswerCache,
    items: Sequence[Item],
    questions: Sequence[Question],
    asker: Asker,
    estimated: Callable[[Sequence[Item]], Mapping[str, int]],
) -> Plan:
    """What is left to ask about ``items``, whose ``questions`` have their ids; ``estimated`` as `estimate` gives it."""
    missing = {question.id for question in cache.missing(questions, asker)}
    left = [item for item in items if item.id in missing]
    return Plan.of(len(items), len(left), estimated(left))


def unsampled(max_new_tokens: int, name: str = "response") -> str:
    """A text in place of one that is not sampled yet: in any tokenizer at least as many tokens as that may get."""
    return " ".join([name] * max_new_tokens)


def estimate(writer: Writer | None, requests: Sequence[Prompt], max_new_tokens: int) -> dict[str, int]:
    """What the requests may come to: {"calls", "prompt_tokens", "completion_tokens"}; exact prompt tokens of a model
    in this process, an estimate from above for an endpoint, and for a model that is not loaded (None)."""
    if isinstance(writer, LocalWriter):
        prompt_tokens = sum(prompt_length(writer.lm.tokenizer, request) for request in requests)
    else:
        asked = [
            Request(
                request.messages[-1]["content"],
                max_new_tokens,
                None,
                before=tuple((m["role"], m["content"]) for m in request.messages[:-1]),
            )
            for request in requests
        ]
        prompt_tokens = sum(request.upper_bound()["prompt_tokens"] for request in asked)
    return {
        "calls": len(requests),
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(requests) * max_new_tokens,
    }


# ---------------------------------------------------------------------------------------------------- rows that belong


def unique(rows: Iterable[tuple[str, Row]], where: str) -> dict[str, Row]:
    """Rows by name. Raises: EvaluationError: if a name occurs twice."""
    found: dict[str, Row] = {}
    for name, row in rows:
        if name in found:
            raise EvaluationError(f"{where}: {name!r:.80} occurs twice; leave one of the rows out")
        found[name] = row
    return found


def check_aligned(given: Mapping[str, Any], there: str, expected: Mapping[str, Any], here: str) -> None:
    """Raises: EvaluationError: if the names on both sides are not the same; before anything is asked."""
    extra, missing = given.keys() - expected.keys(), expected.keys() - given.keys()
    if extra or missing:
        example, side, other = (min(extra), there, here) if extra else (min(missing), here, there)
        raise EvaluationError(
            f"{there} and {here} do not belong together: {len(given)} and {len(expected)} prompts, of which "
            f"{len(given.keys() & expected.keys())} are the same; {example!r:.80} is in {side} and not in {other}. "
            "Give outputs for the same prompts, letter for letter"
        )
