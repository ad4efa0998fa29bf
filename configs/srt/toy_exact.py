"""A control arm of the embedded world: the exact grader scores stage 2's responses in the model's place.

    jaxsi run configs/srt/toy_exact.py

Only these scores differ from toy.py. Hardware and time are the same. Expected: at least the gain of toy.py.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.srt_data import exact_scores


def config() -> Config:
    return dataclasses.replace(load_config(Path(__file__).with_name("toy.py")), scoring=exact_scores)
