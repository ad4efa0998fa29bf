"""Self-Rewarding Language Models (Yuan et al. 2024, arXiv 2401.10020v3): the model judges its own responses.

    M_1 = SFT(M_0, IFT + EFT)
    for t = 2 .. T:                                                          every model is M_{t-1}, but for the prompts
        x_i        new prompts, 8-shot from IFT, by the frozen M_0
        y_i^n      ~ M_{t-1}(. | x_i)                                        n = 1 .. N
        r_i^{n,k}  score of M_{t-1} as a judge on (x_i, y_i^n)               k = 1 .. K;  r_i^n = mean over the valid k
        (x_i, y_i^w, y_i^l)   w = argmax_n r_i^n, l = argmin_n r_i^n         left out where equal
        M_t = DPO(M_{t-1}, pairs, reference M_{t-1})

IFT: human demonstrations. EFT: judge prompts with the justification and score of a judge that agreed with human
rankings; the judge that writes them is the model trained on IFT alone. The paper's constants are in
configs/self_rewarding/. It does not state epochs, lengths, the judge's temperature or the number of prompts, and it
trains with dropout 0.1, which this project has nowhere: policy and reference must give equal log-probabilities at
step 0.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from jaxsi.lm import LM, load, save_checkpoint
from jaxsi.methods.lifecycle import begin, report
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.checkpoint import is_complete
from jaxsi.runs.records import Judgment, PreferencePair, Prompt, RankedResponses, Response, SFTExample
from jaxsi.runs.run import Run, RunError, Scope
from jaxsi.sampling.generate import SamplingConfig, check_sampled_by, generate
from jaxsi.stages import judge as feedback, pairs as pairlib
from jaxsi.stages.datasets import as_responses, eft_examples
from jaxsi.stages.judge import JudgeConfig, judgment_statistics
from jaxsi.stages.prompts import Rubric, load_rubric
from jaxsi.stages.self_instruct import PromptFile, SelfInstruct, new_prompts, next_part
from jaxsi.training.train import DPOConfig, TrainConfig, dpo, seed_of, sft


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedData:
    """Human data: ``ift`` gives demonstrations; ``rankings``, where given, the ranked responses that EFT is made from,
    ``max_share`` of which have one score at most. New prompts are none of ``held_out``."""

    ift: Callable[[], list[SFTExample]]
    rankings: Callable[[], list[RankedResponses]] | None = None
    held_out: Callable[[], list[Prompt]] | None = None
    max_share: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share is {self.max_share}; it lies in (0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig:
    """``length_control`` is Meta-Rewarding's rho (0: off); pairs with a smaller score gap than ``min_gap`` are left
    out. ``cut_off``: let responses that the token limit cut off be in pairs, for a model that does not stop by
    itself."""

    length_control: float = 0.0
    min_gap: float = 0.0
    cut_off: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.length_control < 0.5 or self.min_gap < 0:
            raise ValueError(f"length_control is {self.length_control} (in [0, 0.5)), min_gap {self.min_gap} (>= 0)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Every ``dpo.train.checkpoint_every`` steps the win rate over the previous checkpoint on held-out ``prompts``
    decides: training stops when it is not above one half. ``judging`` scores both sides, with M_{t-1} as its model."""

    prompts: Callable[[], list[Prompt]]
    judging: Callable[..., list[Judgment]] = feedback.judge


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. ``sft`` None: the given model is M_1, for those who bring an instruct model and
    prompts.

    ``judging`` is the judge stage, ``feedback.judge`` or another function of its signature (the control arms are).
    ``evaluate(lm, config, scope)`` gives the figures of an iteration's summary.
    """

    model: str
    seed_data: SeedData | None
    prompts: SelfInstruct | PromptFile
    sampling: SamplingConfig = SamplingConfig()
    judge: JudgeConfig = JudgeConfig()
    rubric: Rubric = load_rubric()
    judging: Callable[..., list[Judgment]] = feedback.judge
    pairs: PairConfig = PairConfig()
    sft: TrainConfig | None
    dpo: DPOConfig
    early_stop: EarlyStop | None = None
    evaluate: Callable[..., dict[str, Any]] | None = None
    mesh: MeshConfig = MeshConfig()
    iterations: int = 3
    seed: int = 0

    RESUMABLE: ClassVar[frozenset[str]] = frozenset({"sft.log_every", "dpo.train.log_every"})
    ARM_FIELDS: ClassVar[frozenset[str]] = frozenset({"judging"})
    SHARED: ClassVar[tuple[str, ...]] = ("iter_0", "sft_baseline", "iter_1")

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}; it is at least 1 (M_1 alone)")
        if self.sampling.num_samples < 2:
            raise ValueError(f"sampling.num_samples is {self.sampling.num_samples}; a pair needs at least 2 candidates")
        if self.seed_data is None and (self.sft is not None or isinstance(self.prompts, SelfInstruct)):
            raise ValueError("seed_data is None: then sft is None too, and prompts come from a file")


def self_rewarding(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns M_T."""
    base = begin(run, cfg.model, cfg.mesh, cfg.sampling.dtype, cfg.sft, cfg.dpo.train)  # M_0

    it = run.at("iter_1")
    model = first_model(cfg, base, run, it)  # M_1
    summarise(cfg, run, it, model, 1, {})

    for t in range(2, cfg.iterations + 1):
        it = run.at(f"iter_{t}")  # all that makes M_t, and its checkpoint
        prompts = it.records("prompts", prompts_of, cfg, base, it, t, of=Prompt)
        base.release()  # it may have written them
        candidates = it.sharded("candidates", prompts, sampler(cfg, model, it), of=Response)
        check_sampled_by(model, candidates)
        judgments = it.sharded("judgments", prompts, judger(cfg, model, candidates, it), of=Judgment)
        pairs = it.records("pairs", best_and_worst, cfg, candidates, judgments, prompts, of=PreferencePair)
        counts = it.value("pairs_counts", pair_counts, cfg, candidates, judgments, prompts)
        model = dpo(model, pairs, cfg.dpo, it, better=stopper(cfg, model, it))  # M_t
        summarise(cfg, run, it, model, t, counts)

    run.update_summary({"status": "complete"})
    return model


