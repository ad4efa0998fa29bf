"""The micro world: the toy config, small enough to be killed and run again many times.

All stages sample up to 32 responses at a time, most of up to 16 tokens, so that they share compiled programs."""

import dataclasses
from pathlib import Path

from jaxsi.methods.self_rewarding import Config, SeedData
from jaxsi.runs.config_file import load_config
from jaxsi.stages.rankings import no_reversal
from jaxsi.toyworld import annotators
from jaxsi.toyworld.evaluate import ToyEvaluation
from jaxsi.toyworld.seed_data import permuted_judge
from jaxsi.training.train import TrainConfig


def ift():
    return annotators.ift(16, 1)


def rankings():
    return annotators.rankings(8, 2)


def judge_test():
    return annotators.rankings(6, 4, held_out=True)


def smaller(train: TrainConfig) -> TrainConfig:
    return dataclasses.replace(train, batch_size=16, epochs=4, checkpoint_every=2, log_every=1)


def config() -> Config:
    toy = load_config(Path(__file__).parents[2] / "configs" / "self_rewarding" / "toy.py")
    return dataclasses.replace(
        toy,
        seed_data=SeedData(ift=ift, rankings=rankings, max_share=1.0, agrees=no_reversal, judge_test=judge_test),
        prompts=dataclasses.replace(toy.prompts, num_prompts=24, batch_size=32),
        sampling=dataclasses.replace(toy.sampling, batch_size=32),
        judge=dataclasses.replace(toy.judge, batch_size=32),
        sft=smaller(toy.sft),
        dpo=dataclasses.replace(toy.dpo, train=smaller(toy.dpo.train)),
        evaluate=ToyEvaluation(num_prompts=16, num_samples=2, max_new_tokens=16, judged_prompts=8),
        iterations=2,
    )


def control() -> Config:
    return dataclasses.replace(config(), judging=permuted_judge)
