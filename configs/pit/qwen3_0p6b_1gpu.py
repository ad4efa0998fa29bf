"""Qwen3-0.6B and its improver learn from HH-RLHF what a better response is, on one GPU.

    XLA_CLIENT_MEM_FRACTION=0.92 jaxsi run configs/pit/qwen3_0p6b_1gpu.py

Hardware: one GPU with 24 GB (pip install "jaxsi[cuda12]"). Two moments are tight. Sampling in round 1 holds four models
and the weights in training as float32 (11.9 GB), bfloat16 weights to sample with (1.2), and the keys and values of 16
rows of at most 2,560 tokens (4.7). Reward training holds three models (7.2), its own state and gradients (11.9), and
what a group keeps (`jaxsi plan configs/pit/qwen3_0p6b_1gpu.py --topology rtx4090`).

Expectation: unknown, because this project has not run this size. The paper trained PaLM 2 (Bison);
llama3_8b_hh_8xh100.py has the numbers that reports of it give.

Only three things differ from qwen3_4b_1xh200.py: the model, the micro-batches, and the steps of RL, which are 16
prompts of 4 responses, in four updates.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.pit import Config
from jaxsi.runs.config_file import load_config
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig


def smaller(rl: RLConfig) -> RLConfig:
    """Steps of 64 responses: 16 are sampled at a time, and an update has 16."""
    return dataclasses.replace(rl, prompts_per_step=16, batch_size=16, accumulate=8)


def one_at_a_time(train: TrainConfig) -> TrainConfig:
    """The same training, one row or group at a time."""
    return dataclasses.replace(train, accumulate=train.batch_size)


def config() -> Config:
    cfg = load_config(Path(__file__).with_name("qwen3_4b_1xh200.py"))
    return dataclasses.replace(
        cfg,
        model="Qwen/Qwen3-0.6B",
        reward=one_at_a_time(cfg.reward),
        policy_rl=smaller(cfg.policy_rl),
        rl=smaller(cfg.rl),
        sampling=dataclasses.replace(cfg.sampling, batch_size=16),
    )
