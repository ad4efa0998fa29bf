"""Qwen3-0.6B acts, judges, and judges its judgments, on your own prompts, on one GPU.

    jaxsi run configs/meta_rewarding/qwen3_0p6b_1gpu.py --prompts prompts.jsonl

Hardware: one GPU with 24 GB or more (pip install "jaxsi[cuda12]"). The tightest moment is DPO: M_1 and M_2 as float32
(4.8 GB), the weights and moments in training (7.2), their gradients and a micro-batch's (4.8), and what 4 rows of 2,560
tokens keep (0.8). Together that is 17.5 GB. Most of the time goes to the 110 comparisons of each prompt's judgments: by
`jaxsi plan`, 1,000 prompts take at least eight hours on an RTX 4090 if all texts are as long as they may be.

Expectation: not measured on this model yet. The paper's gains are those of an 8B instruct model, and a model this small
is a poor meta-judge: look at position_bias and prefers_higher in summary.json.

The given model is M_1, so neither SFT nor human data is needed. A quarter of the prompts makes each of M_2 to M_5.

From the paper: K = 7 answers at temperature 0.8 and top-p 0.95; N = 11 judgments; length control with rho 0.32 (there
it changes between iterations); chosen judgments of at most 1,100, then 1,000 characters; four rounds of DPO, the first
two with judge's pairs; beta 0.1. Chosen here: judge and meta-judge give expected scores and verdicts (`expected`),
since a model this small leaves many ties; lengths; and the optimizer, that of Self-Rewarding's config for this GPU.
"""

import dataclasses
from pathlib import Path

from jaxsi.evals.held_out import HeldOutWinRate
from jaxsi.methods.meta_rewarding import Config, MetaPairs
from jaxsi.methods.seeded import PairConfig
from jaxsi.runs.config_file import load_config
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.meta_judge import MetaJudgeConfig


def config() -> Config:
    base = load_config(Path(__file__).parents[1] / "self_rewarding" / "qwen3_0p6b_1gpu.py")
    return Config(
        model=base.model,
        seed_data=None,
        prompts=base.prompts,
        sampling=SamplingConfig(num_samples=7, temperature=0.8, top_p=0.95, max_new_tokens=1024, batch_size=32),
        judge=JudgeConfig(num_samples=11, temperature=0.7, top_p=0.9, max_new_tokens=256, expected=True, batch_size=32),
        pairs=MetaPairs(
            actor=PairConfig(length_control=0.32),
            meta=MetaJudgeConfig(
                judge=JudgeConfig(
                    num_samples=1, temperature=0.7, top_p=0.9, max_new_tokens=256, expected=True, batch_size=16
                ),
                max_characters=(1100, 1000),
            ),
        ),
        sft=None,
        dpo=dataclasses.replace(base.dpo, train=dataclasses.replace(base.dpo.train, max_length=2560)),
        iterations=5,
        evaluate=HeldOutWinRate(),
    )
