"""The micro world: the toy config of GRPO, small enough to be killed and run again many times."""

import dataclasses
from pathlib import Path

from jaxsi.methods.grpo import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld import world
from jaxsi.toyworld.evaluate import ToyEvaluation
from jaxsi.toyworld.seed_data import permuted_judge


def prompts():
    return world.prompts(16, 5, held_out=False)


def config() -> Config:
    toy = load_config(Path(__file__).parents[2] / "configs" / "grpo" / "toy.py")
    # A large eps: Adam's sign-like first steps would make rounding errors of tiny gradients as large as a step.
    optim = dataclasses.replace(toy.rl.optim, learning_rate=1e-2, eps=1e-2)
    rl = dataclasses.replace(
        toy.rl, optim=optim, steps=2, prompts_per_step=8, group_size=2, batch_size=16, checkpoint_every=1
    )
    return dataclasses.replace(
        toy,
        prompts=prompts,
        rl=rl,
        judge=dataclasses.replace(toy.judge, num_samples=1, batch_size=32),
        evaluate=ToyEvaluation(num_prompts=8, num_samples=2, max_new_tokens=16, judged_prompts=4),
        iterations=2,
    )


def control() -> Config:
    return dataclasses.replace(config(), judging=permuted_judge)
