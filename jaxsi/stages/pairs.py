"""From scored responses to preference pairs: best and worst of each prompt, and the permuted-score control arm.

Scores are joined to responses by id only. An invalid response (no score, or cut off by the token limit) is in no pair.
"""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jaxsi.runs.records import Judgment, Message, PreferencePair, Prompt, RankedResponses, Response

Scored = tuple[float, Response]
Length = Callable[[Response], int]


def tokens(response: Response) -> int:
    """The length of a response in tokens."""
    return len(response.token_ids)


def characters(response: Response) -> int:
    """The length of a response's text in characters."""
    return len(response.text)


def best_and_worst(
    candidates: Sequence[Response],
    judgments: Sequence[Judgment],
    prompts: Sequence[Prompt],
    *,
    length_control: float = 0.0,
    min_gap: float = 0.0,
    reject_cut_off: bool = False,
    choose_cut_off: bool = False,
    length: Length = tokens,
) -> tuple[list[PreferencePair], dict[str, int]]:
    """One pair per prompt: chosen = argmax, rejected = argmin of the mean scores (Self-Rewarding, arXiv 2401.10020).

    A prompt has no pair if fewer than two responses are valid ("too_few"), if best and worst score are equal ("ties"),
    if the gap is below `min_gap` ("small_gap"), or if both responses have the same token ids, or without any the
    same text ("identical"). The sample number breaks ties. The order of candidates and judgments does not matter.

    Args:
      length_control: rho of Meta-Rewarding (arXiv 2407.19594): among responses within rho * (best - worst) of the best
        score, the shortest is chosen; within the same distance of the worst, the longest is rejected.
        0 <= rho < 0.5.
      reject_cut_off, choose_cut_off: allow the rejected, or the chosen response to be one that the token limit cut
        off. It is trained on as it was sampled, without an end of turn. One that was cut off within its thought has no
        answer that a judge could read, so it is in no pair.
      length: how length control measures a response.

    Returns: the pairs in the order of `prompts`, and counts: prompts, pairs, ties, too_few, small_gap, identical, and
      unscored and cut_off responses.

    Raises: ValueError if an id occurs twice, is unknown, or has no judgment; the message names it.
    """
    if not 0.0 <= length_control < 0.5:
        raise ValueError(
            f"length_control is {length_control}; it must lie in [0, 0.5), or best and worst could change places"
        )
    if not min_gap >= 0.0:
        raise ValueError(f"min_gap is {min_gap}; it must be at least 0")
    groups = _joined(candidates, judgments, prompts)
    counts = Counter(dict.fromkeys(("prompts", "pairs", "ties", "too_few", "small_gap", "identical"), 0))
    counts.update(prompts=len(prompts), unscored=0, cut_off=0)
    pairs = []
    for prompt in prompts:
        for response, score in groups[prompt.id]:
            counts["unscored"] += score is None
            counts["cut_off"] += response.finish_reason != "stop"
        answered = [(score, r) for r, score in groups[prompt.id] if r.text or not r.reasoning]
        scored = [(score, response) for score, response in answered if score is not None]
        found = _select(scored, length_control, min_gap, reject_cut_off, choose_cut_off, length)
        if isinstance(found, str):
            counts[found] += 1
            continue
        (chosen_score, chosen), (rejected_score, rejected) = found
        pairs.append(
            PreferencePair(
                id=prompt.id,
                messages=prompt.messages,
                chosen=chosen,
                rejected=rejected,
                chosen_score=chosen_score,
                rejected_score=rejected_score,
            )
        )
    counts["pairs"] = len(pairs)
    return pairs, dict(counts)


@dataclass(frozen=True, kw_only=True)
class PairOfTexts:
    """A line of a file of pairs that other libraries read, too. The prompt is its messages, and each response is one
    turn of the assistant."""

    id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    chosen_score: float
    rejected_score: float


