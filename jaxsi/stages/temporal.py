"""Pairs of Temporal Self-Rewarding (Wang et al. 2025, arXiv 2508.06026): the rejected response may come from a past
model, the chosen one from a model of the future. All are judged by the present model."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from jaxsi.runs.records import Judgment, PreferencePair, Prompt, Response


class Judged(NamedTuple):
    """A model's responses, and the present model's judgments of them."""

    responses: Sequence[Response]
    judgments: Sequence[Judgment]


def anchored_pairs(
    prompts: Sequence[Prompt], present: Judged, past: Judged, *, cut_off: bool = False
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Phase 1, anchored rejection. Chosen: the best of the present model. Rejected: the worst of the past model if its
    score is below that of the present model's worst, else the present model's worst. Equal scores: the first sample.

    Args:
      cut_off: whether responses that the token limit cut off may be in pairs.

    Returns: the pairs in the order of ``prompts``, and counts: prompts, pairs, "past" (rejected responses of the past
      model), "ties" (chosen and rejected have the same score), "too_few" (the present model has no scored response).
    """
    own, older = _by_prompt(present, cut_off), _by_prompt(past, cut_off)
    counts = Counter(prompts=len(prompts), pairs=0, past=0, ties=0, too_few=0)
    pairs = []
    for prompt in prompts:
        candidates, anchors = own.get(prompt.id, []), older.get(prompt.id, [])
        if not candidates:
            counts["too_few"] += 1
            continue
        best, worst = max(candidates, key=_score), min(candidates, key=_score)
        anchor = min(anchors, key=_score, default=None)
        rejected = anchor if anchor is not None and anchor[0] < worst[0] else worst
        if best[0] == rejected[0]:
            counts["ties"] += 1
            continue
        counts["past"] += rejected is anchor
        pairs.append(_pair(prompt, best, rejected))
    counts["pairs"] = len(pairs)
    return pairs, dict(counts)


def future_guided(
    pairs: Sequence[PreferencePair], future: Judged, *, cut_off: bool = False
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Phase 2, future-guided choice: the best response of the future model takes the place of the chosen one if its
    score is higher; the rejected one stays. Counts: pairs, and "future" (chosen responses of the future model)."""
    ahead = _by_prompt(future, cut_off)
    guided = []
    for pair in pairs:
        best = max(ahead.get(pair.id, []), key=_score, default=None)
        chosen = (pair.chosen_score, pair.chosen)
        if best is not None and best[0] > pair.chosen_score:
            chosen = best
        guided.append(_pair(pair, chosen, (pair.rejected_score, pair.rejected)))
    replaced = sum(new.chosen is not old.chosen for new, old in zip(guided, pairs, strict=True))
    return guided, {"pairs": len(guided), "future": replaced}


Scored = tuple[float, Response]


def _score(scored: Scored) -> float:
    return scored[0]


def _by_prompt(judged: Judged, cut_off: bool) -> dict[str, list[Scored]]:
    """The scored responses to each prompt, in the order of their samples."""
    scores = {judgment.id: judgment.score for judgment in judged.judgments}
    found: dict[str, list[Scored]] = {}
    for response in sorted(judged.responses, key=lambda response: response.sample):
        score = scores[response.id]
        whole = response.finish_reason == "stop" or (cut_off and (response.text or not response.reasoning))
        if score is not None and whole:
            found.setdefault(response.prompt_id, []).append((score, response))
    return found


def _pair(prompt: Prompt | PreferencePair, chosen: Scored, rejected: Scored) -> PreferencePair:
    return PreferencePair(
        id=prompt.id,
        messages=prompt.messages,
        chosen=chosen[1],
        rejected=rejected[1],
        chosen_score=chosen[0],
        rejected_score=rejected[0],
    )
