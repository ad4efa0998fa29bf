"""Meta-Rewarding (Wu et al. 2024, arXiv 2407.19594): one model acts, judges its answers, and judges its judgments.

    M_1 = SFT(M_0, IFT + EFT), or the given model
    for t = 2 .. T:                                                          every model is M_{t-1}, but for the prompts
        x_i        new prompts, 8-shot from IFT, by the frozen M_0
        y_i^k      ~ M_{t-1}(. | x_i)                                        k = 1 .. K
        j_i^{k,n}  ~ M_{t-1} as a judge on (x_i, y_i^k), with the score r_i^{k,n}         n = 1 .. N;  r_i^k = mean of
                                                                             the valid ones
        actor's pairs    (x_i, y_i^w, y_i^l)     of the scores near max_k r_i^k the shortest, near min_k r_i^k the
                                                 longest (length control, rho); left out if max and min are equal
        judge's pairs    only if t <= 3: the judgments of the y_i^k whose scores vary most, every two of them compared
                         in both orders by M_{t-1} as the meta-judge; the one with the highest Elo score over the one
                         with the lowest, both as answers to the judge's prompt
        M_t = DPO(M_{t-1}, actor's and judge's pairs, reference M_{t-1})

From wins to Elo scores: stages/meta_judge.py. M_1, prompts, early stopping and the measures of the judge are those of
Self-Rewarding. The official code is not released. The paper's rho changes between iterations (0, 0.32, 0.32, 0.4); here
it is one number. Not in the paper: a judge's share of the pairs (``pairs.meta.judge_share``).
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
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig, sample
from jaxsi.stages import judge as judges
from jaxsi.stages.answers import answers, read_answers
from jaxsi.stages.early_stop import EarlyStop
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.meta_judge import Contest, MetaJudgeConfig, contests, judge_pairs
from jaxsi.stages.prompts import Rubric, load_rubric
from jaxsi.stages.self_instruct import PromptFile, PromptList, SelfInstruct, prompt_source
from jaxsi.text.chat_config import ChatConfig
from jaxsi.training.train import DPOConfig, TrainConfig, dpo, seed_of


@stored_as("methods.meta_rewarding.MetaPairs")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaPairs:
    """``actor``: how answers become pairs; ``meta``: how judgments do."""

    actor: PairConfig = PairConfig()
    meta: MetaJudgeConfig = MetaJudgeConfig()


@stored_as("methods.meta_rewarding.Config")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. The fields are those of Self-Rewarding, but for ``rubric``, which has to grade
    each response by itself, and ``pairs``. ``judge.num_samples`` is N."""

    model: str = dataclasses.field(metadata=may_move())
    seed_data: SeedData | None = None
    prompts: SelfInstruct | PromptFile | PromptList = dataclasses.field(
        metadata=may_move("generator", identity="iter_0/generator.json", made="iter_*/prompts.jsonl")
    )
    sampling: SamplingConfig = SamplingConfig(num_samples=7, temperature=0.8, top_p=0.95)
    judge: JudgeConfig = JudgeConfig(num_samples=11)
    rubric: Rubric = load_rubric()
    judging: Callable[..., list[Judgment]] = judges.judge
    pairs: MetaPairs = MetaPairs()
    sft: TrainConfig | None = None
    dpo: DPOConfig = DPOConfig()
    early_stop: EarlyStop | None = None
    evaluate: Callable[..., dict[str, Any]] | None = None
    chat: ChatConfig = ChatConfig()
    mesh: MeshConfig = MeshConfig()
    iterations: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", prompt_source(self.prompts))
        check_seeded(self)
        if not isinstance(self.rubric, Rubric):
            raise ValueError(
                f"rubric {self.rubric.name!r} compares responses; Meta-Rewarding needs one that gives each a score"
            )
        if self.pairs.meta.judge_iterations and self.judge.num_samples < 2:
            raise ValueError(
                f"judge.num_samples is {self.judge.num_samples}; a pair of judgments needs at least 2, or set "
                "judge_iterations = 0 of pairs.meta"
            )


def meta_rewarding(cfg: Config, run: Run) -> LM:
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
        )  # j, r  # fmt: skip
        pairs, counts = it.counted(
            "pairs", paired, cfg, cfg.pairs.actor, candidates, judgments, prompts, of=PreferencePair
        )  # the actor's
        judged, meta = [], {}
        if t - 1 <= cfg.pairs.meta.judge_iterations:
            judged, meta = of_judgments(
                cfg, it, t - 1, model, contests(prompts, candidates, judgments, cfg.rubric), len(pairs)
            )
        judge, better = model, is_better_by(cfg, model, it)
        carried = carried_over(cfg.dpo, model, run, t, first=1)
        model = dpo(model, [*pairs, *judged], cfg.dpo, it, better=better, **carried)  # M_t
        best, lost, win_rate = compared(cfg, run, t, model, judge, best)
        figures = {name: meta.get(name) for name in ("position_bias", "prefers_higher")}
        summarise(cfg, run, it, t, model, counts | {"win_rate": win_rate}, judge_pairs=len(judged), **figures)
        if lost:
            break

    return iteration_of(model, run, best) if cfg.early_stop else model


def of_judgments(
    cfg: Config, it: Scope, number: int, model: LM, contests: list[Contest], actor_pairs: int
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """The judge's pairs of round ``number``, and counts: the meta-judge compares the judgments of each contest."""
    meta = cfg.pairs.meta
    comparisons = it.sharded(
        "comparisons", contests, meta.judging, model, meta.rubric, meta.judge, it.key("meta_judge"), of=Judgment,
        shard_size=64,
    )  # fmt: skip
    return it.counted(
        "judge_pairs", judge_pairs, contests, comparisons, model.tokenizer, meta, number=number,
        actor_pairs=actor_pairs, seed=seed_of(it, "judge_pairs"), of=PreferencePair,
    )  # fmt: skip
