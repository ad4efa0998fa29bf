"""A base model of 70B and its improver learn from HH-RLHF what a better response is, on a TPU v5p-128.

    jaxsi run configs/pit/llama2_70b_v5p128.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5p chips (95 GB each) in one slice; start the command once on every host. Mesh: fsdp 8 x tensor 8. On
each chip 69B float32 weights take 4.3 GB, gradients as much, and moments twice that. The tightest moment is sampling in
round 1: four models (17.2 GB: the policy after RL, the gap reward model, the SFT improver and round 0's), the weights
and moments in training (12.9), bfloat16 weights to sample with (17.2), and the keys and values of 64 rows of at most
2,560 tokens (6.7). Together that is 54.0 GB per chip. An update of RL, which compiles to 29.9 GB for v5p:4x4x4, needs
47.1.

Expectation: unknown, because this project has not run this size. The paper trained PaLM 2 (Bison);
llama3_8b_hh_8xh100.py has the numbers that reports of it give.

Only the model and the mesh differ from llama3_8b_hh_8xh100.py, which says what is known of the paper and what was
chosen here.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.pit import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config


def config() -> Config:
    return dataclasses.replace(
        load_config(Path(__file__).with_name("llama3_8b_hh_8xh100.py")),
        model="meta-llama/Llama-2-70b-hf",
        mesh=MeshConfig(data=1, fsdp=8, tensor=8),
    )
