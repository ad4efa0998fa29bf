"""Qwen3-1.7B and its improver learn from HH-RLHF what a better response is, on one H200.

    XLA_CLIENT_MEM_FRACTION=0.95 jaxsi run configs/pit/qwen3_1p7b_1xh200.py

Hardware: one GPU with 141 GB (pip install "jaxsi[cuda12]"). Tightest: the samples of round 1, with seven models as
float32 (48.2 GB), the weights and moments in training (20.6), bfloat16 weights to sample with (3.4) and the keys and
values of 256 rows of 1,536 tokens (45.1): 117 GB, more than the three quarters of the memory that JAX takes by itself.
A model of 4B does not fit: its seven models and training state alone are 161 GB. Expectation: never run by this project
at this size. The paper trained PaLM 2 (Bison); what reports of it have is in llama3_8b_hh_8xh100.py.

All of it is that config's, which says what is known of the paper and what was chosen, but the model, the micro-batches
and the steps of RL: 64 prompts of 4 responses in place of 128. `--model FOLDER` takes any model of up to 1.7B.
"""

import dataclasses
from pathlib import Path

from jaxsi.config_file import load_config
from jaxsi.mesh import MeshConfig
from jaxsi.methods.pit import Config
from jaxsi.rl import RLConfig
from jaxsi.train import TrainConfig


def in_fours(train: TrainConfig) -> TrainConfig:
    """The same training in micro-batches of 4 rows or groups."""
    return dataclasses.replace(train, accumulate=train.batch_size // 4)


def smaller(rl: RLConfig) -> RLConfig:
    """Steps of half the prompts, each one update."""
    return dataclasses.replace(rl, prompts_per_step=64, batch_size=256, accumulate=64)


def config() -> Config:
    cfg = load_config(Path(__file__).with_name("llama3_8b_hh_8xh100.py"))
    return dataclasses.replace(
        cfg,
        model="Qwen/Qwen3-1.7B",
        sft=in_fours(cfg.sft),
        reward=in_fours(cfg.reward),
        policy_rl=smaller(cfg.policy_rl),
        rl=smaller(cfg.rl),
        mesh=MeshConfig(),
    )
