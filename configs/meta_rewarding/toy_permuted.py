"""A control arm of the embedded world: the model's own scores, shuffled within each prompt, and a coin as meta-judge.

    jaxsi run configs/meta_rewarding/toy_permuted.py

Only the judge and the meta-judge differ from toy.py: neither kind of pairs has a signal. The texts of the judgments
stay with their responses. Hardware and time are the same. Expected: no gain; this is what a loop without a signal does.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.meta_rewarding import Config
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld.seed_data import permuted_scores, tossed


def config() -> Config:
    toy = load_config(Path(__file__).with_name("toy.py"))
    meta = dataclasses.replace(toy.pairs.meta, judging=tossed)
    return dataclasses.replace(toy, judging=permuted_scores, pairs=dataclasses.replace(toy.pairs, meta=meta))
