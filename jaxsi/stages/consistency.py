"""CREAM's rewards and its consistency (Wang et al. 2024, arXiv 2410.12735): DPO's implicit reward of a model, and how
far the models of two iterations agree on the order of the responses to a prompt."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.metrics import kendall
from jaxsi.runs.records import Judgment, PreferencePair
from jaxsi.sampling.scoring import score
from jaxsi.stages.answers import Answers, read_answers, with_prompts
from jaxsi.stages.judge import judge, scored
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.verdicts import JudgeConfig


@stored_as("consistency.implicit_rewards")
def implicit_rewards(
    items: Sequence[Answers], lm: LM, reference: LM | None, rubric: AnyRubric, cfg: JudgeConfig, key: jax.Array
) -> list[Judgment]:
    """The paper's reward log pi(y|x) - log pi_ref(y|x) of each response, DPO's without its beta, as judgments by
    ``lm``. Without a reference it is the mean log-probability of a token, as likelihoods of long texts are small. The
    judge's settings are not used."""
    responses = [response for item in items for response in item.responses]
    asked = [prompt for prompt, _ in with_prompts([item.prompt for item in items], responses)]
    rewards = np.asarray(score(lm, asked, responses), np.float64)
    if reference is None:
        rewards /= [max(1, len(response.token_ids)) for response in responses]
    else:
        rewards -= score(reference, asked, responses)
    return scored(responses, rewards.tolist(), lm)


@stored_as("consistency.judge_rewards")
def judge_rewards(
    items: Sequence[Answers], lm: LM, reference: LM | None, rubric: AnyRubric, cfg: JudgeConfig, key: jax.Array
) -> list[Judgment]:
    """The scores of ``lm`` as a judge, as in Self-Rewarding; the reference is not used."""
    return read_answers(items, judge, lm, rubric, cfg, key)


def consistencies(now: Sequence[Judgment], before: Sequence[Judgment]) -> dict[str, float]:
    """By prompt, the consistency C = (tau + 1) / 2 of two models' rewards of the same responses: 1 if they order them
    alike, 0 if the other way round (tau: Kendall's tau-b). A prompt on which a model finds no order has none."""
    rewards = {judgment.id: judgment.score for judgment in before}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for judgment in now:
        earlier = rewards[judgment.id]
        if judgment.score is not None and earlier is not None:
            pairs.setdefault(judgment.prompt_id, []).append((judgment.score, earlier))
    taus = {prompt: kendall(*zip(*values, strict=True)) for prompt, values in pairs.items() if len(values) > 1}
    return {prompt: (tau + 1) / 2 for prompt, tau in taus.items() if tau is not None}


def with_agreement(
    pairs: Sequence[PreferencePair], consistency: Mapping[str, float], *, per_prompt: bool
) -> tuple[list[PreferencePair], dict[str, float | None]]:
    """The pairs with the consistency of their prompt, or the mean of all prompts, as the probability that their label
    is right; and that mean. A prompt without a consistency has the mean."""
    mean = float(np.mean(list(consistency.values()))) if consistency else 1.0
    share = {pair.id: consistency.get(pair.id, mean) if per_prompt else mean for pair in pairs}
    told = {"consistency": mean if consistency else None}
    return [dataclasses.replace(pair, agreement=share[pair.id]) for pair in pairs], told
