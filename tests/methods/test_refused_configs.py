"""Settings that GRPO, online DPO, CREAM and Temporal Self-Rewarding refuse before a run begins."""

import dataclasses
from typing import Any

import pytest

from jaxsi.methods import cream, grpo, online_dpo, temporal
from jaxsi.methods.seeded import PairConfig, SeedData
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.self_instruct import SelfInstruct
from jaxsi.training import losses
from jaxsi.training.optim import OptimConfig
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import DPOConfig, TrainConfig

RL = RLConfig(optim=OptimConfig(learning_rate=1e-3), steps=1, prompts_per_step=8, group_size=4, batch_size=16)
BASE: dict[str, Any] = {
    "grpo": grpo.Config(model="m", prompts=["a"], rl=RL),
    "online_dpo": online_dpo.Config(model="m", prompts=["a"], rl=RL),
    "cream": cream.Config(model="m", prompts=["a"]),
    "temporal": temporal.Config(model="m", prompts=["a"]),
}


def rl(**changes: Any) -> dict[str, Any]:
    return {"rl": dataclasses.replace(RL, **changes)}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("grpo", {"iterations": 0}, r"iterations is 0 \(at least 1\)"),
        ("grpo", rl(group_size=1, batch_size=8), r"rl.group_size 1 \(at least 2: a response is compared"),
        ("online_dpo", {"iterations": 0}, "iterations is 0; it is at least 1"),
        ("online_dpo", rl(group_size=1, batch_size=8), r"group_size is 1 \(at least 2: a pair\)"),
        ("online_dpo", rl(batch_size=2), r"batch_size 2 \(a multiple of group_size: whole pairs\)"),
        ("online_dpo", rl(kl_coef=0.0), r"kl_coef 0.0 \(positive: DPO's beta\)"),
        ("online_dpo", rl(clip=0.1), r"clip 0.1 \(leave it out"),
        ("cream", {"dpo": DPOConfig()}, "dpo.loss does not read the consistency of a pair; name losses.dpo_agreed"),
        ("cream", {"dpo": DPOConfig(loss=losses.dpo_smoothed(0.1))}, "name losses.dpo_agreed"),
        ("temporal", {"pairs": PairConfig(length_control=0.1)}, "length_control=0.1.*so set only cut_off"),
        ("temporal", {"pairs": PairConfig(min_gap=1.0, cut_off=True)}, "min_gap=1.0.*so set only cut_off"),
        *(
            (name, changes, message)
            for name in ("cream", "temporal")
            for changes, message in (
                ({"iterations": 0}, r"iterations is 0; it is at least 1 \(M_1 alone\)"),
                ({"sampling": SamplingConfig(num_samples=1)}, "a pair needs at least 2 candidates"),
                ({"sft": TrainConfig()}, "seed_data has neither ift nor rankings to train on"),
                ({"prompts": SelfInstruct(num_prompts=1)}, "seed_data has no ift for new prompts to imitate"),
                ({"prompts": ["a", " "]}, "prompts holds ' '; give a list of texts"),
            )
        ),
    ],
)
def test_config_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE[name], **changes)


def test_what_is_near_is_taken() -> None:
    dataclasses.replace(BASE["grpo"], **rl(batch_size=2, kl_coef=0.0, clip=0.1))
    dataclasses.replace(BASE["online_dpo"], **rl(batch_size=4))
    dataclasses.replace(BASE["temporal"], pairs=PairConfig(cut_off=True), iterations=1)
    data = SeedData(ift=list)
    dataclasses.replace(
        BASE["cream"], prompts=SelfInstruct(num_prompts=1), seed_data=data, sft=TrainConfig(), iterations=1
    )
