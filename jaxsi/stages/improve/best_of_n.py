"""Best of N: scores a prompt's samples by a judge or a reward model and takes the best."""

import dataclasses
import functools
from collections.abc import Sequence

import jax

from jaxsi.lm import LM
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Improvement, Prompt, Response
from jaxsi.sampling.generate import SamplingConfig, generate
from jaxsi.stages.improve.rounds import (
    Item,
    Method,
    Past,
    Scored,
    Scorer,
    drafter,
    fault_of,
    has_response,
    next_record,
    token_count,
)
from jaxsi.stages.judges import Judge
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.verdicts import JudgeConfig


def best_of_n(lm: LM, sampling: SamplingConfig, scorer: Scorer, *, compares: bool = False) -> Method:
    """After round r: the best, by ``scorer``, of r x ``sampling.num_samples`` responses, the draft included.
    ``compares``: scores mean something among the responses that are scored together only, so the best one of the rounds
    before is scored again beside the new ones."""
    if sampling.num_samples < 2:
        raise ValueError(f"num_samples is {sampling.num_samples}; best of n needs at least 2 samples")
    one_round = functools.partial(best_of_n_round, lm, sampling=sampling, scorer=scorer, compares=compares)
    return Method(drafter(lm, sampling), one_round, has_response)


def best_of_n_round(
    lm: LM, items: Sequence[Item], key: jax.Array, *, sampling: SamplingConfig, scorer: Scorer, compares: bool
) -> list[Improvement]:
    """Adds samples (in round 1 the draft is the first) and takes the best of them if it scores strictly higher than the
    response before. Samples that were cut off, are empty or have no score are never taken."""
    prompts = [prompt for prompt, _ in items]
    number, N = items[0][1][-1].round + 1, sampling.num_samples
    start, count = (1, N - 1) if number == 1 else ((number - 1) * N, N)
    settings = sampling.settings | {"num_samples": count}
    samples: dict[str, list[Response]] = {prompt.id: [] for prompt in prompts}
    for r in generate(lm, prompts, key=fold(key, "samples"), **settings):
        place = start + r.sample
        samples[r.prompt_id].append(dataclasses.replace(r, id=f"{r.prompt_id}#{place}", sample=place))
    drafts = [past[-1].response for _, past in items] if number == 1 or compares else []
    candidates = [r for r in [*drafts, *(r for rows in samples.values() for r in rows)] if fault_of(r) is None]
    scores = scorer(prompts, candidates, fold(key, "scores")) if candidates else []
    scored_by_id = {response.id: scored for response, scored in zip(candidates, scores, strict=True)}

    def record(past: Past) -> Improvement:
        last, new = past[-1], samples[past[-1].prompt_id]
        responses = [last.response, *new]
        tokens = sum(map(token_count, new)) + sum(scored_by_id[r.id].tokens for r in responses if r.id in scored_by_id)
        old_score = scored_by_id[last.response.id].score if last.response.id in scored_by_id else last.score
        rivals = [(score, r) for r in new if r.id in scored_by_id and (score := scored_by_id[r.id].score) is not None]
        if not rivals:
            return next_record(past, fault_of(new[0]) or "no response", old_score, tokens=tokens)
        best, response = max(rivals, key=lambda pair: pair[0])  # the first of equal ones
        if old_score is None or best > old_score:
            return next_record(past, "accepted", best, response=response, tokens=tokens)
        return next_record(past, "rejected", old_score, tokens=tokens)

    return [record(past) for _, past in items]


def scored_by(judging: Judge, lm: LM, rubric: AnyRubric, cfg: JudgeConfig) -> Scorer:
    """Scores by a judge: the model ``lm`` itself (``judge.judge``), or one of ``stages.judges``; None if no verdict
    parses or the request does not fit. Tokens are counted by the tokenizer of ``lm``."""

    def score(prompts: Sequence[Prompt], responses: Sequence[Response], key: jax.Array) -> list[Scored]:
        judgments = judging(lm, prompts, responses, rubric, cfg, key)
        return [
            Scored(j.score, sum(len(lm.tokenizer.encode_text(text)) for text in j.texts if text)) for j in judgments
        ]

    return score
