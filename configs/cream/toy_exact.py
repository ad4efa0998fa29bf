"""A control arm of the embedded world: the exact grade as the reward.

    jaxsi run configs/cream/toy_exact.py

Only the reward differs from toy.py. Hardware and time are the same. Expected: the gain of a perfect
reward.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.cream import Config, Consistency
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.seed_data import exact_rewards


def config() -> Config:
    toy = load_config(Path(__file__).with_name("toy.py"))
    return dataclasses.replace(toy, consistency=Consistency(rewarding=exact_rewards))
