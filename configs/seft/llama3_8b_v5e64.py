"""An instruct model of 8B evolves on UltraFeedback's prompts, with a reviser that learnt from Nectar's rankings.

    jaxsi run configs/seft/llama3_8b_v5e64.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5e chips (8 x 8, 16 GiB each), the command started once on every host; mesh fsdp 16 x tensor 4. 8B
float32 weights are 0.5 GB a chip, gradients as much and moments twice that, bfloat16 weights to sample with 4.0 GB.
Tightest: the reviser reads held-out responses, with the base model, reviser and policy (1.5 GB), the sampling weights
of the last two (8.0) and the keys and values of 16 rows of 3,072 tokens (1.6): 11.1 of 17.2 GB a chip. Expectation:
never run by this project at this size, and the paper's text and numbers were not to be had.

All of it is nectar_8b_8xh100.py's, which says what the paper's summaries have and what was chosen, but the mesh.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.seft import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config


def config() -> Config:
    return dataclasses.replace(
        load_config(Path(__file__).with_name("nectar_8b_8xh100.py")),
        mesh=MeshConfig(data=1, fsdp=16, tensor=4),
    )
