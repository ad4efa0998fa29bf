"""The paper's run with Llama-3.1-8B in the 70B's place, on a TPU v5e-64.

    jaxsi run configs/self_rewarding/llama3_8b_v5e64.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5e chips (8 x 8, 16 GiB each); start the command once on every host. Mesh: fsdp 16 x tensor 4. On each
chip 8B float32 weights take 0.5 GB, gradients as much, and moments twice that; bfloat16 weights to sample with take 4.0
GB. The tightest moment is early stopping: M_0, M_{t-1} and two checkpoints (2.0 GB), the training state (1.5), sampling
weights, and the keys and values of 32 rows of 2,048 tokens (2.1). Together that is 9.7 of 17.2 GB per chip. DPO, a step
of which compiles to 5.3 GB for v5e:8x8, needs 6.8.

Expectation: unknown, because this project has not run this size. The paper has no 8B, and others found that plain
self-rewarding stalls at 7B and 8B (arXiv 2410.12735).

Three things differ from llama2_70b_v5p128.py: the model, the instruct model that writes new prompts, and the mesh. The
hyper-parameters are the same. Pin the models' revisions as NAME@REVISION.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.self_rewarding import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config


def config() -> Config:
    paper = load_config(Path(__file__).with_name("llama2_70b_v5p128.py"))
    return dataclasses.replace(
        paper,
        model="meta-llama/Llama-3.1-8B",
        prompts=dataclasses.replace(paper.prompts, generator="meta-llama/Llama-3.1-8B-Instruct"),
        mesh=MeshConfig(data=1, fsdp=16, tensor=4),
    )
