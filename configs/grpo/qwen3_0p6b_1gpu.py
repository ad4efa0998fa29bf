"""Qwen3-0.6B improves by GRPO on your own prompts, on one GPU; it judges its samples itself.

    jaxsi run configs/grpo/qwen3_0p6b_1gpu.py --prompts prompts.jsonl

Hardware: one GPU with 24 GB or more (pip install "jaxsi[cuda12]"). The tightest moment is sampling: M_{t-1}, which is
judge and reference, and the policy (4.8 GB), the weights and moments in training (7.2), bfloat16 weights (1.2), and the
keys and values of 32 rows of 2,048 tokens (7.5). Together that is 20.7 GB.

Expectation: not measured on this model yet.

From the paper (arXiv 2402.03300): the KL coefficient of 0.04 and the learning rate of 1e-6. Chosen here: 8 responses
to each of 16 prompts (there 64 to each of 16), in four updates; 100 steps in each of two iterations. `--judging` takes
another judge: known answers (`verifier:answers.jsonl`), a reward model (`reward:MODEL`), an endpoint.
"""

from jaxsi.evals.held_out import HeldOutWinRate
from jaxsi.methods.grpo import Config
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.self_instruct import PromptFile
from jaxsi.training.optim import OptimConfig
from jaxsi.training.rl import RLConfig


def config() -> Config:
    return Config(
        model="Qwen/Qwen3-0.6B",
        prompts=PromptFile(path="prompts.jsonl"),
        sampling=SamplingConfig(num_samples=1, temperature=0.7, top_p=0.9, max_new_tokens=1024, batch_size=32),
        judge=JudgeConfig(num_samples=1, temperature=0.7, top_p=0.9, max_new_tokens=256, expected=True, batch_size=32),
        rl=RLConfig(
            optim=OptimConfig(learning_rate=1e-6),
            steps=100,
            prompts_per_step=16,
            group_size=8,
            batch_size=32,
            accumulate=8,
            kl_coef=0.04,
            max_new_tokens=1024,
        ),
        iterations=2,
        evaluate=HeldOutWinRate(),
    )
