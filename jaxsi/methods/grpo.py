"""GRPO (Shao et al. 2024, arXiv 2402.03300) with a judge's scores as the reward: the group takes the place of a value
model.

    for t = 1 .. T:                                                          judge and reference: M_{t-1}, frozen
        for step = 1 .. S:
            y^g    ~ pi(. | x)                                               g = 1 .. G, pi begins as M_{t-1}
            r^g    score of the judge on (x, y^g)
            A^g    = (r^g - mean r) / std r                                  0 if all r of x are equal
            pi     <- descend  mean_g mean_token [ -min(ratio A, clip(ratio) A) + kl_coef KL(pi || M_{t-1}) ]
        M_t = pi

The paper rewards by a trained reward model and rules; a verifier (``judges.Verifier``), a reward model
(``judges.RewardJudge``) or another judge can take the model's place here. Judging one's own samples in RL collapses if
the judge moves with them: so it stays M_{t-1} for a whole iteration, as in Self-Rewarding.
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
from jaxsi.training import grpo as learner
from jaxsi.training.rl import RLConfig


@stored_as("methods.grpo.Config")
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
        if self.iterations < 1 or self.rl.group_size < 2:
            raise ValueError(
                f"iterations is {self.iterations} (at least 1) and rl.group_size {self.rl.group_size} (at least 2: a "
                "response is compared with the others of its group)"
            )


def grpo(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns M_T, or the best iteration's model after an early stop."""
    it = run.at("iter_0")
    model, best = keep(begin(cfg, run), it), 0  # M_0
    report(cfg, run, it, 0, model)
    prompts = with_room(model, it.records("prompts", read_source, cfg.prompts, of=Prompt), cfg.rl.max_new_tokens)  # x

    for t in range(1, cfg.iterations + 1):
        judge = model  # M_{t-1}
        reward = rewards_by(cfg.judging, judge, cfg.rubric, cfg.judge)  # r
        model = learner.grpo(judge, judge, prompts, reward, cfg.rl, run.at(f"iter_{t}"))  # M_t
        best, lost, win_rate = compared(cfg, run, t, model, judge, best)
        report(cfg, run, run.at(f"iter_{t}"), t, model, win_rate=win_rate)
        if lost:
            break

    return iteration_of(model, run, best) if cfg.early_stop else model
