"""How well a judge agrees with people: shares of equal verdicts, what its position does, and orders of responses.

People's labels and a judge's verdicts are "A" (the first response of a pair is better), "B" (the second one) or "C" (a
tie). Agreement with and without ties is that of MT-Bench (arXiv 2306.05685, table 5): a judge whose two orders
disagree has said "C". What is not defined is None.
"""

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.runs.metrics import calibration, kendall, macro_scores, spearman
from jaxsi.runs.records import Judgment, RankedResponses
from jaxsi.stages.judge_quality import judge_quality
from jaxsi.stages.prompts.comparison import Winner

SCORES: dict[Winner, float] = {"A": 1.0, "B": 0.0, "C": 0.5}  # of the first response
SWAPPED: dict[Winner, Winner] = {"A": "B", "B": "A", "C": "C"}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two responses to one prompt as people labelled them: one label for each vote.

    `item` is what both respond to, such as "81, turn 2"; `first` and `second` name who responded; `group` is the part
    of the data whose figures are of interest by themselves, such as "turn 2".
    """

    id: str
    item: str
    first: str
    second: str
    labels: tuple[Winner, ...]
    group: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A judge's verdict about the pair with the same id; None if it gave none.

    `orders`: the verdict with the first response shown first, and that with the second one shown first, both about
    the pair as it is; None if they are not known. `probability`: that the first response is better, if the judge gives
    probabilities. `unread`: what the judge wrote is no verdict, and counts as a tie.
    """

    id: str
    winner: Winner | None
    orders: tuple[Winner | None, ...] | None = None
    probability: float | None = None
    inconsistent: bool | None = None
    unread: bool = False

    @staticmethod
    def of_orders(id: str, first: Winner | None, second: Winner | None) -> "Verdict":
        """The verdict of two orders: that in which they agree, or a tie."""
        if first is None or second is None:
            return Verdict(id=id, winner=None, orders=(first, second))
        return Verdict(id=id, winner=first if first == second else "C", orders=(first, second))

    @property
    def is_inconsistent(self) -> bool | None:
        """Whether the two orders disagree; None if that is not known. An order without a verdict is not the same as one
        with a verdict, but as another without: so LLMBar (arXiv 2310.07641) counts."""
        if self.orders is None:
            return self.inconsistent
        return len(set(self.orders)) > 1


def winner_of(first: float, second: float) -> Winner:
    """The winner by two scores."""
    return "A" if first > second else "B" if first < second else "C"


def majority(labels: Sequence[Winner]) -> Winner | None:
    """The label that more votes have than any other; a tie between labels is "C" (PandaLM, arXiv 2306.05087, counts
    three different votes so); None without a vote."""
    if not labels:
        return None
    (label, most), *others = collections.Counter(labels).most_common()
    return "C" if others and others[0][1] == most else label


