"""Qwen3-0.6B improves itself by CREAM on your own prompts, on one GPU. No judge is asked.

    jaxsi run configs/cream/qwen3_0p6b_1gpu.py --prompts prompts.jsonl

Hardware: one GPU with 24 GB or more (pip install "jaxsi[cuda12]"). The tightest moment is DPO: M_1, M_{t-1} and M_{t-2}
as float32 (7.2 GB), the weights and moments in training (7.2), their gradients and a micro-batch's (4.8), and what 4
rows of 2,048 tokens keep (0.5). Together that is 19.7 GB.

Expectation: not measured on this model yet. The paper's models have 7B parameters.

From the paper (arXiv 2410.12735): 5 responses at temperature 0.8, top-p 0.95, 768 tokens; DPO for one epoch with beta
0.1 at 1e-6 (cosine), 10 % warm-up, 2,048 tokens. Not from it: the given model is M_1, so the first rewards are mean
log-probabilities, on which nothing disagrees (C = 1). With `seed_data` and `sft`, as in the 70B config of
Self-Rewarding, M_0 is an earlier model from the start.
"""

from jaxsi.evals.held_out import HeldOutWinRate
from jaxsi.methods.cream import Config
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.self_instruct import PromptFile
from jaxsi.training import losses
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig


def config() -> Config:
    return Config(
        model="Qwen/Qwen3-0.6B",
        prompts=PromptFile(path="prompts.jsonl"),
        sampling=SamplingConfig(num_samples=5, temperature=0.8, top_p=0.95, max_new_tokens=768, batch_size=32),
        dpo=DPOConfig(
            train=TrainConfig(
                optim=OptimConfig(learning_rate=1e-6, end_learning_rate=0.0, warmup_ratio=0.1),
                batch_size=16,
                accumulate=8,
                max_length=2048,
            ),
            loss=losses.dpo_agreed,
            beta=0.1,
        ),
        iterations=3,
        evaluate=HeldOutWinRate(),
    )
