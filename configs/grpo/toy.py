"""The embedded world: the seed model improves by GRPO, and judges its samples itself.

    jaxsi run configs/grpo/toy.py

Hardware: 2 CPU cores, 3 GB of memory, about three minutes. Expected: exact quality rises from about 73 to about 90.
toy_permuted.py and toy_exact.py differ from this file only by their judge.

Not the paper's: the learning rate and the KL coefficient, for a model of a million parameters; the reward is the
model's own judgment.
"""

from jaxsi.methods.grpo import Config
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.judge import JudgeConfig
from jaxsi.toyworld.corpus import RUBRIC
from jaxsi.toyworld.evaluate import ToyEvaluation
from jaxsi.toyworld.seed import SHIPPED
from jaxsi.toyworld.seed_data import toy_prompts
from jaxsi.training.optim import OptimConfig
from jaxsi.training.rl import RLConfig


def config() -> Config:
    return Config(
        model=str(SHIPPED),
        prompts=toy_prompts,
        sampling=SamplingConfig(
            num_samples=1, temperature=1.0, top_p=1.0, max_new_tokens=16, batch_size=512, dtype="float32"
        ),
        judge=JudgeConfig(num_samples=3, temperature=0.7, top_p=0.9, max_new_tokens=32, batch_size=512),
        rubric=RUBRIC,
        rl=RLConfig(
            optim=OptimConfig(learning_rate=3e-4, end_learning_rate=3e-4 / 5),
            steps=20,
            prompts_per_step=32,
            group_size=4,
            batch_size=128,
            kl_coef=0.04,
            max_new_tokens=16,
            remat="none",
            dtype="float32",
        ),
        evaluate=ToyEvaluation(),
        iterations=2,
    )
