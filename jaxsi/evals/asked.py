"""The responses to a prompt before any judge, each group once (see `answer_cache`).

All responses of a group are judged together by the judge interface: a rubric that compares sees them in both orders.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxsi.evals.answer_cache import AnswerCache, Answered, Asker, EvaluationError, Failure, Question
from jaxsi.evals.judging import Plan, estimate, identity, plan_left, writes
from jaxsi.runs.records import Judgment, Prompt, Response
from jaxsi.stages.endpoint import EndpointJudge
from jaxsi.stages.judges import Judge
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.verdicts import JudgeConfig, LocalWriter, Writer, Written, judged

NO_SCORE = (
    "the judge has no score: its context has no room for the request, it wrote nothing, or the function gave none"
)


class Group(NamedTuple):
    """A prompt and the responses to it, as texts."""

    id: str
    prompt: Prompt
    responses: tuple[str, ...]


def ask_judge(
    cache: AnswerCache,
    judging: Writer | Judge,
    groups: Sequence[Group],
    rubric: AnyRubric,
    cfg: JudgeConfig,
    seed: int = 0,
) -> Answered:
    """The judge's answers: values {"scores", "texts"} with an entry for each response, by the id of the group. The
    noise of a judgment depends on the texts and the seed. A group is a failure, and is asked again by the next run, if
    a response has neither a score nor a text: the request is too long for the judge's context, it wrote nothing, or a
    function gave None. A text without a verdict is an answer: the same request would get the same text."""
    judge_texts = _bound(judging, rubric, cfg, seed)

    def ask(questions: Sequence[Question]) -> list[Any]:
        prompts, responses = [], []
        for question in questions:
            id = asker.key(question.content)
            prompts.append(Prompt(id=id, messages=tuple(question.content["messages"])))
            responses += [Response.of(f"{id}#{i}", id, i, text) for i, text in enumerate(question.content["responses"])]
        judgments = {judgment.id: judgment for judgment in judge_texts(prompts, responses)}
        return [
            _answer([judgments[f"{prompt.id}#{i}"] for i in range(len(question.content["responses"]))])
            for prompt, question in zip(prompts, questions, strict=True)
        ]

    asker = _asker(judging, rubric, cfg, seed)
    return cache.answer(_questions(groups), ask, asker, part_size=cfg.batch_size)


def plan_groups(
    cache: AnswerCache,
    judging: Writer | Judge,
    groups: Sequence[Group],
    rubric: AnyRubric,
    cfg: JudgeConfig,
    seeds: int = 1,
) -> Plan:
    """What ``ask_judge`` by that many seeds would ask. A judge that writes no text is called for each response
    and takes no tokens."""

    def estimated(left: Sequence[Group]) -> Mapping[str, int]:
        if writes(judging):
            return estimate(judging, requests_of(left, rubric, cfg), cfg.max_new_tokens)
        return {"calls": sum(len(g.responses) for g in left), "prompt_tokens": 0, "completion_tokens": 0}

    askers = [_asker(judging, rubric, cfg, seed) for seed in range(seeds)]
    return sum((plan_left(cache, groups, _questions(groups), asker, estimated) for asker in askers), Plan())


def _asker(judging: Writer | Judge, rubric: AnyRubric, cfg: JudgeConfig, seed: int) -> Asker:
    settings = [identity(judging, cfg), cfg.num_samples, cfg.expected, rubric.name, type(rubric).__name__]
    return Asker(json.dumps(settings), rubric.template, seed)


def _questions(groups: Sequence[Group]) -> list[Question]:
    return [
        Question(group.id, {"messages": list(group.prompt.messages), "responses": list(group.responses)})
        for group in groups
    ]


def _answer(judgments: Sequence[Judgment]) -> dict[str, Any] | Failure:
    if any(judgment.score is None and not any(judgment.texts) for judgment in judgments):
        return Failure(NO_SCORE)
    return {"scores": [j.score for j in judgments], "texts": [list(j.texts) for j in judgments]}


def _bound(
    judging: Writer | Judge, rubric: AnyRubric, cfg: JudgeConfig, seed: int
) -> Callable[[Sequence[Prompt], Sequence[Response]], list[Judgment]]:
    key = jax.random.key(seed)
    if isinstance(judging, EndpointJudge):
        if cfg.expected:  # before a token is spent
            raise EvaluationError(f"{judging.model} at an endpoint gives no expected scores; leave --expected out")
        writer = _Seeded(judging, first=seed * cfg.num_samples)
        return lambda prompts, responses: judged(writer, prompts, responses, rubric, cfg, key)
    if isinstance(judging, LocalWriter):
        return lambda prompts, responses: judged(judging, prompts, responses, rubric, cfg, key)
    judge: Any = judging
    return lambda prompts, responses: judge(None, prompts, responses, rubric, cfg, key)


@dataclasses.dataclass(frozen=True)
class _Seeded:
    """An endpoint whose samples begin at another number, so that another seed gets other answers."""

    endpoint: EndpointJudge
    first: int

    @property
    def fingerprint(self) -> str:
        return self.endpoint.fingerprint

    @property
    def template(self) -> str:
        return self.endpoint.template

    def write(
        self, requests: Sequence[Prompt], cfg: JudgeConfig, key: jax.Array, num_samples: int, forced: Sequence[str] = ()
    ) -> Written:
        return self.endpoint.write(requests, cfg, key, num_samples, forced, first=self.first)

    def expected(self, requests: Any, written: Any, rubric: Any, cfg: Any) -> dict[str, list[float | None]]:
        return self.endpoint.expected(requests, written, rubric, cfg)

    def choice_logps(self, requests: Any, choices: Any, cfg: Any) -> Any:
        return self.endpoint.choice_logps(requests, choices, cfg)


def requests_of(groups: Sequence[Group], rubric: AnyRubric, cfg: JudgeConfig) -> list[Prompt]:
    """What a judge that writes texts is sent, for an estimate before anything is asked."""
    counting = _Counting([])
    prompts = [Prompt(id=group.id, messages=group.prompt.messages) for group in groups]
    responses = [Response.of(f"{g.id}#{i}", g.id, i, text) for g in groups for i, text in enumerate(g.responses)]
    judged(counting, prompts, responses, rubric, dataclasses.replace(cfg, expected=False), jax.random.key(0))
    return counting.sent


@dataclasses.dataclass(frozen=True)
class _Counting:
    """Keeps what it is sent, and writes nothing."""

    sent: list[Prompt]
    fingerprint: str = ""
    template: str = ""

    def write(
        self, requests: Sequence[Prompt], cfg: JudgeConfig, key: jax.Array, num_samples: int, forced: Sequence[str] = ()
    ) -> Written:
        self.sent.extend(request for request in requests for _ in range(num_samples))
        return {}

    def expected(
        self, requests: Sequence[Prompt], written: Written, rubric: Any, cfg: JudgeConfig
    ) -> dict[str, list[float | None]]:
        return {}

    def choice_logps(self, requests: Any, choices: Any, cfg: Any) -> Any:
        return {}
