"""Qwen3-4B and its improver learn from HH-RLHF what a better response is, on one H200.

    XLA_CLIENT_MEM_FRACTION=0.92 jaxsi run configs/pit/qwen3_4b_1xh200.py

Hardware: one GPU with 141 GB, and 64 GB of host memory for the moments (pip install "jaxsi[cuda12]"). The tightest
moment is sampling in round 1: four models and the weights in training as float32 (80.4 GB), bfloat16 weights to sample
with (8.0), and the keys and values of 64 rows of at most 2,560 tokens (24.2). Together that is 113 GB, more than the
three quarters of the memory that JAX takes by default (`jaxsi plan configs/pit/qwen3_4b_1xh200.py --topology h200`).

Expectation: unknown, because this project has not run this size. The paper trained PaLM 2 (Bison);
llama3_8b_hh_8xh100.py has the numbers that reports of it give.

That config says what is known of the paper and what was chosen here. These differ from it: the model, the
micro-batches, the place of the moments, and the steps of RL, which have 64 prompts of 4 responses in place of 128, in
four updates.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.pit import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config
from jaxsi.training.optim import OptimConfig
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig


def offloaded(optim: OptimConfig) -> OptimConfig:
    """The moments lie in the host's memory between updates."""
    return dataclasses.replace(optim, offload=True)


def in_fours(train: TrainConfig) -> TrainConfig:
    """The same training in micro-batches of 4 rows or groups."""
    return dataclasses.replace(train, accumulate=train.batch_size // 4)


def smaller(rl: RLConfig) -> RLConfig:
    """Steps of half the prompts; an update has as many rows as are sampled at a time."""
    return dataclasses.replace(rl, optim=offloaded(rl.optim), prompts_per_step=64, batch_size=64, accumulate=16)


def config() -> Config:
    cfg = load_config(Path(__file__).with_name("llama3_8b_hh_8xh100.py"))
    return dataclasses.replace(
        cfg,
        model="Qwen/Qwen3-4B",
        sft=in_fours(cfg.sft),
        reward=dataclasses.replace(in_fours(cfg.reward), optim=offloaded(cfg.reward.optim)),
        policy_rl=smaller(cfg.policy_rl),
        rl=smaller(cfg.rl),
        mesh=MeshConfig(),
    )
