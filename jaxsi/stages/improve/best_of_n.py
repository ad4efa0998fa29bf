"""Best of N: scores a prompt's samples by a judge or a reward model and takes the best."""

import dataclasses
import functools
import math
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
from jaxsi.stages.judge import JudgeConfig, judge
from jaxsi.stages.prompts import Rubric
from jaxsi.training.reward import RewardOf, lm_config


def best_of_n(lm: LM, sampling: SamplingConfig, scorer: Scorer) -> Method:
    """After round r: the best, by ``scorer``, of r x ``sampling.num_samples`` responses, the draft included."""
    if sampling.num_samples < 2:
        raise ValueError(f"num_samples is {sampling.num_samples}; best of n needs at least 2 samples")
    one_round = functools.partial(best_of_n_round, lm, sampling=sampling, scorer=scorer)
    return Method(drafter(lm, sampling), one_round, has_response)


def best_of_n_round(
    lm: LM, items: Sequence[Item], key: jax.Array, *, sampling: SamplingConfig, scorer: Scorer
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
    drafts = [past[-1].response for _, past in items] if number == 1 else []
    candidates = [r for r in [*drafts, *(r for rows in samples.values() for r in rows)] if fault_of(r) is None]
    scores = scorer(prompts, candidates, fold(key, "scores")) if candidates else []
    scored_by_id = {response.id: scored for response, scored in zip(candidates, scores, strict=True)}

    def record(past: Past) -> Improvement:
        last, new = past[-1], samples[past[-1].prompt_id]
        responses = [last.response, *new] if number == 1 else new
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


def judged(lm: LM, rubric: Rubric, cfg: JudgeConfig) -> Scorer:
    """Scores by the mean of an LLM judge's scores; None if no verdict parses or the request does not fit."""

    def score(prompts: Sequence[Prompt], responses: Sequence[Response], key: jax.Array) -> list[Scored]:
        judgments = judge(lm, prompts, responses, rubric, cfg, key)
        return [Scored(j.score, sum(len(lm.tokenizer.encode_text(text)) for text in j.texts)) for j in judgments]

    return score


def rewarded(reward_lm: LM, lm: LM, batch_size: int = 64) -> Scorer:
    """Scores by a reward model r(x, y); None if the text is longer than its context. ``lm`` is the model that samples.

    Raises: RewardError: if ``reward_lm`` has no scalar head.
    """
    lm_config(reward_lm)
    reward = RewardOf(reward_lm, lm.tokenizer, batch_size)

    def score(prompts: Sequence[Prompt], responses: Sequence[Response], key: jax.Array) -> list[Scored]:
        return [Scored(None if math.isnan(x) else x, 0) for x in reward(prompts, responses).tolist()]

    return score
