"""A base model of 8B and its improver learn from HH-RLHF what a better response is, on a TPU v5e-64.

    jaxsi run configs/pit/llama3_8b_v5e64.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5e chips (8 x 8, 16 GiB each); start the command once on every host. Mesh: fsdp 16 x tensor 4. On each
chip 8B float32 weights take 0.5 GB, gradients as much, and moments twice that. The tightest moment is sampling in round
1: four models (2.0 GB), the weights and moments in training (1.5), bfloat16 weights to sample with (4.0), and the keys
and values of 32 rows of at most 2,560 tokens (2.7). Together that is 10.2 of 17.2 GB per chip. An update of RL, which
compiles to 3.5 GB for v5e:8x8, needs 5.5.

Expectation: unknown, because this project has not run this size. The paper trained PaLM 2 (Bison);
llama3_8b_hh_8xh100.py has the numbers that reports of it give.

Only the mesh differs from llama3_8b_hh_8xh100.py, which says what is known of the paper and what was chosen here.
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
