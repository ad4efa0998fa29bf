"""The micro world: the toy config of PIT, small enough to be killed and run again many times.

All stages sample 16 responses at a time, so that they share compiled programs."""

import dataclasses
from pathlib import Path

from jaxsi.methods.pit import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld import careless
from jaxsi.toyworld.evaluate_improver import ImprovedEvaluation
from jaxsi.toyworld.pit_data import permuted_gaps
from jaxsi.training.train import TrainConfig


def preferences():
    return careless.preferences(96, 1, least=1)


def smaller(train: TrainConfig) -> TrainConfig:
    return dataclasses.replace(train, batch_size=16, epochs=1, max_length=64, checkpoint_every=1, log_every=1)


def config() -> Config:
    toy = load_config(Path(__file__).parents[2] / "configs" / "pit" / "toy.py")
    rl = dataclasses.replace(toy.rl, steps=2, prompts_per_step=8, group_size=2, batch_size=16, checkpoint_every=1)
    return dataclasses.replace(
        toy,
        preferences=preferences,
        sft=smaller(toy.sft),
        reward=smaller(toy.reward),
        policy_rl=rl,
        rl=rl,
        rounds=(2, 2),
        sampling=dataclasses.replace(toy.sampling, batch_size=16),
        evaluate=ImprovedEvaluation(num_prompts=8, num_samples=2, judged_prompts=4, preferences=16),
    )


def control() -> Config:
    return dataclasses.replace(config(), rewarding=permuted_gaps)
