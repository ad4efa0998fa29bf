"""Qwen3-0.6B learns to criticise and refine from a model of 3B on the same GPU, then from itself.

    XLA_CLIENT_MEM_FRACTION=0.95 jaxsi run configs/srt/qwen3_0p6b_1gpu.py

Hardware: one GPU with 24 GB (pip install "jaxsi[cuda12]"); no endpoint and no key. Tightest: the critic, with its
weights twice (12.3 GB: as loaded and as sampled from), the base model likewise (3.6) and the keys and values of 16 rows
of 6,144 tokens (3.6): 19.5 GB; DPO, with the base model and M_self as float32 (4.8), the weights and moments in
training (7.2), gradients (4.8) and what 2 rows of 4,096 tokens keep (0.5), is at 17.2. Expectation: never run by this
project at this size, and the critic is weak: what a 3B teaches a 0.6B is for you to see.

All of it is qwen3_4b_1xh200.py's but the models and the lengths: 4,096 tokens of a draft, feedback and refinement.
`--model FOLDER` takes another model; the critic's is named below.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config
from jaxsi.runs.config_file import load_config
from jaxsi.stages.critique import LocalCritic
from jaxsi.training.train import TrainConfig


def small(train: TrainConfig) -> TrainConfig:
    """A row or pair at a time, of at most 4,096 tokens."""
    return dataclasses.replace(train, accumulate=train.batch_size, max_length=4096)


def config() -> Config:
    cfg = load_config(Path(__file__).with_name("qwen3_4b_1xh200.py"))
    return dataclasses.replace(
        cfg,
        model="Qwen/Qwen3-0.6B",
        critic=LocalCritic(model="Qwen/Qwen2.5-3B-Instruct", max_new_tokens=2048, batch_size=16),
        sampling=dataclasses.replace(cfg.sampling, batch_size=32),
        critique=dataclasses.replace(cfg.critique, batch_size=16),
        sft=small(cfg.sft),
        dpo=dataclasses.replace(cfg.dpo, train=small(cfg.dpo.train)),
    )
