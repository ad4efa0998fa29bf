"""The embedded world: a small model's policy evolves on what its own adaptive reviser makes of unlabelled prompts.

    jaxsi run configs/seft/toy.py

Hardware: 2 CPU cores, 3 GB of memory, about 2 minutes. Expected: exact quality of the policy's responses rises from
about 64 to about 81.
"""

from jaxsi.methods.seft import Config, ReviserConfig, Round, Stopping
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.reviser import ReviseConfig, best_of_n, revise
from jaxsi.stages.reviser_data import LabelConfig
from jaxsi.toyworld.careless import SHIPPED
from jaxsi.toyworld.evaluate_reviser import PolicyEvaluation, ReviserEvaluation
from jaxsi.toyworld.reviser import TEMPLATE, ranked_responses, stopping_prompts, unlabelled_prompts
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import TrainConfig


def train(learning_rate: float, batch_size: int, epochs: int = 1) -> TrainConfig:
    """What all training has in common on a CPU: float32, short rows, nothing recomputed."""
    return TrainConfig(
        optim=OptimConfig(learning_rate=learning_rate, end_learning_rate=learning_rate / 10),
        batch_size=batch_size,
        epochs=epochs,
        max_length=128,
        checkpoint_every=10_000,
        remat="none",
        dtype="float32",
    )


def config() -> Config:
    return Config(
        model=str(SHIPPED),
        reviser=ReviserConfig(
            rankings=ranked_responses,
            template=TEMPLATE,
            warm_up=train(learning_rate=2e-3, batch_size=32),
            labels=LabelConfig(batch_size=256),
            adaptive=train(learning_rate=2e-3, batch_size=32),
            writing=ReviseConfig(temperature=1.0, top_p=1.0, max_new_tokens=16, batch_size=128),
            evaluate=ReviserEvaluation(),
        ),
        prompts=unlabelled_prompts,
        stop=Stopping(held_out=stopping_prompts),
        sampling=SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=16, batch_size=512, dtype="float32"),
        internal=Round(target=best_of_n, num_samples=4),
        external=Round(target=revise),
        sft=train(learning_rate=5e-4, batch_size=96, epochs=2),
        evaluate=PolicyEvaluation(),
        iterations=3,
    )
