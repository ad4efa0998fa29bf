"""Tulu 2 7B plays against itself with the demonstrations that it was fine-tuned on, on a TPU v5e-64.

    jaxsi run configs/spin/tulu2_7b_v5e64.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5e chips (8 x 8, 16 GiB each); start the command once on every host. Mesh: fsdp 16 x tensor 4. On each
chip 6.7B float32 weights take 0.4 GB, gradients as much, and moments twice that. The tightest moment is sampling:
M_{t-1} (0.4 GB), its bfloat16 weights (3.4), and the keys and values of 32 rows of 1,024 tokens (4.3). Together that is
8.1 of 17.2 GB per chip. DPO, a step of which compiles to 4.9 GB for v5e:8x8, needs 5.3.

Expectation: this project has not run this size. The paper reports for a Mistral 7B, over two to four iterations, that
the average on the Open LLM Leaderboard rises from 58.14 to 63.16.

From the paper (arXiv 2401.01335) and its code: an SFT model on 50,000 of its own SFT examples; batch 64, 5e-7 in the
first two iterations after 10 % of warm-up, linear decay, beta 0.1, 1,024 tokens, bfloat16. Different from the paper:
the model and the data (the paper: zephyr-7b-sft-full on UltraChat), AdamW in RMSProp's place, 2 epochs, pairs of only
the newest opponent, temperature 1. Pin the model's revision as NAME@REVISION.
"""

import random

from jaxsi.evals.held_out import HeldOutWinRate
from jaxsi.methods.spin import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.records import SFTExample
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages import datasets
from jaxsi.training.optim import OptimConfig, linear
from jaxsi.training.train import DPOConfig, TrainConfig


def demonstrations() -> list[SFTExample]:
    """50,000 random single-turn examples of the mixture, which mostly fit in 512 tokens each."""
    short = [
        example
        for example in datasets.tulu2_mixture()
        if len(example.messages) == 1 and len(example.messages[0]["content"]) <= 1500 and len(example.response) <= 1500
    ]
    return random.Random(0).sample(short, 50_000)


def config() -> Config:
    return Config(
        model="allenai/tulu-2-7b",
        demonstrations=demonstrations,
        sampling=SamplingConfig(num_samples=1, temperature=1.0, top_p=1.0, max_new_tokens=512, batch_size=512),
        dpo=DPOConfig(
            train=TrainConfig(
                optim=OptimConfig(learning_rate=5e-7, end_learning_rate=0.0, decay=linear, warmup_ratio=0.1),
                batch_size=64,
                epochs=2,
                max_length=1024,
            ),
            beta=0.1,
        ),
        mesh=MeshConfig(data=1, fsdp=16, tensor=4),
        iterations=2,
        evaluate=HeldOutWinRate(),
    )
