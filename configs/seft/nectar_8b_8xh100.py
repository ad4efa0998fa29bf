"""An instruct model of 8B evolves on UltraFeedback's prompts, with a reviser that learnt from Nectar's rankings.

    jaxsi run configs/seft/nectar_8b_8xh100.py

Hardware: 8 GPUs with 80 GB each (pip install "jaxsi[cuda12]"). Mesh: fsdp 8. On each GPU 8B float32 weights take 4.0
GB, gradients as much, and moments twice that; bfloat16 weights to sample with are whole on each, 16.1 GB. The tightest
moment is the reviser's reading of held-out responses: base model, reviser and policy (12.0 GB), the sampling weights of
the last two (32.1), and the keys and values of 32 rows of 3,072 tokens (12.9). Together that is 57.1 GB per GPU.

Expectation: unknown. This project has not run this size, and could not read the paper's text and numbers.

Summaries of the paper name the data sets. Everything else is chosen here: the model; the first 10,000 rows of Nectar,
whose seven ranked responses make six pairs each; a reviser at 2e-5 (cosine, 3 % warm-up), 3 epochs, lengths up to
2,048; a policy at 1e-5, one epoch for each round of 15,000 prompts, one internal and three external rounds; drafts at
temperature 1; 500 held-out prompts that decide when to stop. Pin the models' revisions as NAME@REVISION.
"""

from jaxsi.evals.held_out import HeldOutWinRate
from jaxsi.methods.seft import Config, ReviserConfig, Round, Stopping
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.records import Prompt, RankedResponses
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages import datasets
from jaxsi.stages.reviser import ReviseConfig, best_of_n, revise
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import TrainConfig


def rankings() -> list[RankedResponses]:
    """Ten thousand prompts with seven ranked responses each."""
    return datasets.first(datasets.nectar(), 10_000)


def ultrafeedback_prompts() -> list[Prompt]:
    """The instructions without their responses; each text once."""
    by_text = {ranked.messages[-1]["content"]: ranked for ranked in datasets.ultrafeedback()}
    return [Prompt(id=ranked.id, messages=ranked.messages) for ranked in by_text.values()]


def unlabelled_prompts() -> list[Prompt]:
    """What the policy evolves on: 15,000 prompts for each of four rounds, or a few less if the set has fewer texts."""
    return datasets.first(ultrafeedback_prompts()[500:], 60_000, least=56_000)


def stopping_prompts() -> list[Prompt]:
    """500 other prompts."""
    return datasets.first(ultrafeedback_prompts(), 500)


def train(learning_rate: float, batch_size: int, epochs: int) -> TrainConfig:
    """What all training has in common."""
    return TrainConfig(
        optim=OptimConfig(learning_rate=learning_rate, end_learning_rate=learning_rate / 10, warmup_ratio=0.03),
        batch_size=batch_size,
        accumulate=4,
        epochs=epochs,
        max_length=2048,
    )


def config() -> Config:
    return Config(
        model="meta-llama/Llama-3.1-8B-Instruct",
        reviser=ReviserConfig(
            rankings=rankings,
            warm_up=train(learning_rate=2e-5, batch_size=128, epochs=3),
            adaptive=train(learning_rate=2e-5, batch_size=128, epochs=3),
            writing=ReviseConfig(temperature=1.0, top_p=1.0, max_new_tokens=1024, batch_size=256),
        ),
        prompts=unlabelled_prompts,
        stop=Stopping(held_out=stopping_prompts),
        sampling=SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=1024, batch_size=256),
        internal=Round(target=best_of_n, num_samples=4),
        external=Round(target=revise),
        sft=train(learning_rate=1e-5, batch_size=128, epochs=1),
        mesh=MeshConfig(data=1, fsdp=8),
        iterations=4,
        evaluate=HeldOutWinRate(),
    )
