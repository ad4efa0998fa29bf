"""How well a judge's scores agree with people's rankings: the reward-modelling measures of Self-Rewarding (arXiv
2401.10020, table 4)."""

from collections.abc import Sequence

import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.metrics import kendall, pairwise_agreement, spearman
from jaxsi.runs.records import Judgment, RankedResponses
from jaxsi.runs.run import Scope
from jaxsi.stages.answers import answers, read_answers
from jaxsi.stages.judge import judge
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.rankings import as_responses, judged_by_id, whole_order
from jaxsi.stages.verdicts import JudgeConfig


def measured_judge(
    scope: Scope, ranked: Sequence[RankedResponses], lm: LM, rubric: AnyRubric, cfg: JudgeConfig
) -> dict[str, float | int | None]:
    """`judge_quality` of `lm` itself, as two stages of `scope`: "judge_test_judgments", in shards, and
    "judge_quality".

    Raises: StaleRecordsError if another model wrote the judgments that are on disk.
    """
    judgments = scope.sharded(
        "judge_test_judgments", answers(*as_responses(ranked)), read_answers, judge, lm, rubric, cfg,
        scope.key("judge_test"), of=Judgment, by=lm,
    )  # fmt: skip
    return scope.value("judge_quality", judge_quality, ranked, judgments, float(rubric.high))


def judge_quality(
    ranked: Sequence[RankedResponses], judgments: Sequence[Judgment], top: float = 5.0
) -> dict[str, float | int | None]:
    """Measures of the mean scores of `judgments`, which are of `as_responses(ranked)`, in any order.

    Args:
      top: the highest score of the rubric.

    Returns:
      "prompts": ranked prompts. "scored": share of responses with a score. Those without one are in no pair and in no
        correlation, and their prompt is no exact match.
      "pairs": pairs of scored responses to one prompt that people ordered. "accuracy": share of them that the scores
        order as people did, equal scores counted as wrong; "accuracy_without_ties": without the pairs of equal scores;
        "tie_share": how many these are.
      "exact_match": share of the prompts on which the scores order all responses as people did (`whole_order`).
      "five_best": share of people's best among the responses that got the `top` score in all judgments. "best": the
        same share among the highest scored responses to a prompt, averaged over prompts.
      "spearman", "kendall": rank correlation and tau-b on one prompt, averaged over prompts. Constant scores count as
        0: a judge that ties everything has found no order. "constant_share" says on how many prompts that is so.

      Prompts on which people ordered nothing are not among those of "exact_match"; prompts without two scored responses
      that people ordered are not among those of the correlations. A figure over nothing is None.

    Raises: ValueError if an id occurs twice, or if a ranked response has no judgment.
    """
    by_id = judged_by_id(ranked, judgments)
    rows = [([by_id[f"{r.id}#{i}"].score for i in range(len(r.responses))], r.ranks) for r in ranked]
    flat = [(score, -rank, number) for number, row in enumerate(rows) for score, rank in zip(*row, strict=True)]
    scores, truths, groups = (list(column) for column in zip(*flat, strict=True)) if flat else ([], [], [])
    pairs = pairwise_agreement(scores, truths, groups)
    at_top = [
        rank == min(ranks)
        for values, ranks in rows
        for score, rank in zip(values, ranks, strict=True)
        if score is not None and score >= top
    ]
    correlations = [found for row in rows if (found := _correlations(*row)) is not None]
    return {
        "prompts": len(ranked),
        "scored": _mean([score is not None for score in scores]),
        "pairs": pairs.count,
        "accuracy": pairs.accuracy,
        "accuracy_without_ties": pairs.without_ties,
        "tie_share": pairs.tie_share,
        "exact_match": _mean([whole_order(*row) for row in rows if len(set(row[1])) > 1]),
        "five_best": _mean(at_top),
        "best": _mean([share for row in rows if (share := _best(*row)) is not None]),
        "spearman": _mean([rho or 0.0 for rho, _ in correlations]),
        "kendall": _mean([tau or 0.0 for _, tau in correlations]),
        "constant_share": _mean([rho is None for rho, _ in correlations]),
    }


def _correlations(scores: Sequence[float | None], ranks: Sequence[int]) -> tuple[float | None, float | None] | None:
    """(Spearman, Kendall) of one prompt's scored responses, both None if all scores are equal; None if people ordered
    no two of these responses."""
    scored = [(score, -rank) for score, rank in zip(scores, ranks, strict=True) if score is not None]
    if len({truth for _, truth in scored}) < 2:
        return None
    values, truths = map(list, zip(*scored, strict=True))
    return spearman(values, truths), kendall(values, truths)


def _best(scores: Sequence[float | None], ranks: Sequence[int]) -> float | None:
    """The share of people's best among the highest scored responses; None without a score."""
    highest = max((score for score in scores if score is not None), default=None)
    chosen = [rank == min(ranks) for score, rank in zip(scores, ranks, strict=True) if score == highest]
    return None if highest is None else sum(chosen) / len(chosen)


def _mean(values: Sequence[float | bool]) -> float | None:
    return float(np.mean(values)) if values else None
