"""The paper's largest run: Tulu 2 70B learns to criticise and refine from GPT-4 Turbo, then from itself, on a v5p-128.

    OPENAI_API_KEY=... jaxsi run configs/srt/tulu2_70b_v5p128.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5p chips (95 GB each) in one slice; start the command once on every host (pip install
"jaxsi[tpu,endpoint]"). Mesh: fsdp 16 x tensor 4. On each chip 69B float32 weights take 4.3 GB, gradients as much, and
moments twice that. The tightest moment is DPO: a step with pairs of 8,192 tokens, which compiles to 49.1 GB for
v5p:4x4x4, beside the base model and M_self (8.6). Together that is 57.8 GB per chip. Sampling, with bfloat16 weights
(34.5) and the keys and values of 16 rows of up to 8,192 tokens (10.7), needs 53.8. The critic costs what it does in
tulu2_7b_8xh100.py.

Expectation: this project has not run this size. The paper reports for its 70B, on AlpacaEval 2.0 against GPT-4 Turbo,
9.6 % wins before, 20.2 % after stage 1 and 25.8 % after stage 2, and an average over four benchmarks of 70.4, 74.1 and
75.1.

Only the model and the mesh differ from tulu2_7b_8xh100.py; the hyper-parameters are the same. As in the paper, the 7B
writes the drafts of stage 1 for this size, too.
"""

import dataclasses
from pathlib import Path

from jaxsi.methods.srt import Config, FirstStage
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_file import load_config


def config() -> Config:
    paper = load_config(Path(__file__).with_name("tulu2_7b_8xh100.py"))
    return dataclasses.replace(
        paper,
        model="allenai/tulu-2-70b",
        first_stage=FirstStage(drafts="allenai/tulu-2-7b"),
        sft=dataclasses.replace(paper.sft, accumulate=2),
        dpo=dataclasses.replace(paper.dpo, train=dataclasses.replace(paper.dpo.train, accumulate=2)),
        mesh=MeshConfig(data=1, fsdp=16, tensor=4),
    )
