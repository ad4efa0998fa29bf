"""A control arm of the embedded world: the rewards, shuffled within each prompt.

    jaxsi run configs/cream/toy_permuted.py

Only the reward differs from toy.py. Hardware and time are the same. Expected: no gain; this is what
a loop without a signal does.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.cream import Config, Consistency
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.seed_data import permuted_rewards


def config() -> Config:
    toy = load_config(Path(__file__).with_name("toy.py"))
    return dataclasses.replace(toy, consistency=Consistency(rewarding=permuted_rewards))
