"""The micro world: the toy config of Meta-Rewarding, small enough to be killed and run again many times.

The given model is M_1, so no program of SFT is compiled. Two rounds of DPO: the first has pairs of judgments, the
second has none. All stages sample up to 32 responses at a time, most of up to 16 tokens."""

import dataclasses
from pathlib import Path

from jaxsi.methods.meta_rewarding import Config, MetaPairs, PromptList
from jaxsi.methods.seeded import PairConfig, SeedData
from jaxsi.runs.config_file import load_config
from jaxsi.toyworld import annotators
from jaxsi.toyworld.evaluate import ToyQuality
from jaxsi.toyworld.seed_data import permuted_scores, tossed


def judge_test():
    return annotators.rankings(4, 4, held_out=True)


def config() -> Config:
    toy = load_config(Path(__file__).parents[2] / "configs" / "meta_rewarding" / "toy.py")
    train = dataclasses.replace(toy.dpo.train, batch_size=16, epochs=2, checkpoint_every=2, log_every=1)
    meta = dataclasses.replace(toy.pairs.meta, judge_iterations=1, max_characters=(200, 100))
    return dataclasses.replace(
        toy,
        seed_data=SeedData(judge_test=judge_test),
        prompts=PromptList(tuple(example.messages[-1]["content"] for example in annotators.careful(48, 5))),
        sampling=dataclasses.replace(toy.sampling, batch_size=32),
        judge=dataclasses.replace(toy.judge, num_samples=4, batch_size=32),
        pairs=MetaPairs(actor=PairConfig(length_control=0.2), meta=meta),
        sft=None,
        dpo=dataclasses.replace(toy.dpo, train=train),
        evaluate=ToyQuality(num_prompts=8),
        iterations=3,
    )


def control() -> Config:
    cfg = config()
    meta = dataclasses.replace(cfg.pairs.meta, judging=tossed)
    return dataclasses.replace(cfg, judging=permuted_scores, pairs=dataclasses.replace(cfg.pairs, meta=meta))
