"""The paper's run with Llama-3.1-8B in the 70B's place, on 8 GPUs.

    jaxsi run configs/self_rewarding/llama3_8b_8xh100.py

Hardware: 8 GPUs with 80 GB each (pip install "jaxsi[cuda12]"). Mesh: fsdp 8. On each GPU 8B float32 weights take 4.0
GB, gradients as much, and moments twice that; the bfloat16 weights to sample with are whole on each, 16.1 GB. The
tightest moment is early stopping: M_0, M_{t-1} and two checkpoints (16.1 GB), the training state (12.0), sampling
weights, and the keys and values of 32 rows of 2,048 tokens (8.6). Together that is 52.8 GB per GPU.

Expectation: unknown, because this project has not run this size. The paper has no 8B, and others found that plain
self-rewarding stalls at 7B and 8B (arXiv 2410.12735).

Only the mesh and the rows that are sampled at a time differ from llama3_8b_v5e64.py, and so from the paper.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.self_rewarding import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config


def config() -> Config:
    tpu = load_config(Path(__file__).with_name("llama3_8b_v5e64.py"))
    stop = dataclasses.replace(
        tpu.early_stop, judge=dataclasses.replace(tpu.judge, batch_size=256)
    )  # reads two responses
    return dataclasses.replace(
        tpu,
        early_stop=stop,
        sampling=dataclasses.replace(tpu.sampling, batch_size=256),
        mesh=MeshConfig(data=1, fsdp=8),
    )
