"""The paper's largest run: Tulu 2 70B learns to criticise and refine from GPT-4 Turbo, then from itself, on a v5p-128.

    OPENAI_API_KEY=... jaxsi run configs/srt/tulu2_70b_v5p128.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5p chips (95 GB each) in one slice, the command started once on every host (pip install
"jaxsi[tpu,endpoint]"); mesh fsdp 16 x tensor 4. 69B float32 weights are 4.3 GB a chip, gradients as much and moments
twice that. Tightest: DPO, a step of which, with pairs of 8,192 tokens, compiles to 49.1 GB for v5p:4x4x4, beside the
base model and M_self (8.6): 57.8 GB a chip; sampling, with bfloat16 weights (34.5) and the keys and values of 16 rows
of up to 8,192 tokens (10.7), is at 53.8. The critic costs what it does in tulu2_7b_8xh100.py. Expectation: never run by
this project at this size. The paper reports for its 70B, on AlpacaEval 2.0 against GPT-4 Turbo, 9.6 % wins before, 20.2
% after stage 1 and 25.8 % after stage 2, and an average over four benchmarks of 70.4, 74.1 and 75.1.

All of it is tulu2_7b_8xh100.py's, hyper-parameters included, but the model and the mesh. Other than in the paper, where
the 7B drafts for every size: here the 70B writes them itself.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config


def config() -> Config:
    paper = load_config(Path(__file__).with_name("tulu2_7b_8xh100.py"))
    return dataclasses.replace(
        paper,
        model="allenai/tulu-2-70b",
        sft=dataclasses.replace(paper.sft, accumulate=2),
        dpo=dataclasses.replace(paper.dpo, train=dataclasses.replace(paper.dpo.train, accumulate=2)),
        mesh=MeshConfig(data=1, fsdp=16, tensor=4),
    )
