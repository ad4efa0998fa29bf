"""Online DPO (Guo et al. 2024, arXiv 2402.04792, OAIF): pairs of the newest policy's samples, labelled at every step.

    for t = 1 .. T:                                                          the judge: M_{t-1}, frozen
        for step = 1 .. S:
            y^1, y^2  ~ pi(. | x)                                            pi begins as M_{t-1}
            y_w, y_l  the one that the judge prefers, and the other          left out if it prefers neither
            pi        <- descend  -log s(beta [ log pi(y_w|x) / M_0(y_w|x) - log pi(y_l|x) / M_0(y_l|x) ])
        M_t = pi

In the paper another, larger model is the annotator and T is 1. With the model itself as the judge this is
Self-Rewarding with fresh pairs at every step. beta is ``rl.kl_coef``; with ``rl.group_size`` above 2 the best and the
worst of a group are the pair.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxsi.lm import LM
from jaxsi.methods.lifecycle import begin, compared, iteration_of, keep, report
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_snapshot import may_move, stored_as
from jaxsi.runs.records import Judgment, Prompt
from jaxsi.runs.run import Run
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages import judge as judges
from jaxsi.stages.answers import with_room
from jaxsi.stages.early_stop import EarlyStop
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.judges import rewards_by
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.self_instruct import PromptFile, prompt_source, read_source
from jaxsi.text.chat_config import ChatConfig
from jaxsi.training import online_dpo as learner
from jaxsi.training.rl import RLConfig


@stored_as("methods.online_dpo.Config")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. Every iteration goes through all ``prompts`` again, ``rl.steps`` steps long.

    ``judging`` is the judge: the model itself (``judge.judge``), one of ``stages.judges``, or another function of their
    signature (the control arms are). ``rl`` samples at temperature 1; ``sampling`` is that of the responses which early
    stopping compares. ``evaluate(lm, config, scope)`` gives the figures of an iteration's summary.
    """

    model: str = dataclasses.field(metadata=may_move())
    prompts: PromptFile | Callable[[], list[Prompt]]
    sampling: SamplingConfig = SamplingConfig(num_samples=1)
    judge: JudgeConfig = JudgeConfig()
    rubric: AnyRubric = load_rubric()
    judging: Callable[..., list[Judgment]] = judges.judge
    rl: RLConfig
    early_stop: EarlyStop | None = None
    evaluate: Callable[..., dict[str, Any]] | None = None
    chat: ChatConfig = ChatConfig()
    mesh: MeshConfig = MeshConfig()
    iterations: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", prompt_source(self.prompts))
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; it is at least 1")
        learner.check_pairs(self.rl)


def online_dpo(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns M_T, or the best iteration's model after an early stop."""
    it = run.at("iter_0")
    base = keep(begin(cfg, run), it)  # M_0
    report(cfg, run, it, 0, base)
    prompts = with_room(base, it.records("prompts", read_source, cfg.prompts, of=Prompt), cfg.rl.max_new_tokens)  # x
    model, best = base, 0

    for t in range(1, cfg.iterations + 1):
        judge = model  # M_{t-1}
        reward = rewards_by(cfg.judging, judge, cfg.rubric, cfg.judge)  # r
        model = learner.online_dpo(judge, base, prompts, reward, cfg.rl, run.at(f"iter_{t}"))  # M_t
        best, lost, win_rate = compared(cfg, run, t, model, judge, best)
        report(cfg, run, run.at(f"iter_{t}"), t, model, win_rate=win_rate)
        if lost:
            break

    return iteration_of(model, run, best) if cfg.early_stop else model
