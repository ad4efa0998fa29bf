"""PIT's curriculum taken apart (the paper's Table 2) on the embedded world, at equal total steps; and PPO.

    jaxsi bench methods --methods pit --ablations

Hardware and time: those of toy.py for each arm. Expected: one round alone gives less quality than both, as reports of
the paper say. They say nothing about PPO.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.pit import Config
from jaxsi.runs.config_file import load_config
from jaxsi.training.ppo import ppo


def configs() -> dict[str, Config]:
    both = load_config(Path(__file__).with_name("toy.py"))
    steps = sum(both.rounds)
    return {
        "round 0 only": dataclasses.replace(both, rounds=(steps, 0)),
        "round 1 only": dataclasses.replace(both, rounds=(0, steps), mix=0.0),
        "PPO": dataclasses.replace(both, learner=ppo),
    }