def absent(t: int) -> list[Prompt]:
    """In place of a stage that an earlier iteration has done."""
    raise RunError(f"the prompts of iteration {t} are gone; put iter_{t}/prompts.jsonl back, or begin a new run")


def first_model(cfg: Config, base: LM, run: Run, it: Scope) -> LM:
    """M_1 = SFT(M_0, IFT + EFT)."""
    if cfg.sft is None or cfg.seed_data is None:
        if not is_complete(it.path / "checkpoint" / "weights"):
            save_checkpoint(base, it.path / "checkpoint", {"step": 0})
        return base
    ift = it.records("ift", cfg.seed_data.ift, of=SFTExample)
    if cfg.seed_data.rankings is None:
        return sft(base, ift, cfg.sft, it)
    baseline = sft(base, ift, cfg.sft, run.at("sft_baseline"))  # the judge that writes EFT, trained on IFT alone
    ranked = it.records("rankings", cfg.seed_data.rankings, of=RankedResponses)
    prompts, responses = as_responses(ranked)
    judged = it.sharded(
        "eft_judgments", prompts, judger(cfg, baseline, responses, it, "eft", feedback.judge), of=Judgment
    )
    eft = it.records("eft", agreeing, cfg, it, ranked, judged, ift, of=SFTExample)
    return sft(base, [*ift, *eft], cfg.sft, it)


def agreeing(
    cfg: Config, it: Scope, ranked: list[RankedResponses], judged: list[Judgment], ift: list[SFTExample]
) -> list[SFTExample]:
    """EFT: what the judge wrote where it ordered responses as people did, no score dominating."""
    assert cfg.seed_data is not None
    seed = seed_of(it, "eft")
    examples, counts = eft_examples(ranked, judged, cfg.rubric, max_share=cfg.seed_data.max_share, seed=seed, ift=ift)
    it.value("eft_counts", lambda: counts)
    if not examples:
        raise ValueError(
            f"no judgment of the {len(ranked)} ranked prompts agrees with people ({counts}), so there is no EFT; train "
            "the judge of M_0 first, or leave the rankings out in a new run directory"
        )
    return examples


def prompts_of(cfg: Config, generator: LM, it: Scope, t: int) -> list[Prompt]:
    """The new prompts of iteration t: generated, or the next part of the file, of what no iteration has had."""
    earlier = [p for s in range(2, t) for p in it.run.at(f"iter_{s}").records("prompts", absent, s, of=Prompt)]
    held_out = cfg.seed_data.held_out if cfg.seed_data is not None else None
    texts = frozenset(prompt.text for prompt in held_out()) if held_out is not None else frozenset[str]()
    if isinstance(cfg.prompts, PromptFile):
        return next_part(cfg.prompts, earlier, cfg.iterations - t + 1, texts)
    if cfg.prompts.generator is not None:
        generator = load(cfg.prompts.generator, generator.mesh, cfg.sampling.dtype)
    assert cfg.seed_data is not None
    ift = it.run.at("iter_1").records("ift", cfg.seed_data.ift, of=SFTExample)
    seeds = [Prompt(id=example.id, messages=example.messages) for example in ift]
    counts: Counter[str] = Counter()
    known = texts | {prompt.text for prompt in earlier}
    made = new_prompts(generator, seeds, cfg.prompts, it.key("prompts"), known, prefix=f"iter{t}", counts=counts)
    it.value("prompts_counts", lambda: dict(counts))
    return made


