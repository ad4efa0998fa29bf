"""A reviser's training data: pairs from ranked responses, their revision labels, and the examples built from them.

SEFT (arXiv 2406.10813) has revision labels and measures how difficult a revision is. That the warm-up reviser's
perplexity decides between rewrite and correct is from memory, without a source.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxsi.lm import LM
from jaxsi.runs import metrics
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Message, RankedResponses, SFTExample
from jaxsi.sampling import scoring
from jaxsi.stages.pairs import check_rankings
from jaxsi.stages.prompts.reviser import ReviserTemplate
from jaxsi.text.chat import naming, render_prompt, render_response
from jaxsi.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class RevisionPair:
    """A response and its target revision: (x, y_l, y_h), or (x, y, y) if it is the best response to its prompt.

    ``gap``: the number of ranks by which the target is better; 0 if it is the response itself. ``price``: how hard the
    target is for the warm-up reviser. ``label``: one of the template's labels; None until the pair is labelled.
    """

    id: str
    messages: tuple[Message, ...]
    response: str
    target: str
    gap: int
    price: float | None = None
    label: str | None = None


def revision_pairs(
    ranked: Sequence[RankedResponses], fits: Callable[[RevisionPair], bool] = lambda pair: True
) -> tuple[list[RevisionPair], dict[str, int]]:
    """Every response of each ranking with the best one as its target; those that share the best rank target themselves.

    Args:
      fits: whether a pair's texts are short enough.

    Returns: pairs with the ids of their responses (number i of ranking r is "r#i"), and counts: prompts, pairs, keep
      (pairs whose response is the target), "ties" (prompts whose ranks are all equal, so that no response is known to
      be good), and the responses left out: "empty" (only white space), "equal" (same text as the best one, but ranked
      below it), "too_long".

    Raises: ValueError if a prompt's ranks do not match its responses, or if an id occurs twice; the message names it.
    """
    check_rankings(ranked)
    counts = Counter(dict.fromkeys(("prompts", "pairs", "keep", "ties", "empty", "equal", "too_long"), 0))
    pairs = []
    for record in ranked:
        counts["prompts"] += 1
        rows = [(rank, i) for i, rank in enumerate(record.ranks) if record.responses[i].strip()]
        counts["empty"] += len(record.ranks) - len(rows)
        if len({rank for rank, _ in rows}) < 2:
            counts["ties"] += 1
            continue
        best_rank, best = min(rows)
        for rank, i in rows:
            text, gap = record.responses[i], rank - best_rank
            target = record.responses[best] if gap else text
            pair = RevisionPair(id=f"{record.id}#{i}", messages=record.messages, response=text, target=target, gap=gap)
            if gap and text == target:
                counts["equal"] += 1
            elif not fits(pair):
                counts["too_long"] += 1
            else:
                counts["keep"] += gap == 0
                pairs.append(pair)
    counts["pairs"] = len(pairs)
    return pairs, dict(counts)


def longest_text(tokenizer: Tokenizer, pair: RevisionPair, template: ReviserTemplate) -> int:
    """Tokens of the longest text that the pair can become: the longest request plus the longest answer of any label."""
    requests = [ask(pair.messages, pair.response) for ask in (template.ask, template.ask_warm_up)]
    answers = [render_response(tokenizer, template.write(label, pair.target)) for label in template.labels]
    with naming(f"ranking {pair.id.rpartition('#')[0]!r}"):
        return max(len(render_prompt(tokenizer, messages)) for messages in requests) + max(map(len, answers))


@stored_as("revision_data.perplexities")
def perplexities(lm: LM, pairs: Sequence[RevisionPair], template: ReviserTemplate, batch_size: int) -> list[float]:
    """exp(-(1/|y_h|) log P(y_h | x, y_l)) of each pair under the warm-up reviser: high if the revision is hard."""
    requests = [render_prompt(lm.tokenizer, template.ask_warm_up(pair.messages, pair.response)) for pair in pairs]
    return np.exp(_mean_losses(lm, requests, pairs, batch_size)).tolist()


@stored_as("revision_data.relative_perplexities")
def relative_perplexities(
    lm: LM, pairs: Sequence[RevisionPair], template: ReviserTemplate, batch_size: int
) -> list[float]:
    """`perplexities` divided by exp(-(1/|y_h|) log P(y_h | x)), which removes the difficulty of y_h itself."""
    alone = [render_prompt(lm.tokenizer, pair.messages) for pair in pairs]
    losses = np.exp(-_mean_losses(lm, alone, pairs, batch_size))
    return (np.asarray(perplexities(lm, pairs, template, batch_size)) * losses).tolist()


def _mean_losses(
    lm: LM, requests: Sequence[Sequence[int]], pairs: Sequence[RevisionPair], batch_size: int
) -> np.ndarray:
    """Mean negative log-likelihood [N] float64 of each target's tokens, including the end of turn."""
    targets = [render_response(lm.tokenizer, pair.target) for pair in pairs]
    logps = scoring.score_ids(lm, requests, targets, batch_size=batch_size)
    return np.asarray([-row.mean(dtype=np.float64) for row in logps])


