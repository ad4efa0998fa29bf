"""A base model of 8B and its improver learn from HH-RLHF what a better response is, on a TPU v5e-64.

    jaxsi run configs/pit/llama3_8b_v5e64.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5e chips (8 x 8, 16 GiB each), the command started once on every host; mesh fsdp 16 x tensor 4. 8B
float32 weights are 0.5 GB a chip, gradients as much and moments twice that. Tightest: the samples of round 1, with four
models (2.0 GB), the weights and moments in training (1.5), bfloat16 weights to sample with (4.0) and the keys and
values of 32 rows of at most 2,560 tokens (2.7): 10.2 of 17.2 GB a chip; an update of RL, which compiles to 3.5 GB for
v5e:8x8, is at 5.5. Expectation: never run by this project at this size. The paper trained PaLM 2 (Bison); what reports
of it have is in llama3_8b_hh_8xh100.py.

All of it is that config's, which says what is known of the paper and what was chosen, but the mesh.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.pit import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config


def config() -> Config:
    return dataclasses.replace(
        load_config(Path(__file__).with_name("llama3_8b_hh_8xh100.py")),
        mesh=MeshConfig(data=1, fsdp=16, tensor=4),
    )
