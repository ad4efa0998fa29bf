"""The embedded world: what SEFT's parts are worth. Each arm differs from toy.py by one thing.

    jaxsi bench methods --methods seft --ablations

The arms. always revise: the reviser keeps no draft. internal only, external only: all rounds are of one kind. half the
prompts, double the prompts: with the same number of training steps.

Hardware and time: those of toy.py for each arm. Expected, from summaries of the paper: revising always is worse on good
drafts; internal, then external evolution is better than either alone; more prompts are better.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.seft import Config
from jaxsi.runs.config_file import load_config
from jaxsi.stages.reviser import always_revise
from jaxsi.toyworld.reviser import double_prompts, half_prompts


def configs() -> dict[str, Config]:
    toy = load_config(Path(__file__).with_name("toy.py"))
    epochs = toy.sft.epochs
    return {
        "always revise": dataclasses.replace(toy, external=dataclasses.replace(toy.external, target=always_revise)),
        "internal only": dataclasses.replace(toy, internal_rounds=toy.iterations),
        "external only": dataclasses.replace(toy, internal_rounds=0),
        "half the prompts": dataclasses.replace(
            toy, prompts=half_prompts, sft=dataclasses.replace(toy.sft, epochs=2 * epochs)
        ),
        "double the prompts": dataclasses.replace(
            toy, prompts=double_prompts, sft=dataclasses.replace(toy.sft, epochs=epochs // 2)
        ),
    }
