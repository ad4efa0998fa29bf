"""A judge asked about responses that people compared or ranked, once for each content (see `answer_cache`).

All responses to a prompt are judged together by the judge interface: a rubric that compares sees them in both orders.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxsi.evals.agreement import SWAPPED, Verdict, winner_of
from jaxsi.evals.answer_cache import AnswerCache, Answered, Asker, Failure, Question
from jaxsi.evals.human_labels import Texts
from jaxsi.evals.judging import identity
from jaxsi.runs.records import Judgment, Prompt, RankedResponses, Response
from jaxsi.stages.endpoint import EndpointJudge
from jaxsi.stages.judges import Judge
from jaxsi.stages.prompts.comparison import AnyRubric, PairwiseRubric, Winner
from jaxsi.stages.verdicts import JudgeConfig, LocalWriter, Writer, Written, judged


class Group(NamedTuple):
    """A prompt and the responses to it, as texts."""

    id: str
    prompt: Prompt
    responses: tuple[str, ...]


def groups_of_pairs(texts: Mapping[str, Texts]) -> list[Group]:
    """What is asked about pairs: the first response, then the second one."""
    return [Group(id, pair.prompt, (pair.first, pair.second)) for id, pair in texts.items()]


def groups_of_rankings(ranked: Sequence[RankedResponses]) -> list[Group]:
    """What is asked about ranked responses."""
    return [Group(record.id, Prompt(id=record.id, messages=record.messages), record.responses) for record in ranked]


def ask_judge(
    cache: AnswerCache,
    judging: Writer | Judge,
    groups: Sequence[Group],
    rubric: AnyRubric,
    cfg: JudgeConfig,
    seed: int = 0,
) -> Answered:
    """The judge's answers: values {"scores", "texts"} with an entry for each response, by the id of the group. The
    noise of a judgment depends on the texts and the seed. A group of which a request is too long for the judge's
    context is a failure, and is asked again by the next run."""
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

    settings = [identity(judging, cfg), cfg.num_samples, cfg.expected, rubric.name]
    asker = Asker(str(settings), rubric.template, seed)
    questions = [
        Question(group.id, {"messages": list(group.prompt.messages), "responses": list(group.responses)})
        for group in groups
    ]
    return cache.answer(questions, ask, asker, part_size=cfg.batch_size)


def _answer(judgments: Sequence[Judgment]) -> dict[str, Any] | Failure:
    if any(not judgment.texts and judgment.score is None for judgment in judgments):  # equal texts need no question
        return Failure("the judge's context has no room for a request")
    return {"scores": [j.score for j in judgments], "texts": [list(j.texts) for j in judgments]}


def _bound(
    judging: Writer | Judge, rubric: AnyRubric, cfg: JudgeConfig, seed: int
) -> Callable[[Sequence[Prompt], Sequence[Response]], list[Judgment]]:
    key = jax.random.key(seed)
    if isinstance(judging, EndpointJudge):
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


def verdicts_of(found: Answered, rubric: AnyRubric, cfg: JudgeConfig) -> list[Verdict]:
    """Verdicts about pairs. A judge that writes texts about pairs has a verdict for each order, by its first sample; a
    judge that scores has the one with the higher score."""
    verdicts = []
    for id, value in found.values.items():
        first, second = value["scores"]
        written = isinstance(rubric, PairwiseRubric) and all(any(texts) for texts in value["texts"])
        if written and not cfg.expected and cfg.num_samples == 1:
            straight, other = (_parsed(rubric, texts) for texts in value["texts"])
            verdicts.append(Verdict.of_orders(id, straight, None if other is None else SWAPPED[other]))
            continue
        winner = None if first is None or second is None else winner_of(first, second)
        likely = first if isinstance(rubric, PairwiseRubric) and winner is not None else None
        verdicts.append(Verdict(id=id, winner=winner, probability=likely if written else None))
    return verdicts + [Verdict(id=id, winner=None) for id in found.failures]


def _parsed(rubric: AnyRubric, texts: Sequence[str]) -> Winner | None:
    assert isinstance(rubric, PairwiseRubric)
    return rubric.parse(texts[0]) if texts else None


def judgments_of(found: Answered, ranked: Sequence[RankedResponses]) -> list[Judgment]:
    """Judgments of `rankings.as_responses(ranked)`; without a score where the judge failed."""
    judgments = []
    for record in ranked:
        empty = {"scores": [None] * len(record.responses), "texts": [[]] * len(record.responses)}
        value = found.values.get(record.id, empty)
        for i, (score, texts) in enumerate(zip(value["scores"], value["texts"], strict=True)):
            judgments.append(
                Judgment(
                    id=f"{record.id}#{i}", prompt_id=record.id, scores=(score,), score=score, texts=tuple(texts),
                    fingerprint="", template="",
                )
            )  # fmt: skip
    return judgments
