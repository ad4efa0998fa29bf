"""Self-Rewarding Language Models (Yuan et al. 2024, arXiv 2401.10020v3): the model judges its own responses.

    M_1 = SFT(M_0, IFT + EFT)
    for t = 2 .. T:                                                          every model is M_{t-1}, but for the prompts
        x_i        new prompts, 8-shot from IFT, by the frozen M_0
        y_i^n      ~ M_{t-1}(. | x_i)                                        n = 1 .. N
        r_i^{n,k}  score of M_{t-1} as a judge on (x_i, y_i^n)               k = 1 .. K;  r_i^n = mean over the valid k
        (x_i, y_i^w, y_i^l)   w = argmax_n r_i^n, l = argmin_n r_i^n         left out if equal
        M_t = DPO(M_{t-1}, pairs, reference M_{t-1})

IFT: human demonstrations. EFT: judge prompts with the justification and score of a judge that agreed with human
rankings; the judge that writes them is the model trained on IFT alone. Every M_t is measured as a judge on other human
rankings, if there are any. The paper's constants are in configs/self_rewarding/. It does not state epochs, lengths, the
judge's temperature or the number of prompts, and it trains with dropout 0.1, which this project has nowhere: policy and
reference must give equal log-probabilities at step 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxsi.lm import LM
from jaxsi.methods.lifecycle import begin, carried_over, compared, is_better_by, iteration_of
from jaxsi.methods.seeded import PairConfig, SeedData, check_seeded, first_model, next_prompts, paired, summarise
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_snapshot import may_move, stored_as
from jaxsi.runs.records import Judgment, PreferencePair, Prompt, Response
from jaxsi.runs.run import Run
from jaxsi.sampling.generate import SamplingConfig, sample
from jaxsi.stages import judge as judges
from jaxsi.stages.answers import answers, read_answers
from jaxsi.stages.early_stop import EarlyStop
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.self_instruct import PromptFile, PromptList, SelfInstruct, prompt_source
from jaxsi.text.chat_config import ChatConfig
from jaxsi.training.train import DPOConfig, TrainConfig, dpo


@stored_as("methods.self_rewarding.Config")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. ``sft`` None: the given model is M_1, for those who bring an instruct model and
    prompts. ``prompts`` are invented by a model, or come from a file (its path is enough) or from a list of texts.

    ``judging`` is the judge: the model itself (``judge.judge``), one of ``stages.judges``, or another function of their
    signature (the control arms are). ``rubric`` grades each response, or compares all responses to a prompt.
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


def self_rewarding(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns M_T, or the best iteration's model after an early stop."""
    base = begin(cfg, run)  # M_0
    model, best = first_model(cfg, base, run), 1  # M_1

    for t in range(2, cfg.iterations + 1):
        it = run.at(f"iter_{t}")  # all that makes M_t, and its checkpoint
        prompts, _ = it.counted("prompts", next_prompts, cfg, base, run, t, of=Prompt)  # x
        candidates = it.sharded(
            "candidates", prompts, sample, model, cfg.sampling, it.key("candidates"), of=Response, by=model
        )  # y
        judgments = it.sharded(
            "judgments", answers(prompts, candidates), read_answers, cfg.judging, model, cfg.rubric, cfg.judge,
            it.key("judge"), of=Judgment,
        )  # r  # fmt: skip
        pairs, counts = it.counted("pairs", paired, cfg, cfg.pairs, candidates, judgments, prompts, of=PreferencePair)
        judge, better = model, is_better_by(cfg, model, it)
        model = dpo(model, pairs, cfg.dpo, it, better=better, **carried_over(cfg.dpo, model, run, t, first=1))  # M_t
        best, lost, win_rate = compared(cfg, run, t, model, judge, best)
        summarise(cfg, run, it, t, model, counts | {"win_rate": win_rate})
        if lost:
            break

    return iteration_of(model, run, best) if cfg.early_stop else model
