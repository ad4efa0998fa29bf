"""A control arm of the embedded world: the gap rewards, shuffled within each batch.

    jaxsi run configs/pit/toy_permuted.py

Only the rewards of the two rounds differ from toy.py. Hardware and time are the same. Expected: no gain over iteration
0.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.pit import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.pit_data import permuted_gaps


def config() -> Config:
    return dataclasses.replace(load_config(Path(__file__).with_name("toy.py")), rewarding=permuted_gaps)
