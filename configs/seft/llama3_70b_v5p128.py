"""An instruct model of 70B evolves on UltraFeedback's prompts, with a reviser that learnt from Nectar's rankings.

    jaxsi run configs/seft/llama3_70b_v5p128.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5p chips (95 GB each) in one slice, the command started once on every host; mesh fsdp 8 x tensor 8.
71B float32 weights are 4.4 GB a chip, gradients as much and moments twice that, bfloat16 weights to sample with 17.6
GB. Tightest: the reviser reads held-out responses, with the base model, reviser and policy (13.2 GB), the sampling
weights of the last two (35.3) and the keys and values of 32 rows of 3,072 tokens (4.0): 52.5 GB a chip; SFT, a step of
which compiles to 36.5 GB for v5p:4x4x4, is at 49.7. Expectation: never run by this project at this size, and the
paper's text and numbers were not to be had.

All of it is nectar_8b_8xh100.py's, which says what the paper's summaries have and what was chosen, but the model and
the mesh. Pin the models' revisions as NAME@REVISION.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.seft import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config


def config() -> Config:
    return dataclasses.replace(
        load_config(Path(__file__).with_name("nectar_8b_8xh100.py")),
        model="meta-llama/Llama-3.1-70B-Instruct",
        mesh=MeshConfig(data=1, fsdp=8, tensor=8),
    )
