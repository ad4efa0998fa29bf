"""The embedded world's prompts for SRT, and what its control arms put in the model's place."""

import random
from collections.abc import Sequence
from dataclasses import replace

from jaxsi.runs.records import PreferencePair, Prompt, Response
from jaxsi.stages.prompts.critique import CritiqueTemplate
from jaxsi.toyworld import world


def srt_prompts() -> list[Prompt]:
    """Instructions, none held out: the critic's, then stage 2's."""
    return world.prompts(11264, seed=5, held_out=False)


def exact_scores(
    prompts: Sequence[Prompt], responses: Sequence[Response], template: CritiqueTemplate
) -> list[float | None]:
    """The exact grades of responses that end where feedback begins; None for no instruction of the world."""
    texts = {prompt.id: prompt.text for prompt in prompts}
    grades = [world.grade(texts[r.prompt_id], template.unmarked(r.text) or r.text) for r in responses]
    return [None if grade is None else grade.total for grade in grades]


def by_coin(pairs: Sequence[PreferencePair], seed: int) -> list[PreferencePair]:
    """Every pair's direction by a fair coin: preferences that say nothing. The scores stay with their responses."""
    rng = random.Random(f"jaxsi/toyworld/coin/{seed}")
    return [
        pair if rng.random() < 0.5
        else replace(
            pair, chosen=pair.rejected, rejected=pair.chosen,
            chosen_score=pair.rejected_score, rejected_score=pair.chosen_score,
        )
        for pair in pairs
    ]  # fmt: skip
