"""An instruct model of 70B evolves on UltraFeedback's prompts, with a reviser that learnt from Nectar's rankings.

    jaxsi run configs/seft/llama3_70b_v5p128.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5p chips (95 GB each) in one slice; start the command once on every host. Mesh: fsdp 8 x tensor 8. On
each chip 71B float32 weights take 4.4 GB, gradients as much, and moments twice that; bfloat16 weights to sample with
take 17.6 GB. The tightest moment is the reviser's reading of held-out responses: base model, reviser and policy (13.2
GB), the sampling weights of the last two (35.3), and the keys and values of 32 rows of 3,072 tokens (4.0). Together
that is 52.5 GB per chip. SFT, a step of which compiles to 36.5 GB for v5p:4x4x4, needs 49.7.

Expectation: unknown. This project has not run this size, and could not read the paper's text and numbers.

Only the model and the mesh differ from nectar_8b_8xh100.py, which says what summaries of the paper have and what was
chosen here. Pin the models' revisions as NAME@REVISION.
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
