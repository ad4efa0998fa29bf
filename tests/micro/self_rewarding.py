"""The micro world: the toy config, small enough to be killed and run again many times."""

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

from jaxsi.evals.toy import ToyEvaluation
from jaxsi.methods.self_rewarding import Config, SeedData
from jaxsi.toyworld import annotators

CONFIGS = Path(__file__).parents[2] / "configs"


def _toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy", CONFIGS / "self_rewarding" / "toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ift():
    return annotators.ift(16, 1)


def rankings():
    return annotators.rankings(8, 2)


def config() -> Config:
    toy = _toy().config()
    return dataclasses.replace(
        toy,
        seed_data=SeedData(ift=ift, rankings=rankings, max_share=1.0),
        prompts=dataclasses.replace(toy.prompts, num_prompts=24),
        sampling=dataclasses.replace(toy.sampling, batch_size=32),
        sft=dataclasses.replace(toy.sft, batch_size=4, epochs=2, checkpoint_every=2, log_every=1),
        dpo=dataclasses.replace(
            toy.dpo, train=dataclasses.replace(toy.dpo.train, batch_size=4, epochs=2, checkpoint_every=2, log_every=1)
        ),
        evaluate=ToyEvaluation(num_prompts=8, judged_prompts=4),
        iterations=2,
    )
