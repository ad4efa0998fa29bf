"""Responses improved at inference time: a draft for each prompt, then rounds that improve it by one of five methods.

    y_0 ~ M(. | x);    y_r from x and y_0 .. y_{r-1},  r = 1 .. K

    method       a round writes                           y_r is new if                 score (of y_r, except in pit)
    srt          feedback on y, then a refined y          round 1: always; later:       the score that M itself gives it
                                                          its score rises
    seft         a label, then a revised y                the label is not NO           the reviser's P(NO)
    pit          the improver's y                         the gap reward sees a gain    the newest response's gain
    self_refine  feedback, then a y that follows it       the feedback lacks "enough"   none
    best_of_n    N samples                                one of them scores higher     the judge's or reward model's

arXiv 2406.07168, 2406.10813, 2310.00898, 2303.17651. This module holds the loop and what the methods share; each method
is a module beside it. A prompt ends after the first round that does not improve its response; with best_of_n it goes on
to more samples. The first round of srt is the paper's; with its ``gate``, a score that rises decides there, too. That
rule of srt and PIT's rule are ours.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from jaxsi.lm import LM
from jaxsi.runs import metrics
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Improvement, Outcome, Prompt, Response, as_prompts
from jaxsi.sampling.generate import SamplingConfig, generate
from jaxsi.stages.answers import with_room

Past = tuple[Improvement, ...]  # one prompt's records so far, round 0 first
Item = tuple[Prompt, Past]
Draft = Callable[[Sequence[Prompt], jax.Array], list[Improvement]]
Round = Callable[[Sequence[Item], jax.Array], list[Improvement]]
Stage = Callable[[Sequence[Any]], list[Improvement]]
Keep = Callable[[int, Sequence[Any], Stage], list[Improvement]]


class Scored(NamedTuple):
    """A response's score (None if it could not be scored) and the number of tokens generated to score it."""

    score: float | None
    tokens: int


Scorer = Callable[[Sequence[Prompt], Sequence[Response], jax.Array], list[Scored]]


# ------------------------------------------------------------------------------------------------------------- the loop


def is_new(record: Improvement) -> bool:
    """Whether the record's round produced a new response."""
    return record.outcome in ("draft", "accepted")


def has_response(record: Improvement) -> bool:
    """Whether the prompt has a response at all."""
    return bool(record.response.token_ids)


class Method(NamedTuple):
    """How round 0 drafts, how a later round improves the prompts that go on, and which prompts go on."""

    draft: Draft
    round: Round
    goes_on: Callable[[Improvement], bool] = is_new


def call_stage(number: int, items: Sequence[Any], stage: Stage) -> list[Improvement]:
    """Computes a round's stage and stores nothing."""
    return stage(items)


def improve(
    prompts: Sequence[Prompt | str],
    method: Method,
    *,
    rounds: int = 1,
    seed: int = 0,
    grade: Scorer | None = None,
    keep: Keep = call_stage,
) -> list[list[Improvement]]:
    """Drafts a response to each prompt and improves it ``rounds`` times, e.g.
    ``improve(["Why is the sky blue?"], best_of_n(lm, SamplingConfig(num_samples=8), scorer))``.

    Args:
      prompts: records, or plain texts (which become prompts with their number as id).
      method: the result of `srt.srt`, `seft.seft`, `pit.pit`, `self_refine.self_refine` or `best_of_n.best_of_n`.
      grade: measures the ``quality`` of new responses; it decides nothing.
      keep: ``keep(round, items, stage)`` returns ``stage(items)``, or the stored result of an earlier call; it may cut
        the items in parts. In a run directory:
        ``lambda r, items, stage: run.at(f"round_{r}").sharded("responses", items, stage, ...)``.

    Returns: for each round from 0, one Improvement per prompt, in the order of ``prompts``.

    Raises: ValueError: if two prompts have the same id or rounds is below 0.
    """
    records = as_prompts(prompts)
    if rounds < 0 or len({prompt.id for prompt in records}) < len(records):
        raise ValueError(f"rounds is {rounds} (at least 0), or two of the {len(records)} prompts have the same id")
    key = jax.random.key(seed)
    results = [keep(0, records, functools.partial(_first, method, grade, key))]
    for number in range(1, rounds + 1):
        items = list(zip(records, zip(*results, strict=True), strict=True))
        results.append(keep(number, items, functools.partial(_following, method, grade, key, number)))
    return results


def _first(method: Method, grade: Scorer | None, key: jax.Array, prompts: Sequence[Prompt]) -> list[Improvement]:
    return _graded(prompts, method.draft(prompts, fold(key, "round", 0)), grade, key)


