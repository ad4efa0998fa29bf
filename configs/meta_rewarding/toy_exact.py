"""An arm of the embedded world: the exact grader in the judge's place.

    jaxsi run configs/meta_rewarding/toy_exact.py

Only the judge differs from toy.py. Hardware and time are the same. The grader's judgments of a response are all the
same, so the judge learns from none. Expected: about the gain of toy.py; this is what the loop does with a perfect
judge.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.meta_rewarding import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.seed_data import exact_judge


def config() -> Config:
    return dataclasses.replace(load_config(Path(__file__).with_name("toy.py")), judging=exact_judge)
