"""A control arm of the embedded world: the model's own scores, shuffled within each prompt.

    jaxsi run configs/temporal/toy_permuted.py

Only the judge differs from toy.py. Hardware and time are the same. Expected: no gain; this is what
a loop without a signal does.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.temporal import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.seed_data import permuted_judge


def config() -> Config:
    return dataclasses.replace(load_config(Path(__file__).with_name("toy.py")), judging=permuted_judge)
