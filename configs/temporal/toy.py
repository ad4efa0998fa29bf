"""The embedded world: Temporal Self-Rewarding, with as many samples as Self-Rewarding's toy.

    jaxsi run configs/temporal/toy.py

Hardware: 2 CPU cores, 3 GB of memory, about three minutes. Expected: exact quality rises from about 70 to about 82.

From Self-Rewarding's toy.py: the data and all settings. A third of its prompts, since each is sampled three times as
often: so both have 2,400 responses in an iteration. The paper has K = 7 and two iterations of DPO.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.temporal import Config
from jaxsi.runs.config_file import load_config


def config() -> Config:
    toy = load_config(Path(__file__).parents[1] / "self_rewarding" / "toy.py")
    shared = {field.name: getattr(toy, field.name) for field in dataclasses.fields(Config)}
    return Config(**shared | {"prompts": dataclasses.replace(toy.prompts, num_prompts=200)})
