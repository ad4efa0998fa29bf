"""The micro world: the toy config of SEFT, small enough to be killed and run again many times.

All stages sample up to 16 responses at a time, so that they share compiled programs."""

import dataclasses
from pathlib import Path

from jaxsi.methods.seft import Config, Stopping
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld import careless, world
from jaxsi.toyworld.evaluate_reviser import PolicyEvaluation, ReviserEvaluation
from jaxsi.toyworld.reviser import by_coin
from jaxsi.training.train import TrainConfig


def rankings():
    return careless.preferences(32, 1, per_prompt=3)


def coin_rankings():
    return by_coin(rankings())


def prompts():
    return world.prompts(24, seed=1, held_out=False)


def held_out():
    return world.prompts(16, seed=2, held_out=True)


def smaller(train: TrainConfig) -> TrainConfig:
    return dataclasses.replace(train, batch_size=16, epochs=1, max_length=64, checkpoint_every=2, log_every=1)


def config() -> Config:
    toy = load_config(Path(__file__).parents[2] / "configs" / "seft" / "toy.py")
    return dataclasses.replace(
        toy,
        reviser=dataclasses.replace(
            toy.reviser,
            rankings=rankings,
            warm_up=smaller(toy.reviser.warm_up),
            adaptive=smaller(toy.reviser.adaptive),
            labels=dataclasses.replace(toy.reviser.labels, batch_size=16),
            writing=dataclasses.replace(toy.reviser.writing, batch_size=16),
            evaluate=ReviserEvaluation(num_prompts=8, per_prompt=3),
        ),
        prompts=prompts,
        stop=Stopping(held_out=held_out),
        sampling=dataclasses.replace(toy.sampling, batch_size=16),
        sft=smaller(toy.sft),
        evaluate=PolicyEvaluation(num_prompts=8, num_samples=2, judged_prompts=4),
        iterations=2,
    )


def control() -> Config:
    cfg = config()
    return dataclasses.replace(cfg, reviser=dataclasses.replace(cfg.reviser, rankings=coin_rankings))