def agreement(pairs: Sequence[Pair], verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """The figures of a judge, as JSON values.

    Returns:
      "pairs", "votes": what people labelled. "judged": such pairs with a verdict; "no_verdict": those about which the
        judge was asked and gave none; "not_asked": those without a row. The figures are over the judged ones.
        "unread": judged ones whose verdict could not be read and counts as a tie, as PandaLM counts it.
      "with_ties": votes that equal the verdict, as {"agree", "of", "rate"}; "without_ties": where neither is a tie.
      "humans": the same two of every two votes about one pair, which is the ceiling.
      "majority": the verdict against the majority of votes: "accuracy", and "precision", "recall", "f1" as means over
        the labels.
      "position": of all verdicts in both orders, also those about pairs without a vote, how many are "consistent", of
        how many ("of"), and the "rate"; how often the response shown "first" or "second" won in both orders; the
        accuracy of each order against the majority, their mean, and how often both orders are right.
      "calibration": see `metrics.calibration`, of the probability that the first response is better (or the verdict's
        1, 1/2 and 0) against the mean vote.
      "groups": the same figures of each group, if there are several.

    Raises: EvaluationError: if there are two different verdicts about a pair.
    """
    by_id = _unique(verdicts)
    figures = _figures(pairs, by_id)
    groups = list(dict.fromkeys(pair.group for pair in pairs))
    if len(groups) > 1:
        figures["groups"] = {name: _figures([p for p in pairs if p.group == name], by_id) for name in groups}
    return figures


def _unique(verdicts: Iterable[Verdict]) -> dict[str, Verdict]:
    by_id: dict[str, Verdict] = {}
    for verdict in verdicts:
        if by_id.setdefault(verdict.id, verdict) != verdict:
            raise EvaluationError(f"two different verdicts about the pair {verdict.id!r}; leave one of the rows out")
    return by_id


def _figures(pairs: Sequence[Pair], verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    shown = [(pair, verdicts[pair.id]) for pair in pairs if pair.id in verdicts]
    pairs = [pair for pair in pairs if pair.labels]
    asked = [(pair, verdict) for pair, verdict in shown if pair.labels]
    judged = [(pair, verdict, verdict.winner) for pair, verdict in asked if verdict.winner is not None]
    votes = [(label, winner) for pair, _, winner in judged for label in pair.labels]
    human = [two for pair in pairs for two in itertools.combinations(pair.labels, 2)]
    decided = [(majority(pair.labels), winner) for pair, _, winner in judged]
    probabilities = [SCORES[w] if v.probability is None else v.probability for _, v, w in judged]
    outcomes = [sum(SCORES[label] for label in p.labels) / len(p.labels) for p, *_ in judged]
    return {
        "pairs": len(pairs),
        "votes": sum(len(pair.labels) for pair in pairs),
        "judged": len(judged),
        "no_verdict": len(asked) - len(judged),
        "not_asked": len(pairs) - len(asked),
        "unread": sum(verdict.unread for _, verdict, _ in judged),
        "with_ties": _share(votes),
        "without_ties": _share([vote for vote in votes if "C" not in vote]),
        "humans": {"with_ties": _share(human), "without_ties": _share([vote for vote in human if "C" not in vote])},
        "majority": {"accuracy": _share(decided)["rate"], **macro_scores(*_columns(decided))},
        "position": _position(shown),
        "calibration": calibration(probabilities, outcomes),
    }


def _position(asked: Sequence[tuple[Pair, Verdict]]) -> dict[str, Any]:
    known = [v for _, v in asked if v.is_inconsistent is not None]
    both = [(majority(p.labels), v.orders) for p, v in asked if v.orders is not None and len(v.orders) == 2]
    labelled = [(label, orders) for label, orders in both if label is not None]
    shares = [_share([(label, orders[i]) for label, orders in labelled])["rate"] for i in (0, 1)]
    rates = [rate for rate in shares if rate is not None]
    consistent = sum(not v.is_inconsistent for v in known)
    return {
        "consistent": consistent,
        "of": len(known),
        "rate": consistent / len(known) if known else None,
        "first": sum(orders == ("A", "B") for _, orders in both),
        "second": sum(orders == ("B", "A") for _, orders in both),
        "accuracy_first_order": shares[0],
        "accuracy_second_order": shares[1],
        "accuracy_mean": sum(rates) / len(rates) if rates else None,
        "accuracy_both": _share([(True, set(orders) == {label}) for label, orders in labelled])["rate"],
    }


def _share(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    agree = sum(a == b for a, b in pairs)
    return {"agree": agree, "of": len(pairs), "rate": agree / len(pairs) if pairs else None}


def _columns(rows: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [a for a, _ in rows], [b for _, b in rows]


# ---------------------------------------------------------------------------------------------------- orders of several


def orders(pairs: Sequence[Pair], verdicts: Iterable[Verdict]) -> dict[str, Any] | None:
    """How the judge orders all who responded to an item, and all models over all items, by their mean score in the
    pairs (1 for a win, 1/2 for a tie): `ranking_figures` of the items as rankings, and "models", the "spearman" and
    "kendall" of the mean scores of all models. None if no item has a third response."""
    by_id = _unique(verdicts)
    votes = [(pair, label) for pair in pairs for label in pair.labels]
    judged = [(p, v.winner) for p in pairs if (v := by_id.get(p.id)) is not None and v.winner is not None]
    human, judge = _mean_scores(votes, by_item=True), _mean_scores(judged, by_item=True)
    ranked, judgments = [], []
    for item in dict.fromkeys(pair.item for pair in pairs):
        names = sorted(name for place, name in human if place == item)
        if not names:
            continue
        levels = sorted({human[item, name] for name in names}, reverse=True)
        ranks = tuple(levels.index(human[item, name]) for name in names)
        ranked.append(RankedResponses(id=item, messages=(), responses=tuple(names), ranks=ranks))
        judgments += [_judgment(item, i, judge.get((item, name))) for i, name in enumerate(names)]
    if all(len(record.responses) < 3 for record in ranked):
        return None
    by_human, by_judge = _mean_scores(votes, by_item=False), _mean_scores(judged, by_item=False)
    names = sorted(by_human.keys() & by_judge.keys())
    scores = [[means[name] for name in names] for means in (by_human, by_judge)]
    models = {"models": len(names), "spearman": spearman(*scores), "kendall": kendall(*scores)}
    return ranking_figures(ranked, judgments, top=1.0) | {"models": models}


def ranking_figures(
    ranked: Sequence[RankedResponses], judgments: Sequence[Judgment], top: float
) -> dict[str, float | int | None]:
    """`judge_quality`, but "spearman" and "kendall" are means over the prompts on which the judge orders anything.
    In training a judge that ties everything must not look well, and counts as 0 there; "constant_share" is the share of
    prompts on which it does. None if it does so on all of them."""
    figures = judge_quality(ranked, judgments, top)
    ordered = 1 - (figures["constant_share"] or 0.0)
    means = {name: figures[name] for name in ("spearman", "kendall")}
    return figures | {name: mean / ordered if mean is not None and ordered else None for name, mean in means.items()}


def _mean_scores(rows: Sequence[tuple[Pair, Winner]], *, by_item: bool) -> dict[tuple[str, str], float]:
    """The mean score of each (item, who responded), or of each who responded over all items."""
    scores = collections.defaultdict(list)
    for pair, label in rows:
        item = pair.item if by_item else ""
        scores[item, pair.first].append(SCORES[label])
        scores[item, pair.second].append(1.0 - SCORES[label])
    return {key: sum(values) / len(values) for key, values in scores.items()}


def _judgment(item: str, number: int, score: float | None) -> Judgment:
    return Judgment(
        id=f"{item}#{number}", prompt_id=item, scores=(score,), score=score, texts=(), fingerprint="", template=""
    )


# ---------------------------------------------------------------------------------------------------- scores of models


def score_correlations(scores: Mapping[str, Mapping[str, float]], truth: str) -> dict[str, dict[str, Any]]:
    """How far each benchmark orders models as another does, such as the Elo of people's votes.

    Args:
      scores: of each benchmark the score of each model.
      truth: the benchmark to compare the others with.

    Returns: of each other benchmark {"models", "spearman", "kendall"} over the models that have both scores.
    """
    found = {}
    for name, values in scores.items():
        both = [model for model in values if model in scores[truth]]
        columns = [[score[model] for model in both] for score in (values, scores[truth])]
        figures = {"models": len(both), "spearman": spearman(*columns), "kendall": kendall(*columns)}
        found |= {name: figures} if name != truth else {}
    return found
