"""The paper's run: Llama-2-70B, two rounds of self-rewarding DPO, on a TPU v5p-128 (64 chips).

    jaxsi run configs/self_rewarding/llama2_70b_v5p128.py --distributed --run-dir DIR_ON_A_SHARED_FILE_SYSTEM

Hardware: 64 TPU v5p chips (95 GB each) in one slice; start the command once on every host. Mesh: fsdp 16 x tensor 4. On
each chip 69B float32 weights take 4.3 GB, gradients as much, and moments twice that; bfloat16 weights to sample with
take 34.5 GB. The tightest moment is early stopping: M_0, M_{t-1} and two checkpoints (17.2 GB), the training state
(12.9), sampling weights, and the keys and values of 32 rows of 2,048 tokens (5.4). Together that is 70 GB per chip.
DPO, a step of which compiles to 32.2 GB for v5p:4x4x4, needs 45.

Expectation: this project has not run this size. The paper reports, on AlpacaEval 2.0, 9.94 % wins over GPT-4 Turbo for
M_1, 15.38 % for M_2 and 20.44 % for M_3.

From the paper (arXiv 2401.10020v3): IFT of 3,200 Open Assistant first turns; EFT from its ranked replies, without the
pairs that are in IFT; SFT at 5.5e-6 to 1.1e-6 (cosine), batch 16; new prompts by Llama-2-Chat-70B, 8 shots (6 + 2), T
0.6, p 0.9; N = 4 candidates at T 0.7, p 0.9; K = 3 judgments; DPO with beta 0.1 at 1e-6 to 1e-7, batch 16; every 200
steps 253 validation prompts decide whether to stop.

Not stated there, and chosen here: one epoch, no warm-up; lengths (4,096 tokens of context, 1,024 of a response, 512 of
a judgment); the judge's temperature (0.7, p 0.9, as in open re-implementations); the number of prompts (8,000; the
paper got 3,964 and 6,942 pairs); the filters' thresholds (Self-Instruct's).

Different from the paper: no dropout (the paper: 0.1). Claude 2 compared checkpoints there, with the AlpacaEval prompt;
here M_{t-1} does, in pairs and both orders, and a checkpoint has to lose on evidence (`early_stop.judging` takes
another judge, `early_stop.rule` the paper's rule). The 253 validation prompts, and the rankings that measure the judge
(the paper has 541 examples), are those of Open Assistant's validation split, however many it has. Pin the models'
revisions as NAME@REVISION.
"""

from jaxsi.evals.held_out import HeldOutWinRate
from jaxsi.methods.self_rewarding import Config, SeedData
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.records import Prompt, RankedResponses, SFTExample
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages import datasets
from jaxsi.stages.early_stop import EarlyStop
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.self_instruct import SelfInstruct
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig


def ift() -> list[SFTExample]:
    """3,200 first turns with the reply that people ranked best."""
    return datasets.first(datasets.oasst(), 3200)


def rankings() -> list[RankedResponses]:
    """All first turns with two or more ranked replies. EFT leaves out the replies that are in IFT."""
    return datasets.oasst_rankings()


def judge_test() -> list[RankedResponses]:
    """The ranked replies of the validation split, on which every M_t is measured as a judge."""
    return datasets.oasst_rankings(split="validation")


def validation_prompts() -> list[Prompt]:
    """Up to 253 first turns of the validation split, which may have fewer; the log says how many."""
    ranked = datasets.first(datasets.oasst_rankings(split="validation"), 253, least=100)
    return [Prompt(id=record.id, messages=record.messages) for record in ranked]


def config() -> Config:
    return Config(
        model="meta-llama/Llama-2-70b-hf",
        seed_data=SeedData(ift=ift, rankings=rankings, held_out=validation_prompts, judge_test=judge_test),
        prompts=SelfInstruct(
            num_prompts=8000,
            generator="meta-llama/Llama-2-70b-chat-hf",
            num_seed_shots=6,
            num_generated_shots=2,
            temperature=0.6,
            top_p=0.9,
            max_new_tokens=256,
            batch_size=512,
        ),
        sampling=SamplingConfig(num_samples=4, temperature=0.7, top_p=0.9, max_new_tokens=1024, batch_size=512),
        judge=JudgeConfig(num_samples=3, temperature=0.7, top_p=0.9, max_new_tokens=512, batch_size=512),
        sft=TrainConfig(
            optim=OptimConfig(learning_rate=5.5e-6, end_learning_rate=1.1e-6), batch_size=16, max_length=4096
        ),
        dpo=DPOConfig(
            train=TrainConfig(
                optim=OptimConfig(learning_rate=1e-6, end_learning_rate=1e-7),
                batch_size=16,
                max_length=4096,
                checkpoint_every=200,
            ),
            beta=0.1,
        ),
        early_stop=EarlyStop(prompts=validation_prompts, iterations=False),
        mesh=MeshConfig(data=1, fsdp=16, tensor=4),
        iterations=3,
        evaluate=HeldOutWinRate(prompts=validation_prompts),
    )