def pairs_of_texts(
    candidates: Sequence[Response],
    judgments: Sequence[Judgment],
    prompts: Sequence[Prompt],
    **options: Any,
) -> tuple[list[PairOfTexts], dict[str, Any]]:
    """`best_and_worst` for those who train on the texts alone: thoughts are left out ("thoughts"), and so are empty
    responses ("empty"). Two equal texts are "identical", whatever their tokens.

    Returns: the pairs; and the counts of `best_and_worst`, these, and the `pair_statistics` in tokens, or in characters
      if a response has no token ids.

    Raises: ValueError as `best_and_worst`.
    """
    length = tokens if all(response.token_ids for response in candidates) else characters
    lengths = {response.id: length(response) for response in candidates}
    empty = {response.id for response in candidates if not response.text.strip()}
    found, counts = best_and_worst(
        [replace(response, token_ids=()) for response in candidates if response.id not in empty],
        [judgment for judgment in judgments if judgment.id not in empty],
        prompts,
        length=lambda response: lengths[response.id],
        **options,
    )
    rows = [
        PairOfTexts(
            id=pair.id,
            prompt=pair.messages,
            chosen=({"role": "assistant", "content": pair.chosen.text},),
            rejected=({"role": "assistant", "content": pair.rejected.text},),
            chosen_score=pair.chosen_score,
            rejected_score=pair.rejected_score,
        )
        for pair in found
    ]
    thoughts = sum(bool(response.reasoning) for pair in found for response in (pair.chosen, pair.rejected))
    statistics = pair_statistics(found, length=lambda response: lengths[response.id], unit=length.__name__)
    return rows, {**counts, "empty": len(empty), "thoughts": thoughts, **statistics}


class Preference(NamedTuple):
    """Two answers to one prompt, of which ``chosen`` is better: (x, y_w, y_l)."""

    id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str


def preferences(ranked: Sequence[RankedResponses]) -> tuple[list[Preference], dict[str, int]]:
    """The best and the worst response of each ranking; among equal ranks, the first.

    Returns: the preferences in the order of `ranked`, and counts: prompts, preferences, "ties" (all ranks equal),
      "empty" (one of the two is only white space) and "identical" ones, which are left out.

    Raises: ValueError if a prompt's ranks do not match its responses, or if an id occurs twice; the message names it.
    """
    counts = Counter(dict.fromkeys(("prompts", "preferences", "ties", "empty", "identical"), 0))
    found: dict[str, Preference] = {}
    check_rankings(ranked)
    for record in ranked:
        chosen = record.responses[record.ranks.index(min(record.ranks))]
        rejected = record.responses[record.ranks.index(max(record.ranks))]
        counts["prompts"] += 1
        if min(record.ranks) == max(record.ranks):
            counts["ties"] += 1
        elif not chosen.strip() or not rejected.strip():
            counts["empty"] += 1
        elif chosen == rejected:
            counts["identical"] += 1
        else:
            found[record.id] = Preference(record.id, record.messages, chosen, rejected)
    counts["preferences"] = len(found)
    return list(found.values()), dict(counts)


def check_rankings(ranked: Sequence[RankedResponses]) -> None:
    """Raises ValueError if a prompt's ranks do not match its responses, or if an id occurs twice; names the prompt."""
    seen: set[str] = set()
    for record in ranked:
        if len(record.ranks) != len(record.responses) or not record.ranks or record.id in seen:
            raise ValueError(
                f"ranking {record.id!r}: {len(record.responses)} responses, {len(record.ranks)} ranks; give each "
                "response a rank, and each ranking a unique id"
            )
        seen.add(record.id)


def permuted_within_prompt(judgments: Sequence[Judgment], seed: int | str) -> list[Judgment]:
    """The control arm: the verdicts (scores, mean, texts) of each prompt's scored responses, permuted at random.

    The same responses have scores, so about as many pairs arise, but the scores no longer say anything about them. A
    prompt's permutation depends on `seed`, its id and its judgments' ids, not on the order of `judgments`, which is
    preserved.
    """
    groups: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        if judgment.score is not None:
            groups[judgment.prompt_id].append(judgment)
    dealt: dict[str, Judgment] = {}
    for prompt_id, group in groups.items():
        group = sorted(group, key=lambda judgment: judgment.id)
        digest = hashlib.sha256(f"{seed}\0{prompt_id}".encode()).digest()
        sources = random.Random(int.from_bytes(digest, "big")).sample(group, len(group))
        for target, source in zip(group, sources, strict=True):
            if target.id in dealt:
                raise ValueError(f"two judgments have the id {target.id!r}; ids are unique")
            dealt[target.id] = replace(target, scores=source.scores, score=source.score, texts=source.texts)
    return [dealt.get(judgment.id, judgment) for judgment in judgments]


