"""Qwen3-0.6B improves itself on your own prompts, on one GPU.

    jaxsi run configs/self_rewarding/qwen3_0p6b_1gpu.py --prompts prompts.jsonl

Hardware: one GPU with 24 GB or more (pip install "jaxsi[cuda12]"). The tightest moment is DPO: M_1 and M_2 as float32
(4.8 GB), the weights and moments in training (7.2), their gradients and a micro-batch's (4.8), and what 4 rows of 2,048
tokens keep (0.5). Together that is 17.2 GB.

Expectation: not measured on this model yet. The paper's gains are those of a 70B model, and small models gain less.

The given model is M_1, so neither SFT nor human data is needed. Half of the prompts make M_2, the other half M_3.

`--model FOLDER` takes any instruct model. A model that writes no verdicts can be judged by the expectation over the
score strings (`judge.expected`). This config does so too: with a model this small it leaves far fewer ties.
"""

from jaxsi.evals.held_out import HeldOutWinRate
from jaxsi.methods.self_rewarding import Config, PromptFile
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.judge import JudgeConfig
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig


def config() -> Config:
    return Config(
        model="Qwen/Qwen3-0.6B",
        seed_data=None,
        prompts=PromptFile(path="prompts.jsonl"),
        sampling=SamplingConfig(num_samples=4, temperature=0.7, top_p=0.9, max_new_tokens=1024, batch_size=32),
        judge=JudgeConfig(num_samples=3, temperature=0.7, top_p=0.9, max_new_tokens=256, expected=True, batch_size=32),
        sft=None,
        dpo=DPOConfig(
            train=TrainConfig(
                optim=OptimConfig(learning_rate=1e-6, end_learning_rate=1e-7, warmup_ratio=0.1),
                batch_size=16,
                accumulate=8,
                max_length=2048,
                checkpoint_every=50,
            ),
            beta=0.1,
            nll_coef=0.1,
        ),
        iterations=3,
        evaluate=HeldOutWinRate(),
    )
