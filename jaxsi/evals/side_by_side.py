"""Two texts for a prompt, side by side before any judge: how much better is the first?"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxsi.evals.answer_cache import AnswerCache, Answered, Asker, Failure, Question
from jaxsi.evals.judging import Plan, estimate, identity
from jaxsi.runs.records import Prompt
from jaxsi.stages.judges import Judge, side_by_side
from jaxsi.stages.prompts import question_text
from jaxsi.stages.prompts.comparison import AnyRubric, PairwiseRubric, RankingRubric
from jaxsi.stages.verdicts import JudgeConfig, Writer


class Row(NamedTuple):
    """A prompt and two responses to it. The prompt's id means nothing here."""

    prompt: Prompt
    first: str
    second: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideBySide:
    """A judge with its rubric and settings. ``writer`` is who writes its texts, None if there are none."""

    cache: AnswerCache
    judging: Judge
    writer: Writer | None
    rubric: AnyRubric
    config: JudgeConfig

    def ask(self, rows: Mapping[str, Row], seed: int = 0) -> Answered:
        """How much better the first text is than the second, from 0 to 1, by the name of the row. A pairwise rubric
        gives the mean over the judgments, each in both orders; from other scores it is 1, 1/2 or 0. Equal texts are a
        tie without a question."""

        def put(questions: Sequence[Question]) -> list[Any]:
            asked = [contents[asker.key(question.content)] for question in questions]
            scores = side_by_side(
                self.judging, None, [row.prompt for row in asked], [row.first for row in asked],
                [row.second for row in asked], self.rubric, self.config, jax.random.key(seed),
            )  # fmt: skip
            return [self._better(a, b) for a, b in zip(*scores, strict=True)]

        ties = {id: 0.5 for id, row in rows.items() if row.first == row.second}
        asker = self._asker(seed)
        questions = _questions(rows)
        contents = {asker.key(question.content): rows[question.id] for question in questions}
        answered = self.cache.answer(questions, put, asker, part_size=self.config.batch_size)
        found = ties | dict(answered.values)
        return dataclasses.replace(answered, values={id: found[id] for id in rows if id in found})

    def plan(self, rows: Mapping[str, Row], seeds: int) -> Plan:
        """What ``ask`` by that many seeds would ask."""
        plans = []
        for seed in range(seeds):
            questions = _questions(rows)
            missing = self.cache.missing(questions, self._asker(seed))
            requests = [request for question in missing for request in self._requests(rows[question.id])]
            counts = {"calls": len(requests), "prompt_tokens": 0, "completion_tokens": 0}
            if self.writer is not None:
                counts = estimate(self.writer, requests, self.config.max_new_tokens)
            plans.append(Plan.of(len(questions), len(missing), counts))
        return sum(plans, Plan())

    def _asker(self, seed: int) -> Asker:
        settings = [self.config.num_samples, self.config.expected, type(self.rubric).__name__]
        judge = identity(self.judging if self.writer is None else self.writer, self.config)
        return Asker(json.dumps([judge, settings]), self.rubric.template, seed)

    def _better(self, a: float | None, b: float | None) -> float | Failure:
        if a is None or b is None:
            return Failure("the judge gave one of the two responses no score")
        return a if isinstance(self.rubric, PairwiseRubric) and self.writer is not None else (a > b) + 0.5 * (a == b)

    def _requests(self, row: Row) -> list[Prompt]:
        """What a judge that writes is asked about a row; of another one, a request for each score."""
        question, texts = question_text(row.prompt.messages), (row.first, row.second)
        if isinstance(self.rubric, RankingRubric):
            rendered = [self.rubric.render(question, texts)]
        elif isinstance(self.rubric, PairwiseRubric):
            rendered = [self.rubric.render(question, a, b) for a, b in (texts, texts[::-1])]
        else:
            rendered = [self.rubric.render(question, text) for text in texts]
        samples = 1 if self.writer is None else self.config.num_samples
        return [Prompt.of("", text) for text in rendered for _ in range(samples)]


def _questions(rows: Mapping[str, Row]) -> list[Question]:
    return [
        Question(id, [list(row.prompt.messages), row.first, row.second])
        for id, row in rows.items()
        if row.first != row.second
    ]
