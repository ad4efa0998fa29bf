"""Best of N: ranks a prompt's samples by a judge or a reward model and takes the best."""

import dataclasses
import functools
from collections.abc import Sequence

import jax

from jaxsi.lm import LM
from jaxsi.runs.records import Improvement, Prompt, Response
from jaxsi.runs.run import fold
from jaxsi.sampling.generate import SamplingConfig, generate
from jaxsi.stages import judge
from jaxsi.stages.improve.rounds import (
    Item,
    Method,
    Past,
    Scored,
    Scorer,
    answered,
    drafter,
    fault_of,
    shown_to,
    size_of,
    step,
)
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.prompts import Rubric
from jaxsi.training.reward import lm_config, reward_sequence, rewards


def best_of_n(lm: LM, sampling: SamplingConfig, scorer: Scorer) -> Method:
    """The best by ``scorer`` of r x ``sampling.num_samples`` responses after round r, the draft being the first."""
    if sampling.num_samples < 2:
        raise ValueError(f"num_samples is {sampling.num_samples}; the best of at least 2 samples is taken")
    return Method(
        drafter(lm, sampling), functools.partial(best_of_n_round, lm, sampling=sampling, scorer=scorer), answered
    )


def best_of_n_round(
    lm: LM, items: Sequence[Item], key: jax.Array, *, sampling: SamplingConfig, scorer: Scorer
) -> list[Improvement]:
    """More samples (round 1 has the draft for its first); the best of these takes the response's place where it scores
    strictly higher. Samples that were cut off, are empty or have no score are not taken."""
    prompts = [prompt for prompt, _ in items]
    number, N = items[0][1][-1].round + 1, sampling.num_samples
    start, count = (1, N - 1) if number == 1 else ((number - 1) * N, N)
    settings = sampling.settings | {"num_samples": count}
    samples: dict[str, list[Response]] = {prompt.id: [] for prompt in prompts}
    for r in generate(lm, prompts, key=fold(key, "samples"), **settings):
        place = start + r.sample
        samples[r.prompt_id].append(dataclasses.replace(r, id=f"{r.prompt_id}#{place}", sample=place))
    first = [past[-1].response for _, past in items] if number == 1 else []
    candidates = [r for r in [*first, *(r for own in samples.values() for r in own)] if fault_of(r) is None]
    scored = scorer(prompts, candidates, fold(key, "scores")) if candidates else []
    of = {response.id: made for response, made in zip(candidates, scored, strict=True)}

    def of_prompt(past: Past) -> Improvement:
        last, own = past[-1], samples[past[-1].prompt_id]
        known = [r for r in [*([last.response] if number == 1 else []), *own] if r.id in of]
        tokens = sum(map(size_of, own)) + sum(of[r.id].tokens for r in known)
        score = of[last.response.id].score if last.response.id in of else last.score
        numbers = [(made, r) for r in own if r.id in of and (made := of[r.id].score) is not None]
        if not numbers:
            return step(past, fault_of(own[0]) or "no response", score, tokens=tokens)
        best, response = max(numbers, key=lambda pair: pair[0])  # of equal ones the first
        if score is None or best > score:
            return step(past, "accepted", best, response=response, tokens=tokens)
        return step(past, "rejected", score, tokens=tokens)

    return [of_prompt(past) for _, past in items]


def judged(lm: LM, rubric: Rubric, cfg: JudgeConfig) -> Scorer:
    """The mean score of an LLM judge; None where nothing it wrote parses, or the request does not fit."""

    def score(prompts: Sequence[Prompt], responses: Sequence[Response], key: jax.Array) -> list[Scored]:
        judgments = judge.judge(lm, prompts, responses, rubric, cfg, key)
        return [Scored(j.score, sum(len(lm.tokenizer.encode_text(text)) for text in j.texts)) for j in judgments]

    return score


def rewarded(reward_lm: LM, lm: LM, batch_size: int = 64) -> Scorer:
    """r(x, y) of a reward model; None where the text is longer than its positions. Raises: RewardError for a model
    without a scalar head. ``lm`` is the model that samples."""
    limit, shown = lm_config(reward_lm).max_positions, shown_to(reward_lm, lm)

    def score(prompts: Sequence[Prompt], responses: Sequence[Response], key: jax.Array) -> list[Scored]:
        messages = {prompt.id: prompt.messages for prompt in prompts}
        texts = [reward_sequence(reward_lm.tokenizer, messages[r.prompt_id], shown(r)) for r in responses]
        fitting = [i for i, text in enumerate(texts) if len(text.tokens) <= limit]
        values = dict(zip(fitting, rewards(reward_lm, [texts[i] for i in fitting], batch_size=batch_size), strict=True))
        return [Scored(float(values[i]) if i in values else None, 0) for i in range(len(texts))]

    return score
