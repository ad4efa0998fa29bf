"""Qwen3-4B-Instruct improves itself on your own prompts, on one H200.

    XLA_CLIENT_MEM_FRACTION=0.95 jaxsi run configs/self_rewarding/qwen3_4b_1xh200.py --prompts prompts.jsonl

Hardware: one GPU with 141 GB (pip install "jaxsi[cuda12]"). The tightest moment is DPO: M_1 and M_2 as float32 (32.2
GB), the weights and moments in training (48.3), their gradients and a micro-batch's (32.2), and what 4 rows of 2,048
tokens keep (1.5). Together that is 114 GB, more than the three quarters of the memory that JAX takes by default.

Expectation: unknown, because this project has not run this size. The paper's gains are those of a 70B model.

Three things differ from qwen3_0p6b_1gpu.py: the model, its judging by parsed scores, as in the paper, and the rows that
are sampled at a time. `--model FOLDER` takes any instruct model of 4B.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.self_rewarding import Config
from jaxsi.runs.config_file import load_config


def config() -> Config:
    small = load_config(Path(__file__).with_name("qwen3_0p6b_1gpu.py"))
    return dataclasses.replace(
        small,
        model="Qwen/Qwen3-4B-Instruct-2507",
        sampling=dataclasses.replace(small.sampling, batch_size=128),
        judge=dataclasses.replace(small.judge, max_new_tokens=512, expected=False),
    )
