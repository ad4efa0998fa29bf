"""What a judge says about responses that people compared or ranked, in the form of `agreement` (see `asked`)."""

from collections.abc import Mapping, Sequence

from jaxsi.evals.agreement import SWAPPED, Verdict, winner_of
from jaxsi.evals.answer_cache import Answered
from jaxsi.evals.asked import Group
from jaxsi.evals.human_labels import Texts
from jaxsi.runs.records import Judgment, Prompt, RankedResponses
from jaxsi.stages.prompts.comparison import AnyRubric, PairwiseRubric, Winner
from jaxsi.stages.verdicts import JudgeConfig


def groups_of_pairs(texts: Mapping[str, Texts]) -> list[Group]:
    """What is asked about pairs: the first response, then the second one."""
    return [Group(id, pair.prompt, (pair.first, pair.second)) for id, pair in texts.items()]


def groups_of_rankings(ranked: Sequence[RankedResponses]) -> list[Group]:
    """What is asked about ranked responses."""
    return [Group(record.id, Prompt(id=record.id, messages=record.messages), record.responses) for record in ranked]


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
