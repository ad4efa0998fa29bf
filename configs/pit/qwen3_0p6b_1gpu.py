"""Qwen3-0.6B and its improver learn from HH-RLHF what a better response is, on one GPU.

    XLA_CLIENT_MEM_FRACTION=0.95 jaxsi run configs/pit/qwen3_0p6b_1gpu.py

Hardware: one GPU with 40 GB (pip install "jaxsi[cuda12]"). Tightest: the samples of round 1, with seven models as
float32 (16.7 GB), the weights and moments in training (7.2), bfloat16 weights to sample with (1.2) and the keys and
values of 64 rows of 1,536 tokens (11.3): 36.3 of 42.9 GB. A GPU of 24 GB does not hold it: models and training state
alone are 23.8 GB. Expectation: never run by this project at this size. The paper trained PaLM 2 (Bison); what reports
of it have is in llama3_8b_hh_8xh100.py.

All of it is qwen3_1p7b_1xh200.py's but the model and the steps of RL: 32 prompts of 4 responses, in two updates.
"""

import dataclasses
from pathlib import Path

from jaxsi.config_file import load_config
from jaxsi.methods.pit import Config
from jaxsi.rl import RLConfig


def smaller(rl: RLConfig) -> RLConfig:
    """Steps of 128 responses, 64 of them in the making at a time and in an update."""
    return dataclasses.replace(rl, prompts_per_step=32, batch_size=64, accumulate=16)


def config() -> Config:
    cfg = load_config(Path(__file__).with_name("qwen3_1p7b_1xh200.py"))
    return dataclasses.replace(
        cfg,
        model="Qwen/Qwen3-0.6B",
        policy_rl=smaller(cfg.policy_rl),
        rl=smaller(cfg.rl),
        sampling=dataclasses.replace(cfg.sampling, batch_size=64),
    )
