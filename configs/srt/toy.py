"""The embedded world: a careless model learns to criticise and refine from the exact critic, then from itself.

    jaxsi run configs/srt/toy.py

Hardware: 2 CPU cores, 3 GB of memory, about 2 minutes. Expected: exact quality of the refined responses rises from
about 82 to about 92.
"""

from jaxsi.methods.srt import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.critique import CritiqueConfig
from jaxsi.toyworld.careless import SHIPPED
from jaxsi.toyworld.critic import TEMPLATE, exact_critic
from jaxsi.toyworld.evaluate_refinement import RefinedEvaluation
from jaxsi.toyworld.srt_data import srt_prompts
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig


def train(learning_rate: float, batch_size: int, eps: float = 1e-8) -> TrainConfig:
    """What SFT and DPO have in common on a CPU: float32, short rows, nothing recomputed."""
    return TrainConfig(
        optim=OptimConfig(learning_rate=learning_rate, end_learning_rate=learning_rate / 5, eps=eps),
        batch_size=batch_size,
        max_length=128,
        remat="none",
        dtype="float32",
    )


def config() -> Config:
    return Config(
        model=str(SHIPPED),
        prompts=srt_prompts,
        critic_prompts=8192,
        critic=exact_critic,
        template=TEMPLATE,
        sampling=SamplingConfig(
            num_samples=1, temperature=1.0, top_p=1.0, max_new_tokens=24, batch_size=512, dtype="float32"
        ),
        critique=CritiqueConfig(max_new_tokens=64, batch_size=512),
        sft=train(learning_rate=1e-3, batch_size=8),
        # A model of a million weights soon loses what it learnt in stage 1. So Adam's eps is large, to leave alone the
        # weights that do not matter for the preference, and beta is large, so that DPO stops early.
        dpo=DPOConfig(train=train(learning_rate=5e-4, batch_size=16, eps=0.1), beta=1.0),
        evaluate=RefinedEvaluation(),
        mesh=MeshConfig(data=-1, fsdp=1),
    )
