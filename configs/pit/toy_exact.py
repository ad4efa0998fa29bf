"""A control arm of the embedded world: the exact grader in the gap reward model's place.

    jaxsi run configs/pit/toy_exact.py

Only the rewards of the two rounds differ from toy.py. Hardware and time are the same. Expected: at least the gain of
toy.py.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.pit import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.pit_data import exact_gaps


def config() -> Config:
    return dataclasses.replace(load_config(Path(__file__).with_name("toy.py")), rewarding=exact_gaps)
