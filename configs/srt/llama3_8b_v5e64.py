"""The paper's run with Llama-3.1-8B-Instruct, on a TPU v5e-64.

    OPENAI_API_KEY=... jaxsi run configs/srt/llama3_8b_v5e64.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5e chips (8 x 8, 16 GiB each), the command started once on every host (pip install
"jaxsi[tpu,endpoint]"); mesh fsdp 16 x tensor 4. 8B float32 weights are 0.5 GB a chip, gradients as much and moments
twice that. Tightest: DPO, a step of which, with pairs of 8,192 tokens, compiles to 8.9 GB for v5e:8x8, beside the base
model and M_self (1.0): 9.9 of 17.2 GB a chip; sampling, with bfloat16 weights (4.0) and the keys and values of 16 rows
of up to 8,192 tokens (4.3), is at 9.3. The critic costs what it does in tulu2_7b_8xh100.py. Expectation: never run by
this project at this size, nor by the paper with this model, which has been aligned before.

All of it is tulu2_70b_v5p128.py's, and so the paper's, but the model.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config
from jaxsi.runs.config_file import load_config


def config() -> Config:
    paper = load_config(Path(__file__).with_name("tulu2_70b_v5p128.py"))
    return dataclasses.replace(paper, model="meta-llama/Llama-3.1-8B-Instruct")
