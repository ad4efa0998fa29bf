"""Two texts for a prompt, side by side before any judge: how much better is the first?"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from jaxsi.evals.answer_cache import AnswerCache, Answered
from jaxsi.evals.asked import Group, ask_judge, plan_groups
from jaxsi.evals.judging import Plan, writes
from jaxsi.runs.records import Prompt
from jaxsi.stages.judges import Judge
from jaxsi.stages.prompts.comparison import AnyRubric, PairwiseRubric
from jaxsi.stages.verdicts import JudgeConfig, Writer

UNREADABLE = "the judge's text has no verdict"


class Row(NamedTuple):
    """A prompt and two responses to it. The prompt's id means nothing here."""

    prompt: Prompt
    first: str
    second: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideBySide:
    """A judge, or the writer of its texts, with its rubric and settings."""

    cache: AnswerCache
    judge: Writer | Judge
    rubric: AnyRubric
    config: JudgeConfig

    def ask(self, rows: Mapping[str, Row], seed: int = 0) -> Answered:
        """How much better the first text is than the second, from 0 to 1, by the name of the row. A pairwise rubric
        gives the mean over the judgments, each in both orders; from other scores it is 1, 1/2 or 0. Equal texts are a
        tie without a question. A row is among the failures, too, if the judge's text has no verdict."""
        asked = ask_judge(self.cache, self.judge, _groups(rows), self.rubric, self.config, seed)
        found = {id: 0.5 for id, row in rows.items() if row.first == row.second}
        unreadable: dict[str, str] = {}
        for id, answer in asked.values.items():
            a, b = answer["scores"]
            if a is None or b is None:
                unreadable[id] = UNREADABLE
            else:
                found[id] = self._better(a, b)
        ordered = {id: found[id] for id in rows if id in found}
        return dataclasses.replace(asked, values=ordered, failures={**asked.failures, **unreadable})

    def plan(self, rows: Mapping[str, Row], seeds: int) -> Plan:
        """What ``ask`` by that many seeds would ask."""
        return plan_groups(self.cache, self.judge, _groups(rows), self.rubric, self.config, seeds)

    def _better(self, a: float, b: float) -> float:
        return a if isinstance(self.rubric, PairwiseRubric) and writes(self.judge) else (a > b) + 0.5 * (a == b)


def _groups(rows: Mapping[str, Row]) -> list[Group]:
    return [Group(id, row.prompt, (row.first, row.second)) for id, row in rows.items() if row.first != row.second]
