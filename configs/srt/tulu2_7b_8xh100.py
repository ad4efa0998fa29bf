"""The paper's run: Tulu 2 7B learns to criticise and refine from GPT-4 Turbo, then from itself.

    OPENAI_API_KEY=... jaxsi run configs/srt/tulu2_7b_8xh100.py

Hardware: 8 GPUs with 80 GB each (pip install "jaxsi[cuda12,endpoint]"). Mesh: fsdp 8. On each GPU 7B float32 weights
take 3.4 GB, gradients as much, and moments twice that. The tightest moment is sampling: the base model and M_self (6.7
GB), the bfloat16 weights, whole on each GPU (13.5), and the keys and values of 16 rows of 4,096 tokens (34.4). Together
that is 54.6 GB per GPU. The critic is asked at most 50,000 times. At the prices below we expect some 1,500 dollars; it
is not asked again once that could come to more than 2,500.

Expectation: this project has not run this size. The paper reports for its 7B, on AlpacaEval against text-davinci-003,
73.9 % wins before, 84.6 % after stage 1 and 85.3 % after stage 2, and an average over four benchmarks of 50.7, 54.4 and
53.4.

From the paper (arXiv 2406.07168): the model; the critic gpt-4-1106-preview at temperature 0 with 2,048 new tokens;
25,000 single-turn instructions of the Tulu 2 mixture for stage 1 and 75,000 others for stage 2; drafts at temperature
0.7, feedback and refinement at 0; SFT for 5 epochs, batch 32, cosine from 1e-5 after 10 % of warm-up, 8,192 tokens; DPO
for 1 epoch, beta 0.01, from 5e-7 with the same schedule.

Not stated there, and chosen here: which instructions (a random sample, of at most 4,000 characters so that draft,
feedback and refinement fit in the context); top-p 1; 1,024 tokens for a draft; AdamW without weight decay; stage 2's
batch (32) and length (8,192); bfloat16 computation; and a schedule that ends at 0. The prices are those for a million
tokens when the paper was written. Any server that speaks the protocol can be the critic: ``base_url`` and ``model``
below are its address and model. Pin the model's revision as NAME@REVISION.
"""

import random

from jaxsi.evals.held_out import HeldOutWinRate, refined_response
from jaxsi.methods.srt import Config
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.records import Prompt
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages import datasets
from jaxsi.stages.critique import CritiqueConfig
from jaxsi.stages.endpoint import EndpointCritic
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig


def single_turn_instructions() -> list[Prompt]:
    """100,000 different instructions from single-turn examples of the mixture, at random."""
    turns = [example.messages[0]["content"] for example in datasets.tulu2_mixture() if len(example.messages) == 1]
    texts = list(dict.fromkeys(turn for turn in turns if turn.strip() and len(turn) <= 4000))
    chosen = random.Random(0).sample(texts, 100_000)
    return [Prompt.of(f"tulu2-{number}", text) for number, text in enumerate(chosen)]


def train(learning_rate: float, epochs: int) -> TrainConfig:
    """What SFT and DPO have in common."""
    return TrainConfig(
        optim=OptimConfig(learning_rate=learning_rate, end_learning_rate=0.0, warmup_ratio=0.1),
        batch_size=32,
        accumulate=4,
        epochs=epochs,
        max_length=8192,
    )


def config() -> Config:
    return Config(
        model="allenai/tulu-2-7b",
        prompts=single_turn_instructions,
        critic_prompts=25_000,
        critic=EndpointCritic(
            base_url="https://api.openai.com/v1",
            model="gpt-4-1106-preview",
            cache="srt_gpt4_critiques.jsonl",
            temperature=0.0,
            max_new_tokens=2048,
            prompt_price=10.0,
            completion_price=30.0,
            max_cost=2500.0,
            max_total_tokens=150_000_000,
        ),
        sampling=SamplingConfig(num_samples=1, temperature=0.7, top_p=1.0, max_new_tokens=1024, batch_size=256),
        critique=CritiqueConfig(temperature=0.0, max_new_tokens=2048, batch_size=128),
        sft=train(learning_rate=1e-5, epochs=5),
        dpo=DPOConfig(train=train(learning_rate=5e-7, epochs=1), beta=0.01),
        mesh=MeshConfig(data=1, fsdp=8),
        evaluate=HeldOutWinRate(respond=refined_response),
    )
