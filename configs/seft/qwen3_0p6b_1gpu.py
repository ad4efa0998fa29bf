"""Qwen3-0.6B evolves on UltraFeedback's prompts, with a reviser that learnt from Nectar's rankings, on one GPU.

    XLA_CLIENT_MEM_FRACTION=0.95 jaxsi run configs/seft/qwen3_0p6b_1gpu.py

Hardware: one GPU with 24 GB (pip install "jaxsi[cuda12]"). The tightest moment is SFT from the second round on: base
model, reviser and policy as float32 (7.2 GB), the weights and moments in training (7.2), their gradients and a
micro-batch's (4.8), and what 4 rows of 2,048 tokens keep (0.5). Together that is 19.5 GB, more than the three quarters
of the memory that JAX takes by default.

Expectation: unknown. This project has not run this size, and could not read the paper's text and numbers.

Only the model and the rows that are sampled or scored at a time differ from qwen3_4b_1xh200.py.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.seft import Config
from jaxsi.runs.config_file import load_config


def config() -> Config:
    cfg = load_config(Path(__file__).with_name("qwen3_4b_1xh200.py"))
    writing = dataclasses.replace(cfg.reviser.writing, batch_size=16)
    labels = dataclasses.replace(cfg.reviser.labels, batch_size=16)
    return dataclasses.replace(
        cfg,
        model="Qwen/Qwen3-0.6B",
        reviser=dataclasses.replace(cfg.reviser, writing=writing, labels=labels),
        sampling=dataclasses.replace(cfg.sampling, batch_size=32),
    )
