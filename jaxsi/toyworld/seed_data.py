"""The embedded world's seed data, and the two judges of its control arms, as functions that a config can name."""

from collections.abc import Sequence

import jax

from jaxsi.lm import LM
from jaxsi.runs.records import Judgment, Prompt, RankedResponses, Response, SFTExample
from jaxsi.stages import judge, pairs
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.prompts import Rubric
from jaxsi.toyworld import annotators, world


def toy_ift() -> list[SFTExample]:
    """Demonstrations of mixed quality."""
    return annotators.ift(256, 1)


def toy_demonstrations() -> list[SFTExample]:
    """Demonstrations without a mistake."""
    return annotators.careful(600, 3)


def toy_rankings() -> list[RankedResponses]:
    """Responses in the order of human-like annotators, of which EFT is made."""
    return annotators.rankings(128, 2)


def exact_judge(
    lm: LM, prompts: Sequence[Prompt], responses: Sequence[Response], rubric: Rubric, cfg: JudgeConfig, key: jax.Array
) -> list[Judgment]:
    """The arm with a perfect judge: the exact grade, halved to the rubric's 0 to 5, in place of the model's verdicts.

    A response to a prompt that is no instruction of the world has no score.
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


def permuted_judge(
    lm: LM, prompts: Sequence[Prompt], responses: Sequence[Response], rubric: Rubric, cfg: JudgeConfig, key: jax.Array
) -> list[Judgment]:
    """The arm whose scores say nothing: the model's own verdicts, dealt out again at random within each prompt."""
    judgments = judge.judge(lm, prompts, responses, rubric, cfg, key)
    return pairs.permuted_within_prompt(judgments, seed=str(jax.random.key_data(key).tolist()))


def toy_held_out() -> list[Prompt]:
    """The instructions that the evaluation asks."""
    return world.evaluation_prompts(500)
