"""EFT, the judge's own training data (Self-Rewarding, arXiv 2401.10020): judgments that rank as people do. For a judge
that compares, those of Self-Taught Evaluators (arXiv 2408.02666)."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from jaxsi.runs.records import Judgment, Prompt, RankedResponses, SFTExample
from jaxsi.stages.prompts import Rubric, question_text, up_to_verdict
from jaxsi.stages.prompts.comparison import PairwiseRubric
from jaxsi.stages.rankings import Agrees, judged_by_id, normal, normal_question, whole_order


def eft_examples(
    ranked: Sequence[RankedResponses],
    judgments: Sequence[Judgment],
    rubric: Rubric,
    *,
    agrees: Agrees = whole_order,
    max_share: float = 0.4,
    seed: int = 0,
    ift: Sequence[SFTExample] = (),
    test: Sequence[RankedResponses] = (),
) -> tuple[list[SFTExample], dict[str, float]]:
    """Judge prompt -> justification and score: the judge's own texts for prompts on which it agrees with humans.

    The paper's rule: judge human-ranked responses, keep those on which the orders agree, leave out the pairs (question,
    response) of IFT, and resample so that no score dominates. Here the first of the K judgments counts whose verdicts
    order the responses as people did. Then the scores that hold more than `max_share` of the examples are thinned out,
    by `seed` and independent of the order of the records.

    Args:
      judgments: of `as_responses(ranked)`, joined by id; the target is the text up to its verdict.
      agrees: when verdicts order the responses as people did; `rankings.no_reversal` is a lenient rule.
      ift: demonstrations. Their responses help to order the others, and are not examples themselves.
      test: rankings that measure the judge. Their questions are left out whole, with all responses.

    Returns: examples with the ids of their responses, and counts. Of prompts: "prompts", "in_test", "disagree" (none of
      the K agrees), "agree". Of responses to prompts that agree: "in_ift", "no_justification" (a bare score),
      "thinned", "examples"; and "max_share_raised_to" if the kept examples have so few different scores that
      `max_share` cannot be met.

    Raises: ValueError: if the judgments do not fit `ranked`.
    """
    if not 0.0 < max_share <= 1.0:
        raise ValueError(f"max_share is {max_share}; give a number in (0, 1]")
    by_id = judged_by_id(ranked, judgments)
    demonstrated = {(normal_question(example.messages), normal(example.response)) for example in ift}
    tested = {normal_question(record.messages) for record in test}
    counts = dict.fromkeys(("in_test", "disagree", "agree", "in_ift", "no_justification"), 0)
    candidates: list[tuple[int, SFTExample]] = []
    for record in ranked:
        question = normal_question(record.messages)
        if question in tested:
            counts["in_test"] += 1
            continue
        verdicts = _first_agreeing(record, by_id, rubric, agrees)
        counts["agree" if verdicts else "disagree"] += 1
        for i, score, text in verdicts:
            target = up_to_verdict(text)
            if (question, normal(record.responses[i])) in demonstrated:
                counts["in_ift"] += 1
            elif target is None or not re.search(r"\w", target[: target.lower().rindex("score")]):
                counts["no_justification"] += 1
            else:
                judge_prompt = rubric.render(question_text(record.messages), record.responses[i])
                messages = Prompt.of("", judge_prompt).messages
                candidates.append((score, SFTExample(id=f"{record.id}#{i}", messages=messages, response=target)))
    least = 1 / max(len({score for score, _ in candidates}), 1)
    examples = _thinned(candidates, max(max_share, least), seed)
    statistics = {
        "prompts": len(ranked),
        **counts,
        "thinned": len(candidates) - len(examples),
        "examples": len(examples),
    }
    return examples, statistics | ({"max_share_raised_to": least} if candidates and least > max_share else {})


def comparison_examples(
    ranked: Sequence[RankedResponses],
    judgments: Sequence[Judgment],
    rubric: PairwiseRubric,
    *,
    ift: Sequence[SFTExample] = (),
    test: Sequence[RankedResponses] = (),
) -> tuple[list[SFTExample], dict[str, float]]:
    """Judge prompt of two responses -> justification and verdict: Self-Taught Evaluators' data (2408.02666), which are
    the judge's own texts whose verdict is the known one.

    A pair of responses is kept if people ordered it, and in both orders a text names the better one: the first such
    text of each order is an example. So A and B are right equally often, and a judge cannot learn a place.

    Args:
      judgments: of `as_responses(ranked)`, by `rubric`; see `verdicts.judged`.
      ift: demonstrations. A pair of which one response is a demonstration of its question is left out.
      test: rankings that measure the judge. Their questions are left out whole.

    Returns: examples with the ids "prompt#first#second", and counts: "prompts", "in_test"; of ordered pairs: "pairs",
      "unread" (a request was too long, or the texts are equal), "in_ift", "no_justification" (a bare verdict),
      "disagree", "agree"; "examples", two for each pair that agrees.

    Raises: ValueError: if the judgments do not fit `ranked`.
    """
    by_id = judged_by_id(ranked, judgments)
    demonstrated = {(normal_question(example.messages), normal(example.response)) for example in ift}
    tested = {normal_question(record.messages) for record in test}
    counts = dict.fromkeys(("in_test", "pairs", "unread", "in_ift", "no_justification", "disagree", "agree"), 0)
    examples: list[SFTExample] = []
    for record in ranked:
        question = normal_question(record.messages)
        if question in tested:
            counts["in_test"] += 1
            continue
        for i, j in combinations(range(len(record.responses)), 2):
            if record.ranks[i] == record.ranks[j]:
                continue
            counts["pairs"] += 1
            both = [_comparisons(record, by_id, a, b) for a, b in ((i, j), (j, i))]
            outcome, texts = _right_in_both(both, rubric, record.ranks[i] < record.ranks[j])
            if any((question, normal(record.responses[k])) in demonstrated for k in (i, j)):
                outcome = "in_ift"
            counts[outcome] += 1
            if outcome == "agree":
                for (a, b), text in zip(((i, j), (j, i)), texts, strict=True):
                    asked = rubric.render(question_text(record.messages), record.responses[a], record.responses[b])
                    messages = Prompt.of("", asked).messages
                    examples.append(SFTExample(id=f"{record.id}#{a}#{b}", messages=messages, response=text))
    return examples, {"prompts": len(ranked), **counts, "examples": len(examples)}


def _comparisons(
    record: RankedResponses, by_id: Mapping[str, Judgment], first: int, second: int
) -> Sequence[str] | None:
    """The K texts that compare two responses of a prompt in this order. None if texts of `first` are missing, so that
    nobody can tell whose they are."""
    judgment, others = by_id[f"{record.id}#{first}"], len(record.responses) - 1
    if not judgment.scores or len(judgment.texts) != len(judgment.scores) or len(judgment.scores) % others:
        return None
    place, samples = second - (second > first), len(judgment.scores) // others
    return judgment.texts[place * samples : (place + 1) * samples]


def _right_in_both(
    orders: Sequence[Sequence[str] | None], rubric: PairwiseRubric, first_is_better: bool
) -> tuple[str, list[str]]:
    """What becomes of a pair, and the first right text of each order up to its verdict."""
    found = []
    for texts, right in zip(orders, "AB" if first_is_better else "BA", strict=True):
        if texts is None:
            return "unread", []
        agreeing = [target for t in texts if rubric.parse(t) == right and (target := rubric.up_to_verdict(t))]
        if not agreeing:
            return "disagree", []
        reasoned = [target for target in agreeing if rubric.has_justification(target)]
        if not reasoned:
            return "no_justification", []
        found.append(reasoned[0])
    return "agree", found


def agreeing_examples(
    ranked: Sequence[RankedResponses], judgments: Sequence[Judgment], rubric: Rubric | PairwiseRubric, **settings: Any
) -> tuple[list[SFTExample], dict[str, float]]:
    """`eft_examples`, or `comparison_examples` for a rubric that compares; there is at least one. Raises: ValueError if
    no judgment agrees with people."""
    if isinstance(rubric, PairwiseRubric):
        known = {name: settings[name] for name in ("ift", "test") if name in settings}  # the others are of scores
        eft, counts = comparison_examples(ranked, judgments, rubric, **known)
    else:
        eft, counts = eft_examples(ranked, judgments, rubric, **settings)
    if not eft:
        raise ValueError(
            f"no judgment of the {len(ranked)} ranked prompts agrees with people ({counts}), so there is no EFT; train "
            "the judge of M_0 first, take the lenient rankings.no_reversal as seed_data.agrees, or leave the rankings "
            "out in a new run directory"
        )
    return eft, counts


def _first_agreeing(
    record: RankedResponses, by_id: Mapping[str, Judgment], rubric: Rubric, agrees: Agrees
) -> list[tuple[int, int, str]]:
    """(response number, score, text) of the first judgment whose scores order the responses as the ranks do."""
    texts = [by_id[f"{record.id}#{i}"].texts for i in range(len(record.responses))]
    for k in range(max(map(len, texts), default=0)):
        scores = [rubric.parse(row[k]) if k < len(row) else None for row in texts]
        if agrees(scores, record.ranks):
            return [(i, score, texts[i][k]) for i, score in enumerate(scores) if score is not None]
    return []


def _thinned(scored: Sequence[tuple[int, SFTExample]], max_share: float, seed: int) -> list[SFTExample]:
    """Examples cut to the same number for each score, so that none exceeds `max_share`; they are drawn by id."""
    sizes = Counter(score for score, _ in scored)
    if not sizes:
        return []
    cap = max(sizes.values())
    while cap > 1 and cap > max_share * sum(min(size, cap) for size in sizes.values()) + 1e-9:
        cap -= 1
    groups: dict[int, list[tuple[bytes, str]]] = defaultdict(list)
    for score, example in scored:
        groups[score].append((hashlib.sha256(f"{seed}\0{example.id}".encode()).digest(), example.id))
    ids = {id for group in groups.values() for _, id in sorted(group)[:cap]}
    return [example for _, example in scored if example.id in ids]
