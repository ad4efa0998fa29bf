"""The embedded world's prompts for SRT, and the scores and directions of its control arms."""

import random
from collections.abc import Sequence
from dataclasses import replace

from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import PreferencePair, Prompt, Response
from jaxsi.stages.prompts.critique import CritiqueTemplate
from jaxsi.toyworld import world


@stored_as("toyworld.srt_data.srt_prompts")
def srt_prompts() -> list[Prompt]:
    """Training instructions: the critic's, then stage 2's."""
    return world.prompts(11264, seed=5, held_out=False)


@stored_as("toyworld.srt_data.exact_scores")
def exact_scores(
    prompts: Sequence[Prompt], drafts: Sequence[Response], refined: Sequence[Response], template: CritiqueTemplate
) -> tuple[list[float | None], list[float | None]]:
    """The exact grades of drafts and refined responses, which end before the feedback; None if a prompt is not of the
    world."""
    texts = {prompt.id: prompt.text for prompt in prompts}

    def grades(responses: Sequence[Response]) -> list[float | None]:
        found = [world.grade(texts[r.prompt_id], template.unmarked(r.text) or r.text) for r in responses]
        return [None if grade is None else grade.total for grade in found]

    return grades(drafts), grades(refined)


@stored_as("toyworld.srt_data.by_coin")
def by_coin(pairs: Sequence[PreferencePair], seed: int) -> list[PreferencePair]:
    """A fair coin decides every pair's direction: preferences without a signal. Scores stay with their responses."""
    rng = random.Random(f"jaxsi/toyworld/coin/{seed}")
    return [
        pair if rng.random() < 0.5
        else replace(
            pair, chosen=pair.rejected, rejected=pair.chosen,
            chosen_score=pair.rejected_score, rejected_score=pair.chosen_score,
        )
        for pair in pairs
    ]  # fmt: skip
