"""A control arm of the embedded world: a fair coin decides the direction of every stage-2 pair.

    jaxsi run configs/srt/toy_coin.py

Only the direction of the pairs differs from toy.py. Hardware and time are the same. Expected: no gain over iteration 0.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.srt_data import by_coin


def config() -> Config:
    return dataclasses.replace(load_config(Path(__file__).with_name("toy.py")), direction=by_coin)
