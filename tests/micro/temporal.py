"""The micro world: the toy config of Temporal Self-Rewarding, small enough to be killed and run again many times."""

import dataclasses
from pathlib import Path

from jaxsi.methods.seeded import SeedData
from jaxsi.methods.temporal import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld import annotators
from jaxsi.toyworld.evaluate import ToyEvaluation
from jaxsi.toyworld.seed_data import permuted_judge
from jaxsi.training.train import TrainConfig


def ift():
    return annotators.ift(16, 1)


def smaller(train: TrainConfig) -> TrainConfig:
    return dataclasses.replace(train, batch_size=16, epochs=4, checkpoint_every=1, log_every=1)


def config() -> Config:
    toy = load_config(Path(__file__).parents[2] / "configs" / "temporal" / "toy.py")
    return dataclasses.replace(
        toy,
        seed_data=SeedData(ift=ift),
        prompts=dataclasses.replace(toy.prompts, num_prompts=16, batch_size=32),
        sampling=dataclasses.replace(toy.sampling, num_samples=3, batch_size=32),
        judge=dataclasses.replace(toy.judge, num_samples=1, batch_size=32),
        sft=smaller(toy.sft),
        dpo=dataclasses.replace(toy.dpo, train=smaller(toy.dpo.train)),
        evaluate=ToyEvaluation(num_prompts=8, num_samples=2, max_new_tokens=16, judged_prompts=4),
        iterations=2,
    )


def control() -> Config:
    return dataclasses.replace(config(), judging=permuted_judge)
