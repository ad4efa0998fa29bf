"""A control arm of the embedded world: the exact grader in the judge's place.

    jaxsi run configs/self_rewarding/toy_exact.py

As toy.py in everything but the judge, hardware and time included. Expected: at least the gain of toy.py; what the loop
does with a perfect judge.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.self_rewarding import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.seed_data import exact_judge


def config() -> Config:
    return dataclasses.replace(load_config(Path(__file__).with_name("toy.py")), judging=exact_judge)
