"""A base model of 8B and its improver learn from HH-RLHF what a better response is, on 8 GPUs.

    XLA_CLIENT_MEM_FRACTION=0.9 jaxsi run configs/pit/llama3_8b_hh_8xh100.py

Hardware: 8 GPUs with 80 GB each (pip install "jaxsi[cuda12]"). Mesh: fsdp 8. On each GPU 8B float32 weights take 4.0
GB, gradients as much, and moments twice that. The tightest moment is sampling in round 1: four models (16.1 GB: the
policy after RL, the gap reward model, the SFT improver and round 0's), the weights and moments in training (12.0),
bfloat16 weights to sample with, whole on each GPU (16.1), and the keys and values of 64 rows of at most 2,560 tokens
(21.5). Together that is 65.7 GB per GPU, more than the three quarters of the memory that JAX takes by default (`jaxsi
plan configs/pit/llama3_8b_hh_8xh100.py --topology h100:8`).

Expectation: unknown, because this project has not run this size. The paper trained PaLM 2 (Bison). Reports of it say
that improved responses were preferred to the originals by 7.2 to 33.59 points over all its data sets and judges, and
that without one of the two rounds there was hardly any gain (0.0 and 1.7 against 13.0 points).

From what could be read of the paper (arXiv 2310.00898): HH-RLHF as data; its preferences in three equal parts; round 0
from both responses of a preference; round 1 from samples of the policy after RL; the KL to the SFT model; temperatures
of 0.4 to 0.6 to improve with, best 0.4 (`jaxsi improve pit ... --temperature 0.4`).

Its hyper-parameters could not be read, so all others are chosen here: the model; pairs of at most 4,000 characters with
the longer response; SFT at 1e-5, reward models at 5e-6, one epoch each (cosine, 3 % warm-up), batch 128; RLOO with 4
responses to each of 128 prompts, 400 steps for the policy and for each round, at 1e-6 with a KL coefficient of 0.05;
references at temperature 1. Pin the model's revision as NAME@REVISION.
"""

from jaxsi.evals.held_out import HeldOutWinRate, improved_response
from jaxsi.methods.pit import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.records import RankedResponses
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages import datasets
from jaxsi.training.optim import OptimConfig
from jaxsi.training.rl import RLConfig, rloo
from jaxsi.training.train import TrainConfig


def short_pairs() -> list[RankedResponses]:
    """Pairs that mostly fit in 2,048 tokens with one response as reference; training drops and counts the others."""

    def characters(ranked: RankedResponses) -> int:
        return sum(len(message["content"]) for message in ranked.messages) + max(map(len, ranked.responses))

    return [ranked for ranked in datasets.hh_rlhf() if characters(ranked) <= 4000]


def train(learning_rate: float) -> TrainConfig:
    """What SFT and reward training have in common: some 400 steps on a third of the pairs."""
    return TrainConfig(
        optim=OptimConfig(learning_rate=learning_rate, end_learning_rate=learning_rate / 10, warmup_ratio=0.03),
        batch_size=128,
        accumulate=8,
        max_length=2048,
    )


def rl(steps: int) -> RLConfig:
    """A step is 128 prompts of 4 responses, and one update."""
    return RLConfig(
        optim=OptimConfig(learning_rate=1e-6, end_learning_rate=1e-7, warmup_ratio=0.03),
        steps=steps,
        prompts_per_step=128,
        group_size=4,
        batch_size=512,
        accumulate=32,
        kl_coef=0.05,
        max_new_tokens=512,
    )


def config() -> Config:
    return Config(
        model="meta-llama/Llama-3.1-8B",
        preferences=short_pairs,
        sft=train(learning_rate=1e-5),
        reward=train(learning_rate=5e-6),
        policy_rl=rl(steps=400),
        rl=rl(steps=400),
        rounds=(400, 400),
        learner=rloo,
        sampling=SamplingConfig(num_samples=1, temperature=1.0, top_p=1.0, max_new_tokens=512, batch_size=256),
        mesh=MeshConfig(data=1, fsdp=8),
        evaluate=HeldOutWinRate(respond=improved_response),
    )