def _following(
    method: Method, grade: Scorer | None, key: jax.Array, number: int, items: Sequence[Item]
) -> list[Improvement]:
    active = [(prompt, past) for prompt, past in items if method.goes_on(past[-1])]
    results = method.round(active, fold(key, "round", number)) if active else []
    by_id = {record.prompt_id: record for record in results}
    records = [by_id.get(prompt.id) or next_record(past, "ended", past[-1].score) for prompt, past in items]
    return _graded([prompt for prompt, _ in items], records, grade, key)


def _graded(
    prompts: Sequence[Prompt], records: list[Improvement], grade: Scorer | None, key: jax.Array
) -> list[Improvement]:
    """The records, with the quality of each new response; every round grades with the same noise."""
    new = [record for record in records if is_new(record)]
    if grade is None or not new:
        return records
    grades = grade(prompts, [record.response for record in new], fold(key, "quality"))
    quality = {record.id: scored.score for record, scored in zip(new, grades, strict=True)}
    return [dataclasses.replace(r, quality=quality[r.id]) if r.id in quality else r for r in records]


def next_record(
    past: Past,
    outcome: Outcome,
    score: float | None,
    *,
    response: Response | None = None,
    feedback: str | None = None,
    tokens: int = 0,
) -> Improvement:
    """The next record of a prompt. Without a new response it repeats the last one and its quality."""
    last = past[-1]
    return Improvement(
        id=f"{last.prompt_id}@{last.round + 1}",
        prompt_id=last.prompt_id,
        round=last.round + 1,
        response=last.response if response is None else response,
        outcome=outcome,
        score=score,
        quality=last.quality if response is None else None,
        feedback=feedback,
        tokens=tokens,
    )


def round_statistics(records: Sequence[Improvement]) -> dict[str, Any]:
    """One round in numbers: the count of each outcome; means over the prompts that have a response (length in tokens;
    score and quality over the records that have one); the tokens generated in all. A mean over nothing is None."""
    counts = Counter(record.outcome for record in records)
    answered = [record for record in records if has_response(record)]
    grades = [record.quality for record in answered if record.quality is not None]
    mean, low, high = metrics.mean_ci(np.asarray(grades), seed=0) if grades else (None, None, None)
    return {
        "prompts": len(records),
        "outcomes": {outcome: counts[outcome] for outcome in get_args(Outcome) if counts[outcome]},
        "mean_length": _mean([len(record.response.token_ids) for record in answered]),
        "mean_score": _mean([record.score for record in answered if record.score is not None]),
        "quality": {"mean": mean, "ci95": [low, high]} if grades else None,
        "tokens": sum(record.tokens for record in records),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


# -------------------------------------------------------------------------------------------------------------- writing


def drafter(lm: LM, sampling: SamplingConfig) -> Draft:
    """Round 0 of every method except srt."""
    return lambda prompts, key: draft_round(lm, prompts, key, sampling)


def draft_round(
    lm: LM, prompts: Sequence[Prompt], key: jax.Array, sampling: SamplingConfig, stop_text: str | None = None
) -> list[Improvement]:
    """Round 0: one response to each prompt. A prompt that leaves no room for one gets an empty one, "too long"."""
    responses = respond(lm, prompts, key, sampling, stop_text)
    return [_draft(lm, prompt, responses.get(prompt.id)) for prompt in prompts]


def _draft(lm: LM, prompt: Prompt, response: Response | None) -> Improvement:
    empty = Response(
        id=f"{prompt.id}#0",
        prompt_id=prompt.id,
        sample=0,
        text="",
        token_ids=(),
        logps=(),
        finish_reason="length",
        fingerprint=lm.fingerprint,
        template=lm.tokenizer.template_hash,
    )
    return Improvement(
        id=f"{prompt.id}@0",
        prompt_id=prompt.id,
        round=0,
        response=response or empty,
        outcome="too long" if response is None else "draft",
        score=None,
        quality=None,
        feedback=None,
        tokens=token_count(response),
    )


def respond(
    lm: LM, prompts: Sequence[Prompt], key: jax.Array, sampling: SamplingConfig, stop_text: str | None = None
) -> dict[str, Response]:
    """A response to each prompt that leaves room for one, by the prompt's id."""
    fitting = with_room(lm, prompts, sampling.max_new_tokens)
    settings = sampling.settings | {"num_samples": 1}
    return {r.prompt_id: r for r in generate(lm, fitting, key=key, stop_text=stop_text, **settings)}


def fault_of(response: Response | None) -> Outcome | None:
    """Why a response cannot be used; None if it can."""
    if response is None:
        return "too long"
    if response.finish_reason != "stop":
        return "cut off"
    return None if response.text.strip() else "empty"


def token_count(response: Response | None) -> int:
    """The length of a response in tokens; 0 for None."""
    return 0 if response is None else len(response.token_ids)
