"""An instruct model of 8B evolves on UltraFeedback's prompts, with a reviser that learnt from Nectar's rankings.

    jaxsi run configs/seft/llama3_8b_v5e64.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5e chips (8 x 8, 16 GiB each); start the command once on every host. Mesh: fsdp 16 x tensor 4. On each
chip 8B float32 weights take 0.5 GB, gradients as much, and moments twice that; bfloat16 weights to sample with take 4.0
GB. The tightest moment is the reviser's reading of held-out responses: base model, reviser and policy (1.5 GB), the
sampling weights of the last two (8.0), and the keys and values of 16 rows of 3,072 tokens (1.6). Together that is 11.1
of 17.2 GB per chip.

Expectation: unknown. This project has not run this size, and could not read the paper's text and numbers.

Only the mesh differs from nectar_8b_8xh100.py, which says what summaries of the paper have and what was chosen here.
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
