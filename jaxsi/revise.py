"""Revision labels, the data a reviser learns from, and revision itself (SEFT, arXiv 2406.10813; reconstructed).

A reviser reads a prompt and a draft, writes a label (rewrite, correct, keep) and then the final answer. The label is
the one whose whole string is the likeliest; a draft to be kept is copied by this code, never written again. The
probability of that label is also a score of the draft, at no extra cost.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxsi import metrics, sampling, scoring
from jaxsi.chat import render_prompt, render_response
from jaxsi.lm import LM
from jaxsi.pairs import check_rankings
from jaxsi.prompts import question_text
from jaxsi.prompts.reviser import ReviserTemplate
from jaxsi.records import Message, Prompt, RankedResponses, Response, Revision, SFTExample
from jaxsi.tokenizer import Tokenizer

# Beginnings of answers: what all of them share after a label belongs to the label.
_PROBES = ("the", "A", "1", '"', "#", "é")


@dataclass(frozen=True, kw_only=True)
class ReviseConfig:
    """How a reviser writes the answers of drafts that it does not keep; its label is never sampled. ``batch_size`` rows
    are in flight at a time."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 64

    def __post_init__(self) -> None:
        sampling.SamplingConfig(temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it is at least 1")


@dataclass(frozen=True, kw_only=True)
class RevisionPair:
    """A response and what a reviser should make of it: (x, y_l, y_h), or (x, y, y) where it is the best of its prompt.

    ``gap``: by how many ranks the target is better, 0 where it is the response itself. ``price``: what the target costs
    the warm-up reviser. ``label``: one of the template's, None until the pair is labelled.
    """

    id: str
    messages: tuple[Message, ...]
    response: str
    target: str
    gap: int
    price: float | None = None
    label: str | None = None


# ------------------------------------------------------------------------------------------------------- labels of data


def revision_pairs(
    ranked: Sequence[RankedResponses], fits: Callable[[RevisionPair], bool] = lambda pair: True
) -> tuple[list[RevisionPair], dict[str, int]]:
    """Every response of each ranking with the best one as its target; a response ranked like the best is its own.

    Args:
      fits: whether a pair's texts are short enough.

    Returns: pairs with the ids of their responses (number i of ranking r is "r#i"), and counts: prompts, pairs, keep
      (pairs whose response is the target), "ties" (prompts whose ranks are all equal: none is known to be good), and
      the responses left out: "empty" (but for white space), "equal" (the text of the best one, ranked below it),
      "too_long".

    Raises: ValueError naming a prompt whose ranks do not fit its responses, or an id that is doubled.
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


def perplexities(lm: LM, pairs: Sequence[RevisionPair], template: ReviserTemplate, batch_size: int) -> list[float]:
    """exp(-(1/|y_h|) log P(y_h | x, y_l)) of each pair under the warm-up reviser: dear where the revision is hard."""
    requests = [render_prompt(lm.tokenizer, warm_up_messages(template, pair)) for pair in pairs]
    return np.exp(_mean_losses(lm, requests, pairs, batch_size)).tolist()


def relative_perplexities(
    lm: LM, pairs: Sequence[RevisionPair], template: ReviserTemplate, batch_size: int
) -> list[float]:
    """`perplexities` divided by exp(-(1/|y_h|) log P(y_h | x)): what is left when the difficulty of y_h itself is taken
    off."""
    alone = [render_prompt(lm.tokenizer, pair.messages) for pair in pairs]
    losses = np.exp(-_mean_losses(lm, alone, pairs, batch_size))
    return (np.asarray(perplexities(lm, pairs, template, batch_size)) * losses).tolist()


def _mean_losses(
    lm: LM, requests: Sequence[Sequence[int]], pairs: Sequence[RevisionPair], batch_size: int
) -> np.ndarray:
    """Mean negative log-likelihood [N] float64 of each target's tokens, the end of turn included."""
    targets = [render_response(lm.tokenizer, pair.target) for pair in pairs]
    logps = scoring.score_ids(lm, requests, targets, batch_size=batch_size)
    return np.asarray([-row.mean(dtype=np.float64) for row in logps])


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """How pairs are labelled. ``pricing``: `perplexities` or `relative_perplexities`; ``labelling``: `by_price`, above
    ``tau`` (None: the median price) a rewrite, or `by_gap`, from ``large_gap`` ranks on a rewrite (Nectar's ranks 4 to
    7)."""

    pricing: Callable[..., list[float]] = perplexities
    labelling: Callable[..., list[RevisionPair]] = lambda pairs, template, cfg: by_price(pairs, template, cfg)
    tau: float | None = None
    large_gap: int = 3
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.large_gap < 1 or self.batch_size < 1:
            raise ValueError(f"large_gap is {self.large_gap} and batch_size {self.batch_size}; both are at least 1")
