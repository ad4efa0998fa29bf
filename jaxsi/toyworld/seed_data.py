"""The embedded world's seed data, and the judges of its control arms, as functions that a config can name."""

import random
from collections.abc import Sequence
from dataclasses import replace

import jax

from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Judgment, Prompt, RankedResponses, Response, SFTExample
from jaxsi.stages import judge, pairs
from jaxsi.stages.answers import Answers, read_answers
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.meta_judge import Contest, matches
from jaxsi.stages.prompts import Rubric
from jaxsi.stages.prompts.comparison import PairwiseRubric
from jaxsi.toyworld import annotators, world


@stored_as("toyworld.seed_data.toy_ift")
def toy_ift() -> list[SFTExample]:
    """Demonstrations of mixed quality."""
    return annotators.ift(256, 1)


@stored_as("toyworld.seed_data.toy_demonstrations")
def toy_demonstrations() -> list[SFTExample]:
    """Demonstrations without a mistake."""
    return annotators.careful(600, 3)


@stored_as("toyworld.seed_data.toy_rankings")
def toy_rankings() -> list[RankedResponses]:
    """Responses ranked by human-like annotators, from which EFT is made."""
    return annotators.rankings(128, 2)


@stored_as("toyworld.seed_data.toy_judge_test")
def toy_judge_test() -> list[RankedResponses]:
    """Ranked responses to held-out instructions, on which the model is measured as a judge."""
    return annotators.rankings(100, 4, held_out=True)


@stored_as("toyworld.seed_data.exact_judge")
def exact_judge(
    lm: LM, prompts: Sequence[Prompt], responses: Sequence[Response], rubric: Rubric, cfg: JudgeConfig, key: jax.Array
) -> list[Judgment]:
    """The arm with a perfect judge: the exact grade, halved to the rubric's 0 to 5, in place of the model's judgments.

    If the prompt is not an instruction of the world, the response gets no score.
    """
    texts = {prompt.id: prompt.text for prompt in prompts}
    judgments = []
    for response in responses:
        grade = world.grade(texts[response.prompt_id], response.text)
        score = None if grade is None else grade.total / 2
        judgments.append(
            Judgment(
                id=response.id,
                prompt_id=response.prompt_id,
                scores=(score,) * cfg.num_samples,
                score=score,
                texts=("" if score is None else f"exact {rubric.marker} {score:g}",) * cfg.num_samples,
                fingerprint=lm.fingerprint,
                template=lm.tokenizer.template_hash,
            )
        )
    return judgments


@stored_as("toyworld.seed_data.permuted_judge")
def permuted_judge(
    lm: LM, prompts: Sequence[Prompt], responses: Sequence[Response], rubric: Rubric, cfg: JudgeConfig, key: jax.Array
) -> list[Judgment]:
    """The arm without a signal: the model's own judgments, shuffled within each prompt."""
    judgments = judge.judge(lm, prompts, responses, rubric, cfg, key)
    return pairs.permuted_within_prompt(judgments, seed=str(jax.random.key_data(key).tolist()))


@stored_as("toyworld.seed_data.permuted_scores")
def permuted_scores(
    lm: LM, prompts: Sequence[Prompt], responses: Sequence[Response], rubric: Rubric, cfg: JudgeConfig, key: jax.Array
) -> list[Judgment]:
    """As `permuted_judge`, but each response keeps the texts that are about it: Meta-Rewarding trains on them."""
    judgments = judge.judge(lm, prompts, responses, rubric, cfg, key)
    dealt = pairs.permuted_within_prompt(judgments, seed=str(jax.random.key_data(key).tolist()))
    return [replace(other, texts=own.texts) for own, other in zip(judgments, dealt, strict=True)]


@stored_as("toyworld.seed_data.tossed")
def tossed(
    contests: Sequence[Contest], lm: LM, rubric: PairwiseRubric, cfg: JudgeConfig, key: jax.Array
) -> list[Judgment]:
    """The meta-judge of that arm: a fair coin, tossed for each comparison."""
    seed, about = jax.random.key_data(key).tolist(), [match.about for match in matches(contests)]
    coins = [float(random.Random(f"{seed} {match.id}").random() < 0.5) for match in about]
    return judge.scored(about, coins, lm)


@stored_as("toyworld.seed_data.toy_held_out")
def toy_held_out() -> list[Prompt]:
    """The held-out instructions of the evaluation."""
    return world.evaluation_prompts(500)


@stored_as("toyworld.seed_data.toy_prompts")
def toy_prompts() -> list[Prompt]:
    """Instructions without responses, none of them held out."""
    return world.prompts(2000, 5, held_out=False)


@stored_as("toyworld.seed_data.permuted_rewards")
def permuted_rewards(
    items: Sequence[Answers], lm: LM, reference: LM | None, rubric: Rubric, cfg: JudgeConfig, key: jax.Array
) -> list[Judgment]:
    """CREAM's arm without a signal: the scores of the judge, shuffled within each prompt."""
    return read_answers(items, permuted_judge, lm, rubric, cfg, jax.random.fold_in(key, int(lm.fingerprint[:7], 16)))


@stored_as("toyworld.seed_data.exact_rewards")
def exact_rewards(
    items: Sequence[Answers], lm: LM, reference: LM | None, rubric: Rubric, cfg: JudgeConfig, key: jax.Array
) -> list[Judgment]:
    """CREAM's arm with a perfect reward: the exact grade."""
    return read_answers(items, exact_judge, lm, rubric, cfg, key)
