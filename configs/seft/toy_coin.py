"""A control arm of the embedded world: a fair coin says which response of each pair the reviser takes as the better.

    jaxsi run configs/seft/toy_coin.py

Only the ranks of the reviser's data differ from toy.py. Hardware and time are the same. Expected: no gain; this is what
evolution does without a signal.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.seft import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.reviser import coin_ranked_responses


def config() -> Config:
    toy = load_config(Path(__file__).with_name("toy.py"))
    return dataclasses.replace(toy, reviser=dataclasses.replace(toy.reviser, rankings=coin_ranked_responses))
