"""Qwen3-0.6B acts, judges, and judges its judgments, on your own prompts, on one GPU.

    jaxsi run configs/meta_rewarding/qwen3_0p6b_1gpu.py --prompts prompts.jsonl

Hardware: one GPU with 24 GB or more (pip install "jaxsi[cuda12]"). TODO

Expectation: not measured on this model yet. The paper's gains are those of an 8B instruct model, and a model this small
is a poor meta-judge: look at position_bias and prefers_higher in summary.json.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.meta_rewarding import Config, MetaPairs
from jaxsi.methods.seeded import PairConfig
from jaxsi.runs.config_file import load_config
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.meta_judge import MetaJudgeConfig


def config() -> Config:
    base = load_config(Path(__file__).parents[1] / "self_rewarding" / "qwen3_0p6b_1gpu.py")
    return Config(
        model=base.model,
        seed_data=None,
        prompts=base.prompts,
        sampling=SamplingConfig(num_samples=7, temperature=0.8, top_p=0.95, max_new_tokens=1024, batch_size=32),
        judge=JudgeConfig(num_samples=11, temperature=0.7, top_p=0.9, max_new_tokens=256, expected=True, batch_size=32),
        pairs=MetaPairs(
            actor=PairConfig(length_control=0.32),
            meta=MetaJudgeConfig(
                judge=JudgeConfig(
                    num_samples=1, temperature=0.7, top_p=0.9, max_new_tokens=256, expected=True, batch_size=16
                ),
                max_characters=(1100, 1000),
            ),
        ),
        sft=None,
        dpo=dataclasses.replace(base.dpo, train=dataclasses.replace(base.dpo.train, max_length=2560)),
        iterations=5,
    )
