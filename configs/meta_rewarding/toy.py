"""The embedded world: the shipped seed model answers, judges, and judges its judgments; measured exactly.

    jaxsi run configs/meta_rewarding/toy.py

Hardware: 2 CPU cores, 2.4 GB of memory, three to five minutes. Expected: exact quality rises from about 70 to about 85.
The arms toy_permuted.py and toy_exact.py differ from this file only by their judges.

Different from the paper: a model of a million parameters cannot read the task of a meta-judge. So a rule compares
judgments, without knowledge from outside: of two judgments of a response the one wins whose score is nearer to the mean
of all five. K is 4 and N is 5 (the paper: 7 and 11), and there is no length control (rho 0). Seed data, prompts and
training are those of ../self_rewarding/toy.py.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.meta_rewarding import Config, MetaPairs
from jaxsi.runs.config_file import load_config
from jaxsi.stages.meta_judge import MetaJudgeConfig, nearest_to_mean


def config() -> Config:
    base = load_config(Path(__file__).parents[1] / "self_rewarding" / "toy.py")
    return Config(
        model=base.model,
        seed_data=base.seed_data,
        prompts=base.prompts,
        sampling=base.sampling,
        # At T 0.7 and top-p 0.9 this judge hardly ever says two things of one response: nothing could be compared.
        judge=dataclasses.replace(base.judge, num_samples=5, temperature=1.0, top_p=1.0),
        rubric=base.rubric,
        pairs=MetaPairs(meta=MetaJudgeConfig(judging=nearest_to_mean)),
        sft=base.sft,
        dpo=base.dpo,
        evaluate=base.evaluate,
        iterations=base.iterations,
    )
