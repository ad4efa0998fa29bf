"""The paper's run with Llama-3.1-8B-Instruct, on a TPU v5e-64.

    OPENAI_API_KEY=... jaxsi run configs/srt/llama3_8b_v5e64.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5e chips (8 x 8, 16 GiB each); start the command once on every host (pip install
"jaxsi[tpu,endpoint]"). Mesh: fsdp 16 x tensor 4. On each chip 8B float32 weights take 0.5 GB, gradients as much, and
moments twice that. The tightest moment is DPO: a step with pairs of 8,192 tokens, which compiles to 8.9 GB for v5e:8x8,
beside the base model and M_self (1.0). Together that is 9.9 of 17.2 GB per chip. Sampling, with bfloat16 weights (4.0)
and the keys and values of 16 rows of up to 8,192 tokens (4.3), needs 9.3. The critic costs what it does in
tulu2_7b_8xh100.py.

Expectation: unknown. This project has not run this size, and the paper did not use this model, which has been aligned
before.

Only the model differs from tulu2_70b_v5p128.py, and so from the paper: Tulu 2 7B writes the drafts of stage 1.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config
from jaxsi.runs.config_file import load_config


def config() -> Config:
    paper = load_config(Path(__file__).with_name("tulu2_70b_v5p128.py"))
    return dataclasses.replace(paper, model="meta-llama/Llama-3.1-8B-Instruct")
