"""CREAM taken apart on the embedded world: the paper's own reward, and a consistency for each prompt.

    jaxsi bench methods --methods cream --ablations

Hardware and time: those of toy.py for each arm. Expected: the paper's reward loses quality in this world (see toy.py).
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.cream import Config, Consistency
from jaxsi.runs.config_file import load_config
from jaxsi.stages.consistency import implicit_rewards, judge_rewards


def configs() -> dict[str, Config]:
    toy = load_config(Path(__file__).with_name("toy.py"))
    return {
        "implicit rewards": dataclasses.replace(toy, consistency=Consistency(rewarding=implicit_rewards)),
        "per prompt": dataclasses.replace(toy, consistency=Consistency(rewarding=judge_rewards, per_prompt=True)),
    }
