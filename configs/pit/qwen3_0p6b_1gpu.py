"""Qwen3-0.6B and its improver learn from HH-RLHF what a better response is, on one GPU.

    XLA_CLIENT_MEM_FRACTION=0.92 jaxsi run configs/pit/qwen3_0p6b_1gpu.py

Hardware: one GPU with 24 GB (pip install "jaxsi[cuda12]"). Tightest: the samples of round 1, with four models and the
weights in training as float32 (11.9 GB), bfloat16 weights to sample with (1.2) and the keys and values of 16 rows of at
most 2,560 tokens (4.7); and reward training, with three models (7.2), its own state and gradients (11.9) and what a
group keeps (`jaxsi plan configs/pit/qwen3_0p6b_1gpu.py --topology rtx4090`). Expectation: never run by this project at
this size. The paper trained PaLM 2 (Bison); what reports of it have is in llama3_8b_hh_8xh100.py.

All of it is qwen3_4b_1xh200.py's but the model, the micro-batches and the steps of RL: 16
prompts of 4 responses, in four updates.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.pit import Config
from jaxsi.runs.config_file import load_config
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig


def smaller(rl: RLConfig) -> RLConfig:
    """Steps of 64 responses, 16 of them in the making at a time and in an update."""
    return dataclasses.replace(rl, prompts_per_step=16, batch_size=16, accumulate=8)


def one_at_a_time(train: TrainConfig) -> TrainConfig:
    """The same training, a row or group at a time."""
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
