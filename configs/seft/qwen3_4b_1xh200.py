"""Qwen3-4B-Instruct evolves on UltraFeedback's prompts, with a reviser that learnt from Nectar's rankings.

    XLA_CLIENT_MEM_FRACTION=0.95 jaxsi run configs/seft/qwen3_4b_1xh200.py

Hardware: one GPU with 141 GB (pip install "jaxsi[cuda12]"). The tightest moment is SFT from the second round on: base
model, reviser and policy as float32 (48.3 GB), the weights and moments in training (48.3), their gradients and a
micro-batch's (32.2), and what 4 rows of 2,048 tokens keep (1.5). Together that is 130 GB, more than the three quarters
of the memory that JAX takes by default.

Expectation: unknown. This project has not run this size, and could not read the paper's text and numbers.

Only the model and the rows that are sampled and trained on at a time differ from nectar_8b_8xh100.py, which says what
summaries of the paper have and what was chosen here.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.seft import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config
from jaxsi.training.train import TrainConfig


def in_fours(train: TrainConfig) -> TrainConfig:
    """The same training in micro-batches of 4 rows."""
    return dataclasses.replace(train, accumulate=train.batch_size // 4)


def config() -> Config:
    cfg = load_config(Path(__file__).with_name("nectar_8b_8xh100.py"))
    return dataclasses.replace(
        cfg,
        model="Qwen/Qwen3-4B-Instruct-2507",
        reviser=dataclasses.replace(
            cfg.reviser,
            warm_up=in_fours(cfg.reviser.warm_up),
            adaptive=in_fours(cfg.reviser.adaptive),
            writing=dataclasses.replace(cfg.reviser.writing, batch_size=64),
        ),
        sampling=dataclasses.replace(cfg.sampling, batch_size=128),
        sft=in_fours(cfg.sft),
        mesh=MeshConfig(),
    )
