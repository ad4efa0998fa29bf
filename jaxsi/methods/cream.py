"""CREAM, consistency-regularised self-rewarding (Wang et al. 2024, arXiv 2410.12735): labels on which the models of two
iterations disagree count less.

    M_1 = SFT(M_0, IFT), or the model as given
    for t = 2 .. T:
        x_i        new prompts
        y_i^n      ~ M_{t-1}(. | x_i)                                        n = 1 .. N
        r_i^n      log M_{t-1}(y_i^n | x_i) - log M_0(y_i^n | x_i)           the reward that DPO implies
        s_i^n      the same of M_{t-2}                                       M_0 itself: its mean log-probability
        w, l       argmax and argmin over n of r_i^n                         left out if equal
        C          mean over i of (tau(r_i, s_i) + 1) / 2                    tau: Kendall's
        M_t        = argmin  sum_i  C l(w, l) + (1 - C) l(l, w)              from M_{t-1}, l: DPO's loss

No prompt asks the model to judge, unless ``consistency.rewarding`` says so. If the model is given as M_1, there is no
earlier model than M_1 at t = 2: the reward is the mean log-probability, and C is 1. The paper's M_1 is an SFT model on
IFT alone; with rankings in ``seed_data``, EFT is added as in Self-Rewarding. Its official code computes C from ranks as
here, but gives it to wrong prompts after one that it skips; here it is joined by id.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxsi.lm import LM
from jaxsi.methods.lifecycle import begin, carried_over, compared, is_better_by, iteration_of
from jaxsi.methods.seeded import PairConfig, SeedData, check_seeded, first_model, next_prompts, paired, summarise
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_snapshot import may_move, stored_as
from jaxsi.runs.records import Judgment, PreferencePair, Prompt, Response
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig, sample
from jaxsi.stages.answers import Answers, answers
from jaxsi.stages.consistency import consistencies, implicit_rewards, with_agreement
from jaxsi.stages.early_stop import EarlyStop
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.self_instruct import PromptFile, PromptList, SelfInstruct, prompt_source
from jaxsi.text.chat_config import ChatConfig
from jaxsi.training import losses
from jaxsi.training.train import DPOConfig, TrainConfig, dpo


@stored_as("methods.cream.Consistency")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistency:
    """``per_prompt``: each prompt has its own C, in place of the mean of all. ``rewarding(items, lm, reference, rubric,
    judge, key)`` gives the rewards: the paper's ``consistency.implicit_rewards``, ``consistency.judge_rewards``, or a
    control arm's."""

    per_prompt: bool = False
    rewarding: Callable[..., list[Judgment]] = implicit_rewards


@stored_as("methods.cream.Config")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. ``seed_data``, ``sft``, ``prompts`` and ``pairs`` are as in Self-Rewarding.
    ``rubric`` and ``judge`` measure the model as a judge, and judge for early stopping and ``judge_rewards``.

    ``evaluate(lm, config, scope)`` gives the figures of an iteration's summary.
    """

    model: str = dataclasses.field(metadata=may_move())
    seed_data: SeedData | None = None
    prompts: SelfInstruct | PromptFile | PromptList = dataclasses.field(
        metadata=may_move("generator", identity="iter_0/generator.json", made="iter_*/prompts.jsonl")
    )
    sampling: SamplingConfig = SamplingConfig(num_samples=5, temperature=0.8, top_p=0.95)
    consistency: Consistency = Consistency()
    judge: JudgeConfig = JudgeConfig()
    rubric: AnyRubric = load_rubric()
    pairs: PairConfig = PairConfig()
    sft: TrainConfig | None = None
    dpo: DPOConfig = DPOConfig(loss=losses.dpo_agreed)
    early_stop: EarlyStop | None = None
    evaluate: Callable[..., dict[str, Any]] | None = None
    chat: ChatConfig = ChatConfig()
    mesh: MeshConfig = MeshConfig()
    iterations: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", prompt_source(self.prompts))
        check_seeded(self)
        if self.dpo.loss is not losses.dpo_agreed:
            raise ValueError("dpo.loss does not read the consistency of a pair; name losses.dpo_agreed")


def cream(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns M_T, or the best iteration's model after an early stop."""
    base = begin(cfg, run)  # M_0
    model, earlier, best = first_model(cfg, base, run), base, 1  # M_1, M_0

    for t in range(2, cfg.iterations + 1):
        it = run.at(f"iter_{t}")
        prompts, _ = it.counted("prompts", next_prompts, cfg, base, run, t, of=Prompt)  # x
        candidates = it.sharded(
            "candidates", prompts, sample, model, cfg.sampling, it.key("candidates"), of=Response, by=model
        )  # y
        answered = answers(prompts, candidates)
        rewards = rewarded(cfg, it, "rewards", answered, model, base)  # r
        before = rewarded(cfg, it, "rewards_before", answered, earlier, base)  # s
        pairs, counts = it.counted(
            "pairs", agreed_pairs, cfg, candidates, rewards, before, prompts, of=PreferencePair
        )  # w, l, C
        judge, better = model, is_better_by(cfg, model, it)
        earlier, model = model, dpo(
            model, pairs, cfg.dpo, it, better=better, **carried_over(cfg.dpo, model, run, t, first=1)
        )  # M_t  # fmt: skip
        best, lost, win_rate = compared(cfg, run, t, model, judge, best)
        summarise(cfg, run, it, t, model, counts | {"win_rate": win_rate}, consistency=counts["consistency"])
        if lost:
            break

    return iteration_of(model, run, best) if cfg.early_stop else model


def rewarded(cfg: Config, it: Scope, name: str, answered: Sequence[Answers], model: LM, base: LM) -> list[Judgment]:
    """The rewards of a model; M_0 is the reference of the others, and has none itself."""
    reference = None if model.fingerprint == base.fingerprint else base
    return it.sharded(
        name, answered, cfg.consistency.rewarding, model, reference, cfg.rubric, cfg.judge, it.key("judge"),
        of=Judgment,
    )  # fmt: skip


def agreed_pairs(
    cfg: Config,
    candidates: list[Response],
    rewards: list[Judgment],
    before: list[Judgment],
    prompts: list[Prompt],
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """The best and the worst of each prompt by M_{t-1}'s rewards, with C; and the counts. An error if hardly a response
    has a reward."""
    pairs, counts = paired(cfg, cfg.pairs, candidates, rewards, prompts)
    pairs, agreement = with_agreement(pairs, consistencies(rewards, before), per_prompt=cfg.consistency.per_prompt)
    return pairs, counts | agreement