@stored_as("revision_data.by_price")
def by_price(pairs: Sequence[RevisionPair], template: ReviserTemplate, threshold: float | None) -> list[RevisionPair]:
    """Labels a pair a rewrite if its price is above ``threshold`` (None: the median price), else a correction; keep if
    its response is the target."""
    prices = [pair.price for pair in pairs if pair.gap and pair.price is not None]
    limit = float(np.median(prices)) if threshold is None and prices else threshold
    return [replace(pair, label=template.no if not pair.gap else _label(template, pair.price, limit)) for pair in pairs]


@stored_as("revision_data.by_gap")
def by_gap(pairs: Sequence[RevisionPair], template: ReviserTemplate, threshold: float | None) -> list[RevisionPair]:
    """Labels a pair a rewrite if its target is more than ``threshold`` ranks better, else a correction; keep if its
    response is the target. None is 2: Nectar's ranks 2 and 3 are corrected, 4 to 7 rewritten."""
    limit = 2 if threshold is None else threshold
    return [replace(pair, label=template.no if not pair.gap else _label(template, pair.gap, limit)) for pair in pairs]


def _label(template: ReviserTemplate, value: float | None, limit: float | None) -> str:
    if value is None or limit is None:
        raise ValueError("a pair has no price; price the pairs before labelling them by price")
    return template.major if value > limit else template.minor


@stored_as("revision_data.LabelConfig")
@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """How pairs are labelled: ``pricing`` is `perplexities` or `relative_perplexities`, ``labelling`` is `by_price` or
    `by_gap`, ``threshold`` the latter's. ``mix``: the proportions of rewrite, correct and keep among the reviser's
    examples."""

    pricing: Callable[..., list[float]] = perplexities
    labelling: Callable[..., list[RevisionPair]] = by_price
    threshold: float | None = None
    mix: tuple[float, float, float] = (1.0, 1.0, 1.0)
    batch_size: int = 64

    def __post_init__(self) -> None:
        if not all(0 <= share < math.inf for share in self.mix) or max(self.mix) <= 0 or self.batch_size < 1:
            raise ValueError(
                f"mix is {self.mix} (three shares >= 0, one of them > 0) and batch_size {self.batch_size} (>= 1)"
            )


def label_pairs(
    warm: LM, pairs: Sequence[RevisionPair], template: ReviserTemplate, cfg: LabelConfig
) -> list[RevisionPair]:
    """The pairs with their prices under the warm-up reviser and their labels."""
    changed = [pair for pair in pairs if pair.gap]
    prices = dict(zip([p.id for p in changed], cfg.pricing(warm, changed, template, cfg.batch_size), strict=True))
    return cfg.labelling([replace(pair, price=prices.get(pair.id)) for pair in pairs], template, cfg.threshold)


def label_statistics(labelled: Sequence[RevisionPair], template: ReviserTemplate) -> dict[str, float | None]:
    """Numbers of pairs by label, the median price, and how well price and rank gap agree: Spearman's rho over the pairs
    that change, and the share of them that both labellings, with their default thresholds, label alike."""
    counts = Counter(pair.label for pair in labelled)
    changed = [pair for pair in labelled if pair.gap]
    prices = [pair.price for pair in changed if pair.price is not None]
    same = [
        a.label == b.label
        for a, b in zip(by_price(changed, template, None), by_gap(changed, template, None), strict=True)
    ]
    return {
        **{label: float(counts[label]) for label in template.labels},
        "median_price": float(np.median(prices)) if prices else None,
        "rank_agreement": metrics.spearman(prices, [pair.gap for pair in changed]) if len(prices) > 1 else None,
        "same_label": sum(same) / len(same) if same else None,
    }


def warm_up_examples(pairs: Sequence[RevisionPair], template: ReviserTemplate) -> list[SFTExample]:
    """(x, y_l) -> y_h of each pair that changes something."""
    return [
        SFTExample(id=pair.id, messages=template.ask_warm_up(pair.messages, pair.response), response=pair.target)
        for pair in pairs
        if pair.gap
    ]


def reviser_examples(
    labelled: Sequence[RevisionPair], template: ReviserTemplate, mix: Sequence[float], seed: int
) -> list[SFTExample]:
    """(x, y) -> label, then y_h (the response itself under the label keep), in the proportions of ``mix``.

    The selection is the largest one in these proportions. It is drawn by ``seed`` and the pairs' ids, independently of
    their order. A label with share 0 is left out.
    """
    groups = [[pair for pair in labelled if pair.label == label] for label in template.labels]
    unit = min(len(group) / share for group, share in zip(groups, mix, strict=True) if share)
    if not unit:
        have = ", ".join(f"{len(group)} {label!r}" for group, label in zip(groups, template.labels, strict=True))
        raise ValueError(
            f"mix {tuple(mix)} needs pairs of each label, but the {len(labelled)} pairs are {have}; choose another "
            "labelling or threshold, or a share of 0"
        )
    drawn = {
        pair.id
        for group, share in zip(groups, mix, strict=True)
        for pair in sorted(group, key=lambda pair: hashlib.sha256(f"{seed}\0{pair.id}".encode()).digest())[
            : round(unit * share)
        ]
    }
    return [
        SFTExample(
            id=pair.id,
            messages=template.ask(pair.messages, pair.response),
            response=template.write(pair.label, pair.target),
        )
        for pair in labelled
        if pair.id in drawn and pair.label is not None
    ]
