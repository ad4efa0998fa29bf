"""The micro world: the toy config of SPIN, small enough to be killed and run again many times.

All stages sample 32 responses of up to 24 tokens at a time, so that they share compiled programs."""

import dataclasses
from pathlib import Path

from jaxsi.methods.spin import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld import annotators
from jaxsi.toyworld.evaluate import ToyQuality


def demonstrations():
    return annotators.careful(32, 1)


def config() -> Config:
    toy = load_config(Path(__file__).parents[2] / "configs" / "spin" / "toy.py")
    train = dataclasses.replace(toy.dpo.train, batch_size=16, max_length=64, checkpoint_every=1, log_every=1)
    return dataclasses.replace(
        toy,
        demonstrations=demonstrations,
        sampling=dataclasses.replace(toy.sampling, batch_size=32, max_new_tokens=24),
        dpo=dataclasses.replace(toy.dpo, train=train),
        evaluate=ToyQuality(num_prompts=8),
    )
