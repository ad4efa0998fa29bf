"""The embedded world: the shipped seed model plays against itself with 600 correct demonstrations.

    jaxsi run configs/spin/toy.py

Hardware: 2 CPU cores, 2 GB of memory, 1 minute. Expected: exact quality rises from about 73 to about 88.
"""

from jaxsi.methods.spin import Config
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.toyworld.evaluate import ToyQuality
from jaxsi.toyworld.seed import SHIPPED
from jaxsi.toyworld.seed_data import toy_demonstrations
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig


def config() -> Config:
    return Config(
        model=str(SHIPPED),
        demonstrations=toy_demonstrations,
        sampling=SamplingConfig(
            num_samples=1, temperature=1.0, top_p=1.0, max_new_tokens=16, batch_size=512, dtype="float32"
        ),
        dpo=DPOConfig(
            train=TrainConfig(
                optim=OptimConfig(learning_rate=1e-4, end_learning_rate=2e-5),
                batch_size=16,
                epochs=1,
                max_length=128,
                remat="none",
                dtype="float32",
            ),
            beta=0.1,
        ),
        evaluate=ToyQuality(),
        iterations=2,
    )
