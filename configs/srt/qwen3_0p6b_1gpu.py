"""Qwen3-0.6B learns to criticise and refine from a model of 3B on the same GPU, then from itself.

    XLA_CLIENT_MEM_FRACTION=0.95 jaxsi run configs/srt/qwen3_0p6b_1gpu.py

Hardware: one GPU with 24 GB (pip install "jaxsi[cuda12]"); it needs neither an endpoint nor a key. The tightest moment
is the critic: its weights twice (12.3 GB: as loaded and as sampled from), the base model likewise (3.6), and the keys
and values of 16 rows of 6,144 tokens (3.6). Together that is 19.5 GB. DPO needs 17.2: the base model and M_self as
float32 (4.8), the weights and moments in training (7.2), gradients (4.8), and what 2 rows of 4,096 tokens keep (0.5).

Expectation: unknown, because this project has not run this size. The critic is weak: you will see what a 3B can teach a
0.6B.

Only the models and the lengths differ from qwen3_4b_1xh200.py: draft, feedback and refinement have 4,096 tokens
together. `--model FOLDER` takes another model; the critic's is named below.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config
from jaxsi.runs.config_file import load_config
from jaxsi.stages.critique import LocalCritic
from jaxsi.training.train import TrainConfig


def small(train: TrainConfig) -> TrainConfig:
    """One row or pair of at most 4,096 tokens at a time."""
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
