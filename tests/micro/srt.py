"""The micro world: the toy config of SRT, small enough to be killed and run again many times.

All stages sample 32 responses at a time, so that they share compiled programs."""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config, FirstStage
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld import world
from jaxsi.toyworld.evaluate_refinement import RefinedEvaluation
from jaxsi.toyworld.srt_data import by_coin, exact_scores
from jaxsi.training.optim import OptimConfig


def prompts():
    return world.prompts(320 + 32, seed=1, held_out=False)


def config() -> Config:
    toy = load_config(Path(__file__).parents[2] / "configs" / "srt" / "toy.py")
    # The least that a model learns in a few steps: to go on, after its response, with a better one. The exact grader
    # scores them, in the place of feedback.
    first = dataclasses.replace(
        toy.sft, optim=OptimConfig(learning_rate=4e-3), batch_size=16, epochs=2, checkpoint_every=8, log_every=1
    )
    train = dataclasses.replace(toy.dpo.train, batch_size=16, max_length=64, checkpoint_every=1, log_every=1)
    return dataclasses.replace(
        toy,
        prompts=prompts,
        critic_prompts=320,
        first_stage=FirstStage(drafts=toy.model, rounds=2),
        template=toy.template.without("weaknesses", "suggestions", "score"),
        sampling=dataclasses.replace(toy.sampling, batch_size=32),
        sft=first,
        dpo=dataclasses.replace(toy.dpo, train=train),
        critique=dataclasses.replace(toy.critique, max_new_tokens=24, batch_size=32),
        scoring=exact_scores,
        evaluate=RefinedEvaluation(num_prompts=16, num_samples=2, reranked_prompts=16),
    )


def control() -> Config:
    return dataclasses.replace(config(), direction=by_coin)
