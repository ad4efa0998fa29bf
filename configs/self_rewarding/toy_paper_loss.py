"""An arm of the embedded world: the paper's own loss, without a likelihood term.

    jaxsi run configs/self_rewarding/toy_paper_loss.py

Only `dpo.nll_coef` differs from toy.py: 0, as in the paper. Hardware and time are the same. Expected: a smaller gain,
since nothing holds the chosen responses' likelihood up.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.self_rewarding import Config
from jaxsi.runs.config_file import load_config


def config() -> Config:
    toy = load_config(Path(__file__).with_name("toy.py"))
    return dataclasses.replace(toy, dpo=dataclasses.replace(toy.dpo, nll_coef=0.0))
