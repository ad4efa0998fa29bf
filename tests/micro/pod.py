"""The micro world for several processes: SPIN, which compiles the fewest programs. Each test runs it more than once."""

import dataclasses
from pathlib import Path

from jaxsi.methods.spin import Config
from jaxsi.runs.config_file import load_config


def config() -> Config:
    micro = load_config(Path(__file__).parent / "spin.py")
    train = dataclasses.replace(micro.dpo.train, epochs=3, checkpoint_every=2)
    return dataclasses.replace(micro, dpo=dataclasses.replace(micro.dpo, train=train))
