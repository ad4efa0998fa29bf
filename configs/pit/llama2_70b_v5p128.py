"""A base model of 70B and its improver learn from HH-RLHF what a better response is, on a TPU v5p-128.

    jaxsi run configs/pit/llama2_70b_v5p128.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5p chips (95 GB each) in one slice, the command started once on every host; mesh fsdp 8 x tensor 8.
69B float32 weights are 4.3 GB a chip, gradients as much and moments twice that. Tightest: the samples of round 1, with
four models (17.2 GB: the policy after RL, the gap reward model, the SFT improver and round 0's), the weights and
moments in training (12.9), bfloat16 weights to sample with (17.2) and the keys and values of 64 rows of at most 2,560
tokens (6.7): 54.0 GB a chip; an update of RL, which compiles to 29.9 GB for v5p:4x4x4, is at 47.1. Expectation: never
run by this project at this size. The paper trained PaLM 2 (Bison); what reports of it have is in
llama3_8b_hh_8xh100.py.

All of it is that config's, which says what is known of the paper and what was chosen, but the model and the mesh.
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
