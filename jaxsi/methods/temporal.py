"""Temporal Self-Rewarding (Wang et al. 2025, arXiv 2508.06026): pairs that past and future models keep apart.

    M_1 as in Self-Rewarding
    for t = 2 .. T:                                                          all scores r by M_{t-1} as a judge
        x           new prompts
        y^n         ~ M_{t-1}(. | x),  z^n ~ M_1(. | x)                      n = 1 .. N
        y_w, y_l    best of y; worst of z if its score is below that of the worst y, else that y
        M_f         = DPO(M_{t-1}, (y_w, y_l))                               a future model, for this iteration alone
        u^n         ~ M_f(. | x);   y_w <- best of u if its score is above that of y_w
        M_t         = DPO(M_{t-1}, (y_w, y_l), reference M_{t-1})

In Self-Rewarding both sides come from one model. As it improves they become alike, and DPO's gradient fades. Read in
notes on the paper: the two phases and their rules, two iterations, K = 7. Inferred: that M_f is trained as M_t is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxsi.lm import LM
from jaxsi.methods.lifecycle import begin, carried_over, compared, is_better_by, iteration_of
from jaxsi.methods.seeded import PairConfig, SeedData, check_seeded, first_model, next_prompts, summarise
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_snapshot import may_move, stored_as
from jaxsi.runs.records import Judgment, PreferencePair, Prompt, Response
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig, sample
from jaxsi.stages import judge as judges
from jaxsi.stages.answers import answers, read_answers
from jaxsi.stages.early_stop import EarlyStop
from jaxsi.stages.judge import JudgeConfig, check_judge, judgment_statistics
from jaxsi.stages.pairs import pair_statistics
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.self_instruct import PromptFile, PromptList, SelfInstruct, prompt_source
from jaxsi.stages.temporal import Judged, anchored_pairs, future_guided
from jaxsi.text.chat_config import ChatConfig
from jaxsi.training.train import DPOConfig, TrainConfig, dpo


@stored_as("methods.temporal.Config")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. The fields are those of Self-Rewarding; of ``pairs`` only ``cut_off`` may be set.
    A prompt is sampled 3 x ``sampling.num_samples`` times, and DPO runs twice.

    ``evaluate(lm, config, scope)`` gives the figures of an iteration's summary.
    """

    model: str = dataclasses.field(metadata=may_move())
    seed_data: SeedData | None = None
    prompts: SelfInstruct | PromptFile | PromptList = dataclasses.field(
        metadata=may_move("generator", identity="iter_0/generator.json", made="iter_*/prompts.jsonl")
    )
    sampling: SamplingConfig = SamplingConfig()
    judge: JudgeConfig = JudgeConfig()
    rubric: AnyRubric = load_rubric()
    judging: Callable[..., list[Judgment]] = judges.judge
    pairs: PairConfig = PairConfig()
    sft: TrainConfig | None = None
    dpo: DPOConfig = DPOConfig()
    early_stop: EarlyStop | None = None
    evaluate: Callable[..., dict[str, Any]] | None = None
    chat: ChatConfig = ChatConfig()
    mesh: MeshConfig = MeshConfig()
    iterations: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", prompt_source(self.prompts))
        check_seeded(self)
        if self.pairs != PairConfig(cut_off=self.pairs.cut_off):
            raise ValueError(f"pairs is {self.pairs}; the method chooses by the scores alone, so set only cut_off")


def temporal(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns M_T, or the best iteration's model after an early stop."""
    base = begin(cfg, run)  # M_0
    past = model = first_model(cfg, base, run)  # M_1
    best = 1

    for t in range(2, cfg.iterations + 1):
        it = run.at(f"iter_{t}")
        prompts, _ = it.counted("prompts", next_prompts, cfg, base, run, t, of=Prompt)  # x
        present = judged(cfg, it, "candidates", prompts, model, model)  # y
        anchors = judged(cfg, it, "past_candidates", prompts, past, model)  # z
        pairs, counts = it.counted("anchored_pairs", anchored, cfg, prompts, present, anchors, of=PreferencePair)
        carried = carried_over(cfg.dpo, model, run, t, first=1)
        future = dpo(model, pairs, cfg.dpo, run.at(f"future_{t}"), **carried)  # M_f
        guides = judged(cfg, it, "future_candidates", prompts, future, model)  # u
        pairs, guided = it.counted("pairs", future_pairs, cfg, pairs, guides, of=PreferencePair)
        judge, better = model, is_better_by(cfg, model, it)
        model = dpo(model, pairs, cfg.dpo, it, better=better, **carried)  # M_t
        best, lost, win_rate = compared(cfg, run, t, model, judge, best)
        replaced = {"past": counts["past"], "future": guided["future"]}
        summarise(cfg, run, it, t, model, counts | guided | {"win_rate": win_rate}, **replaced)
        if lost:
            break

    return iteration_of(model, run, best) if cfg.early_stop else model


def judged(cfg: Config, it: Scope, name: str, prompts: Sequence[Prompt], writer: LM, judge: LM) -> Judged:
    """N responses of ``writer`` to each prompt, with the scores of ``judge``."""
    responses = it.sharded(name, prompts, sample, writer, cfg.sampling, it.key(name), of=Response, by=writer)
    judgments = it.sharded(
        f"{name}_judgments", answers(prompts, responses), read_answers, cfg.judging, judge, cfg.rubric, cfg.judge,
        it.key(name, "judge"), of=Judgment,
    )  # fmt: skip
    return Judged(responses, judgments)


def anchored(
    cfg: Config, prompts: Sequence[Prompt], present: Judged, past: Judged
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """Phase 1's pairs and counts; an error if hardly a judgment parsed."""
    statistics = judgment_statistics(present.judgments, cfg.rubric)
    check_judge(statistics, cfg.judge)
    pairs, counts = anchored_pairs(prompts, present, past, cut_off=cfg.pairs.cut_off)
    return pairs, counts | {"judge": statistics}


def future_pairs(
    cfg: Config, pairs: Sequence[PreferencePair], future: Judged
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """Phase 2's pairs, and their counts and statistics."""
    guided, counts = future_guided(pairs, future, cut_off=cfg.pairs.cut_off)
    return guided, counts | pair_statistics(guided)
