"""Qwen3-4B-Instruct learns to criticise and refine from a model of 14B on the same GPU, then from itself.

    XLA_CLIENT_MEM_FRACTION=0.95 jaxsi run configs/srt/qwen3_4b_1xh200.py

Hardware: one GPU with 141 GB (pip install "jaxsi[cuda12]"); it needs neither an endpoint nor a key. The tightest moment
is DPO: the base model and M_self as float32 (32.2 GB), the weights and moments in training (48.3), their gradients and
a micro-batch's (32.2), and what 4 rows of 8,192 tokens keep (6.0). Together that is 119 GB, more than the three
quarters of the memory that JAX takes by default. The critic takes 59.1 GB beside the base model's 24.1, and is gone
before training.

Expectation: unknown, because this project has not run this size. The paper's critic is far stronger than this one: you
will see what a 14B can teach a 4B.

From tulu2_7b_8xh100.py, and so from the paper: the data, temperatures, learning rates, epochs, batch and beta. Chosen
here: the models, and a fifth of the prompts (5,000 and 15,000; the paper's win rates rise with more). `--model FOLDER`
takes another model; the critic's is named below.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config
from jaxsi.runs.records import Prompt
from jaxsi.stages import datasets
from jaxsi.stages.critique import LocalCritic
from jaxsi.training.train import TrainConfig


def paper() -> Config:
    return load_config(Path(__file__).with_name("tulu2_7b_8xh100.py"))


def instructions() -> list[Prompt]:
    """20,000 of the paper's instructions."""
    prompts = paper().prompts
    assert callable(prompts)
    return datasets.first(prompts(), 20_000)


def in_small_parts(train: TrainConfig) -> TrainConfig:
    """Micro-batches of 2 examples or pairs."""
    return dataclasses.replace(train, accumulate=16)


def config() -> Config:
    cfg = paper()
    assert cfg.dpo is not None
    return dataclasses.replace(
        cfg,
        model="Qwen/Qwen3-4B-Instruct-2507",
        prompts=instructions,
        critic_prompts=5_000,
        critic=LocalCritic(model="Qwen/Qwen2.5-14B-Instruct", max_new_tokens=2048, batch_size=32),
        sampling=dataclasses.replace(cfg.sampling, batch_size=128),
        critique=dataclasses.replace(cfg.critique, batch_size=64),
        sft=in_small_parts(cfg.sft),
        dpo=dataclasses.replace(cfg.dpo, train=in_small_parts(cfg.dpo.train)),
        mesh=MeshConfig(),
    )
