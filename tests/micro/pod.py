"""The micro world for several processes: Self-Rewarding, smaller still, since each test runs it more than once."""

import dataclasses
from pathlib import Path

from jaxsi.methods.self_rewarding import Config
from jaxsi.runs.config_file import load_config
from jaxsi.training.train import TrainConfig


def smaller(train: TrainConfig) -> TrainConfig:
    return dataclasses.replace(train, epochs=3, checkpoint_every=2, log_every=1)


def config() -> Config:
    micro = load_config(Path(__file__).parent / "self_rewarding.py")
    return dataclasses.replace(
        micro,
        prompts=dataclasses.replace(micro.prompts, num_prompts=12),
        sft=smaller(micro.sft),
        dpo=dataclasses.replace(micro.dpo, train=smaller(micro.dpo.train)),
        evaluate=None,
    )
