"""Qwen3-0.6B improves itself by Temporal Self-Rewarding on your own prompts, on one GPU.

    jaxsi run configs/temporal/qwen3_0p6b_1gpu.py --prompts prompts.jsonl

Hardware: one GPU with 24 GB or more (pip install "jaxsi[cuda12]"). The tightest moment is DPO: M_1, M_{t-1} and M_f as
float32 (7.2 GB), the weights and moments in training (7.2), their gradients and a micro-batch's (4.8), and what 4 rows
of 2,048 tokens keep (0.5). Together that is 19.7 GB.

Expectation: not measured on this model yet. The paper's models have 7B and 8B parameters.

From notes on the paper (arXiv 2508.06026): 7 responses of the present, the past and the future model to each prompt,
and two iterations. Everything else is that of Self-Rewarding's config beside it, so chosen there.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.temporal import Config
from jaxsi.runs.config_file import load_config


def config() -> Config:
    one = load_config(Path(__file__).parents[1] / "self_rewarding" / "qwen3_0p6b_1gpu.py")
    shared = {field.name: getattr(one, field.name) for field in dataclasses.fields(Config)}
    dpo = dataclasses.replace(one.dpo, nll_coef=0.0)
    return Config(**shared | {"sampling": dataclasses.replace(one.sampling, num_samples=7), "dpo": dpo})
