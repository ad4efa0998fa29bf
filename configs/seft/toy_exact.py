"""A control arm of the embedded world: the exact grader in the reviser's place.

    jaxsi run configs/seft/toy_exact.py

As toy.py, except that the drafts are chosen by their grades, and a draft without the full grade becomes the correct
response. Hardware and time are the same. Expected: at least the gain of toy.py; this is what evolution does with a
perfect reviser.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.seft import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.reviser import exact_best_of_n, exact_revise


def config() -> Config:
    toy = load_config(Path(__file__).with_name("toy.py"))
    return dataclasses.replace(
        toy,
        internal=dataclasses.replace(toy.internal, target=exact_best_of_n),
        external=dataclasses.replace(toy.external, target=exact_revise),
    )
