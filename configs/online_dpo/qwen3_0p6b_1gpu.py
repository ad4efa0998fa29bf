"""Qwen3-0.6B improves by online DPO on your own prompts, on one GPU; it judges its samples itself.

    jaxsi run configs/online_dpo/qwen3_0p6b_1gpu.py --prompts prompts.jsonl

Hardware: one GPU with 24 GB or more (pip install "jaxsi[cuda12]"). The tightest moment is sampling: M_0 and the
policy (4.8 GB), the weights and moments in training (7.2), bfloat16 weights (1.2), and the keys and values of 32 rows
of 2,048 tokens (7.5). Together that is 20.7 GB.

Expectation: not measured on this model yet.

From the paper (arXiv 2402.04792): two responses to a prompt, beta 0.1, learning rate 5e-7. Chosen here: 32 prompts a
step (there 128) in two updates, 200 steps in one iteration. `--judging` takes
another judge: known answers (`verifier:answers.jsonl`), a reward model (`reward:MODEL`), an endpoint.
"""

from jaxsi.evals.held_out import HeldOutWinRate
from jaxsi.methods.online_dpo import Config
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
            optim=OptimConfig(learning_rate=5e-7),
            steps=200,
            prompts_per_step=32,
            group_size=2,
            batch_size=32,
            accumulate=8,
            kl_coef=0.1,
            max_new_tokens=1024,
        ),
        iterations=1,
        evaluate=HeldOutWinRate(),
    )
