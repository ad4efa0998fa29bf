"""The embedded world: CREAM, without a judge, with as many samples as Self-Rewarding's toy.

    jaxsi run configs/cream/toy.py

Hardware: 2 CPU cores, 2.4 GB of memory, about two minutes. Expected: exact quality rises from about 71.

From Self-Rewarding's toy.py: the data and all settings, so 4 responses to each of 600 prompts (the paper: 5), at
temperature 1 (0.8, top-p 0.95), and SFT with EFT, which only the evaluation of the judge needs.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.cream import Config, Consistency
from jaxsi.runs.config_file import load_config
from jaxsi.training import losses


def config() -> Config:
    toy = load_config(Path(__file__).parents[1] / "self_rewarding" / "toy.py")
    fields = {field.name for field in dataclasses.fields(Config)} - {"consistency"}
    shared = {name: getattr(toy, name) for name in fields}
    return Config(
        **shared | {"consistency": Consistency(), "dpo": dataclasses.replace(toy.dpo, loss=losses.dpo_agreed)}
    )
