"""Responses that people ranked: from a file of one's own, as prompts and responses for a judge, and orders compared."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

from jaxsi.runs.config_snapshot import may_move, stored_as
from jaxsi.runs.records import Judgment, Prompt, RankedResponses, Response, SFTExample
from jaxsi.stages.prompts import question_text
from jaxsi.stages.user_data import columns_of, read_rankings

_log = logging.getLogger(__name__)

# (scores, ranks) of the responses to one prompt, 0 the best rank -> whether the scores order them as people did.
Agrees = Callable[[Sequence[float | None], Sequence[int]], bool]


@stored_as("rankings.RankingFile")
@dataclasses.dataclass(frozen=True)
class RankingFile:
    """Ranked responses from a file: call it, or give it where a config takes a function of rankings. The fields are
    arguments of `user_data.read_rankings`; `columns` holds texts such as "responses=answers". A run reads the file once
    and keeps the records, so on resume it may lie elsewhere.

    Raises: RecordError, when it is called, if the file cannot be read or a row is bad.
    """

    path: str = dataclasses.field(metadata=may_move())
    columns: tuple[str, ...] = ()
    split: str = "train"

    def __post_init__(self) -> None:
        columns_of(self.columns)

    def __call__(self) -> list[RankedResponses]:
        return read_rankings(self.path, columns=columns_of(self.columns), split=self.split)


def as_responses(ranked: Iterable[RankedResponses]) -> tuple[list[Prompt], list[Response]]:
    """Prompts and responses as `jaxsi.judge` takes them. Response i of prompt p has the id "p#i" and no token ids."""
    prompts, responses = [], []
    for record in ranked:
        prompts.append(Prompt(id=record.id, messages=record.messages))
        responses += [Response.of(f"{record.id}#{i}", record.id, i, text) for i, text in enumerate(record.responses)]
    return prompts, responses


def judged_by_id(ranked: Sequence[RankedResponses], judgments: Sequence[Judgment]) -> dict[str, Judgment]:
    """The judgments of `as_responses(ranked)` by their ids.

    Raises: ValueError if an id occurs twice, or if a ranked response has no judgment.
    """
    by_id = {judgment.id: judgment for judgment in judgments}
    if len(by_id) != len(judgments):
        raise ValueError(f"{len(judgments) - len(by_id)} of {len(judgments)} judgments repeat an id; ids are unique")
    for record in ranked:
        for i in range(len(record.responses)):
            if f"{record.id}#{i}" not in by_id:
                raise ValueError(f"ranked response {record.id}#{i} has no judgment; judge all of as_responses(ranked)")
    return by_id


@stored_as("rankings.whole_order")
def whole_order(scores: Sequence[float | None], ranks: Sequence[int]) -> bool:
    """The paper's rule of EFT, as we read it: the scores order all responses as people did. A response without a
    score, or equal scores of two responses of different rank, break the order. Where people gave equal ranks, any
    scores will do. False if people ordered no two responses."""
    scored = [score for score in scores if score is not None]
    ordered = _ordered(scored, ranks) if len(scored) == len(scores) else []
    return bool(ordered) and all(better > worse for better, worse in ordered)


@stored_as("rankings.no_reversal")
def no_reversal(scores: Sequence[float | None], ranks: Sequence[int]) -> bool:
    """A lenient rule for judges with many ties: no two scores in the opposite order of people's, and at least two in
    the same order. Responses without a score are left out."""
    scored = [(score, rank) for score, rank in zip(scores, ranks, strict=True) if score is not None]
    ordered = _ordered([score for score, _ in scored], [rank for _, rank in scored])
    return any(better > worse for better, worse in ordered) and all(better >= worse for better, worse in ordered)


def _ordered(scores: Sequence[float], ranks: Sequence[int]) -> list[tuple[float, float]]:
    """(score of the better, score of the worse) of each two responses that people ordered."""
    rows = sorted(zip(ranks, scores, strict=True))
    return [(better, worse) for (i, better), (j, worse) in combinations(rows, 2) if i < j]


def without_prompts(examples: Sequence[SFTExample], ranked: Sequence[RankedResponses]) -> list[SFTExample]:
    """The demonstrations whose question is not one of the ranked ones; case and spacing are ignored."""
    questions = {normal_question(record.messages) for record in ranked}
    left = [example for example in examples if normal_question(example.messages) not in questions]
    if len(left) < len(examples):
        _log.warning(
            "%d of %d demonstrations are left out: the judge is measured on their prompts",
            len(examples) - len(left),
            len(examples),
        )
    return left


def normal_question(messages: Sequence[Mapping[str, str]]) -> str:
    """A question as a judge reads it, without regard to case and spacing."""
    return normal(question_text(messages))


def normal(text: str) -> str:
    """A text without regard to case and spacing."""
    return " ".join(text.split()).casefold()
