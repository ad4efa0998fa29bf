"""jaxsi: language models that improve themselves, in JAX.

The public interface is imported when it is first used, so that ``import jaxsi`` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that has it, and its name there if that is another.
_HOMES = {
    # a model, and what it does
    "load": "jaxsi.lm",
    "generate": "jaxsi.sampling.generate",
    "score": "jaxsi.sampling.scoring",
    "judge": "jaxsi.stages.judge",
    "improve": "jaxsi.stages.improve.rounds",
    "sft": "jaxsi.methods.single",
    "dpo": "jaxsi.methods.single",
    "reward": "jaxsi.methods.single",
    "rl": "jaxsi.methods.single",
    "Prompt": "jaxsi.runs.records",
    # the methods, and plain functions as judges, rewards and critics
    "run": "jaxsi.methods.start",
    "self_rewarding": "jaxsi.methods.self_rewarding",
    "srt": "jaxsi.methods.srt",
    "seft": "jaxsi.methods.seft",
    "pit": "jaxsi.methods.pit",
    "spin": "jaxsi.methods.spin",
    "grpo": "jaxsi.methods.grpo",
    "online_dpo": "jaxsi.methods.online_dpo",
    "cream": "jaxsi.methods.cream",
    "temporal": "jaxsi.methods.temporal",
    "meta_rewarding": "jaxsi.methods.meta_rewarding",
    "judge_by": "jaxsi.stages.judge",
    "reward_by": "jaxsi.stages.gap",
    "critique_by": "jaxsi.stages.critique",
    # their settings
    "SelfRewardingConfig": "jaxsi.methods.self_rewarding:Config",
    "SRTConfig": "jaxsi.methods.srt:Config",
    "SEFTConfig": "jaxsi.methods.seft:Config",
    "PITConfig": "jaxsi.methods.pit:Config",
    "SPINConfig": "jaxsi.methods.spin:Config",
    "GRPOConfig": "jaxsi.methods.grpo:Config",
    "OnlineDPOConfig": "jaxsi.methods.online_dpo:Config",
    "CREAMConfig": "jaxsi.methods.cream:Config",
    "TemporalConfig": "jaxsi.methods.temporal:Config",
    "MetaRewardingConfig": "jaxsi.methods.meta_rewarding:Config",
    "SamplingConfig": "jaxsi.sampling.generate",
    "ChatConfig": "jaxsi.text.chat_config",
    "JudgeConfig": "jaxsi.stages.judge",
    "TrainConfig": "jaxsi.training.train",
    "DPOConfig": "jaxsi.training.train",
    "RLConfig": "jaxsi.training.rl",
    "OptimConfig": "jaxsi.training.optim",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, there = _HOMES[name].partition(":")
        return getattr(importlib.import_module(module), there or name)
    raise AttributeError(f"module 'jaxsi' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
