"""The embedded world: CREAM on the scores of the model as a judge, with as many samples as Self-Rewarding's toy.

    jaxsi run configs/cream/toy.py

Hardware: 2 CPU cores, 2.4 GB of memory, about two minutes. Expected: exact quality rises from about 70 to about 87.
The arms toy_permuted.py and toy_exact.py differ from this file only by their rewards.

From Self-Rewarding's toy.py: the data and all settings, so 4 responses to each of 600 prompts (the paper: 5), at
temperature 1 (0.8, top-p 0.95), and EFT. Not the paper's: the rewards are the judge's scores of M_{t-1} and M_{t-2}.
The toy's people make mistakes, and M_1 learns them: so log M_1 - log M_0, the paper's reward, prefers mistakes here
(the ablation "implicit rewards").
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.cream import Config, Consistency
from jaxsi.runs.config_file import load_config
from jaxsi.stages.consistency import judge_rewards
from jaxsi.training import losses


def config() -> Config:
    toy = load_config(Path(__file__).parents[1] / "self_rewarding" / "toy.py")
    changed = {
        "consistency": Consistency(rewarding=judge_rewards),
        "dpo": dataclasses.replace(toy.dpo, loss=losses.dpo_agreed),
    }
    fields = {field.name for field in dataclasses.fields(Config)} - changed.keys()
    return Config(**{name: getattr(toy, name) for name in fields}, **changed)
