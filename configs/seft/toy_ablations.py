"""The embedded world: what SEFT's parts are worth, each arm as toy.py but for one thing.

    jaxsi bench methods --methods seft --ablations

always revise: no draft is kept. internal only, external only: one kind of round for all of them. half, double the
prompts: with as many training steps.

Hardware and time of toy.py for each arm. Expected, from summaries of the paper: the first is worse
on good drafts, internal then external evolution is better than either, and more prompts are better.
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
