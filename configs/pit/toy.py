"""The embedded world: an improver of a careless model's responses learns from preferences what better means.

    jaxsi run configs/pit/toy.py

Hardware: 2 CPU cores, 3 GB of memory, about 3 minutes. Expected: exact quality of the improved responses rises from
about 72 to about 86.

Ours, not the paper's: a fifth of round 1's references is from round 0 (``mix`` is 0.2; the method's default is 0).
"""

from jaxsi.methods.pit import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.toyworld.careless import SHIPPED
from jaxsi.toyworld.evaluate_improver import ImprovedEvaluation
from jaxsi.toyworld.pit_data import pit_preferences
from jaxsi.training.optim import OptimConfig
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig


def train(learning_rate: float, batch_size: int, epochs: int = 1) -> TrainConfig:
    """What SFT and reward training have in common on a CPU: float32, short rows, nothing recomputed."""
    return TrainConfig(
        optim=OptimConfig(learning_rate=learning_rate, end_learning_rate=learning_rate / 5),
        batch_size=batch_size,
        epochs=epochs,
        max_length=128,
        remat="none",
        dtype="float32",
    )


def rl(learning_rate: float, steps: int) -> RLConfig:
    """A step is 32 prompts of 4 responses."""
    return RLConfig(
        optim=OptimConfig(learning_rate=learning_rate, end_learning_rate=learning_rate / 5),
        steps=steps,
        prompts_per_step=32,
        group_size=4,
        batch_size=128,
        kl_coef=1.0,
        max_new_tokens=16,
        remat="none",
        dtype="float32",
    )


def config() -> Config:
    return Config(
        model=str(SHIPPED),
        preferences=pit_preferences,
        request="{prompt}",
        sft=train(learning_rate=1e-3, batch_size=16, epochs=3),
        reward=train(learning_rate=1e-3, batch_size=8, epochs=2),
        policy_rl=rl(learning_rate=1e-4, steps=12),
        rl=rl(learning_rate=3e-4, steps=20),
        rounds=(20, 20),
        mix=0.2,
        sampling=SamplingConfig(
            num_samples=1, temperature=1.0, top_p=1.0, max_new_tokens=16, batch_size=512, dtype="float32"
        ),
        evaluate=ImprovedEvaluation(),
        mesh=MeshConfig(data=-1, fsdp=1),
    )