def sampler(cfg: Config, model: LM, it: Scope) -> Callable[[Sequence[Prompt]], list[Response]]:
    """The stage that samples N candidates to each prompt."""
    return lambda prompts: generate(model, prompts, key=it.key("candidates"), **cfg.sampling.settings)


def judger(
    cfg: Config,
    model: LM,
    responses: Sequence[Response],
    it: Scope,
    name: str = "judge",
    judging: Callable[..., list[Judgment]] | None = None,
) -> Callable[[Sequence[Prompt]], list[Judgment]]:
    """The stage that judges all responses to each prompt, K times each."""
    by_prompt: dict[str, list[Response]] = {}
    for response in responses:
        by_prompt.setdefault(response.prompt_id, []).append(response)
    judging = judging or cfg.judging

    def judge_part(prompts: Sequence[Prompt]) -> list[Judgment]:
        part = [response for prompt in prompts for response in by_prompt[prompt.id]]
        return judging(model, prompts, part, cfg.rubric, cfg.judge, it.key(name))

    return judge_part


def best_and_worst(cfg: Config, *records: list[Any]) -> list[PreferencePair]:
    """(x, y_w, y_l) of each prompt whose best and worst scores differ, of candidates, judgments, prompts."""
    return paired(cfg, *records)[0]


def pair_counts(cfg: Config, *records: list[Any]) -> dict[str, Any]:
    """What became of candidates, judgments, prompts, in numbers; an error where hardly a judgment parsed."""
    chosen, counts = paired(cfg, *records)
    judge = judgment_statistics(records[1], low=cfg.rubric.low, high=cfg.rubric.high)
    feedback.check_judge(judge, cfg.judge)
    return counts | pairlib.pair_statistics(chosen) | {"judge": judge}


def paired(cfg: Config, *records: list[Any]) -> tuple[list[PreferencePair], dict[str, int]]:
    """Pairs and counts by the config's rules."""
    return pairlib.best_and_worst(
        *records, length_control=cfg.pairs.length_control, min_gap=cfg.pairs.min_gap,
        reject_cut_off=cfg.pairs.cut_off, choose_cut_off=cfg.pairs.cut_off,
    )  # fmt: skip


def stopper(cfg: Config, judge_model: LM, it: Scope) -> Callable[[LM, LM], bool] | None:
    """The paper's early stopping: is the newest checkpoint better than the one before?"""
    if cfg.early_stop is None:
        return None
    stop = cfg.early_stop
    prompts, settings = stop.prompts(), cfg.sampling.settings | {"num_samples": 1}

    def better(now: LM, previous: LM) -> bool:
        sides = []
        for lm in (now, previous):
            sides.append(generate(lm, prompts, key=it.key("early_stop"), **settings))
            lm.release()
        judged = [
            stop.judging(judge_model, prompts, side, cfg.rubric, cfg.judge, it.key("early_stop", "judge"))
            for side in sides
        ]
        judge_model.release()
        win_rate = feedback.compare(*judged).win_rate
        return win_rate is not None and win_rate > 0.5

    return better


def summarise(cfg: Config, run: Run, it: Scope, model: LM, t: int, counts: dict[str, Any]) -> None:
    """Evaluates M_t and writes its line of summary.json; M_1 has no counts of pairs."""
    figures = it.value("evaluation", cfg.evaluate, model, cfg, it) if cfg.evaluate is not None else {}
    baseline = run.at("sft_baseline").seconds() if t == 1 else {}
    judged = counts.get("judge", {})
    semantics = {"init_from": "M_{t-1}", "reference": "M_{t-1}", "data": "current", "optimizer": "reset"}
    report(
        run, it, t, model, figures, method="self_rewarding", semantics=semantics,
        parse_rate=figures.get("parse_rate", judged.get("parse_rate")), pairs=counts.get("pairs"),
        ties=counts.get("ties"), alarms=judged.get("alarms"),
        seconds=it.seconds() | {f"baseline_{name}": seconds for name, seconds in baseline.items()},
    )  # fmt: skip