def pair_statistics(
    pairs: Sequence[PreferencePair], *, length: Length = tokens, unit: str = "tokens"
) -> dict[str, float | None]:
    """Means over the pairs, None without pairs: score gap, length of chosen and rejected in ``unit``, and their
    difference (the signal that makes responses longer from iteration to iteration)."""
    if not pairs:
        return dict.fromkeys(("gap", f"chosen_{unit}", f"rejected_{unit}", "length_difference"))
    chosen = sum(length(pair.chosen) for pair in pairs) / len(pairs)
    rejected = sum(length(pair.rejected) for pair in pairs) / len(pairs)
    gap = sum(pair.chosen_score - pair.rejected_score for pair in pairs) / len(pairs)
    return {
        "gap": gap,
        f"chosen_{unit}": chosen,
        f"rejected_{unit}": rejected,
        "length_difference": chosen - rejected,
    }


def _select(
    scored: Sequence[Scored], rho: float, min_gap: float, reject_cut_off: bool, choose_cut_off: bool, length: Length
) -> tuple[Scored, Scored] | str:
    """(score, response) of chosen and rejected, or the name of the count that says why there is no pair."""
    finished = [(score, response) for score, response in scored if response.finish_reason == "stop"]
    choosable = scored if choose_cut_off else finished
    rejectable = scored if reject_cut_off else finished
    if not choosable or not rejectable or max(len(choosable), len(rejectable)) < 2:
        return "too_few"
    best = max(score for score, _ in choosable)
    worst = min(score for score, _ in rejectable)
    if best <= worst:
        return "ties"
    window = rho * (best - worst)
    # Length only counts under length control; otherwise ties at the top would favour short responses.
    measured = length if rho else (lambda response: 0)
    top = [(score, response) for score, response in choosable if score >= best - window]
    bottom = [(score, response) for score, response in rejectable if score <= worst + window]
    chosen = min(top, key=lambda pair: (measured(pair[1]), -pair[0], pair[1].sample))
    rejected = min(bottom, key=lambda pair: (-measured(pair[1]), pair[0], pair[1].sample))
    if chosen[0] - rejected[0] < min_gap:
        return "small_gap"
    if _contents(chosen[1]) == _contents(rejected[1]):
        return "identical"
    return chosen, rejected


def _contents(response: Response) -> tuple[int, ...] | str:
    return response.token_ids or response.text


def _joined(
    candidates: Sequence[Response], judgments: Sequence[Judgment], prompts: Sequence[Prompt]
) -> dict[str, list[tuple[Response, float | None]]]:
    """Responses with their scores, by prompt id, ordered by sample number."""
    _check_unique("prompt", (prompt.id for prompt in prompts))
    _check_unique("response", (response.id for response in candidates))
    _check_unique("judgment", (judgment.id for judgment in judgments))
    by_id = {judgment.id: judgment for judgment in judgments}
    groups: dict[str, list[tuple[Response, float | None]]] = {prompt.id: [] for prompt in prompts}
    for response in sorted(candidates, key=lambda response: (response.sample, response.id)):
        judgment = by_id.pop(response.id, None)
        if judgment is None:
            raise ValueError(
                f"response {response.id!r} has no judgment; judge every candidate (a failed one has score None)"
            )
        if response.prompt_id not in groups or judgment.prompt_id != response.prompt_id:
            raise ValueError(
                f"response {response.id!r} is of prompt {response.prompt_id!r}, "
                f"its judgment of {judgment.prompt_id!r}; both must name the same prompt of this call"
            )
        groups[response.prompt_id].append((response, judgment.score))
    if by_id:
        raise ValueError(f"judgment {min(by_id)!r} belongs to no candidate; pass the candidates that were judged")
    return groups


def _check_unique(kind: str, ids: Iterable[str]) -> None:
    doubled = [value for value, count in Counter(ids).items() if count > 1]
    if doubled:
        raise ValueError(f"{len(doubled)} {kind} ids occur more than once, the first is {doubled[0]!r}; ids are unique")
