"""What the methods share that begin with human data and make preference pairs of the model's own responses: M_1, new
prompts, pairs by score, and the line of an iteration.

``cfg`` is the Config of such a method: it has ``seed_data``, ``sft``, ``prompts``, ``sampling``, ``rubric``, ``judge``
and ``iterations``.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from jaxsi.lm import LM, borrowed
from jaxsi.methods.lifecycle import keep, report, same_model
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Judgment, PreferencePair, Prompt, RankedResponses, Response, SFTExample
from jaxsi.runs.run import Run, Scope
from jaxsi.stages import judge as judges
from jaxsi.stages.answers import answers, read_answers
from jaxsi.stages.eft import agreeing_examples
from jaxsi.stages.judge import check_judge, judgment_statistics
from jaxsi.stages.judge_quality import measured_judge
from jaxsi.stages.pairs import best_and_worst, pair_statistics
from jaxsi.stages.prompts.comparison import RankingRubric
from jaxsi.stages.rankings import Agrees, as_responses, whole_order, without_prompts
from jaxsi.stages.self_instruct import SelfInstruct, new_prompts, next_part
from jaxsi.training.train import TrainConfig, seed_of, sft


@stored_as("methods.self_rewarding.SeedData")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedData:
    """Human data. ``ift`` gives demonstrations, ``rankings`` the ranked responses that EFT is made from: ``agrees``
    says when a judgment orders them as people did, and at most ``max_share`` of EFT has one score. ``judge_test`` gives
    other rankings, on which every M_t is measured as a judge; nothing is trained on their prompts. New prompts are
    neither among the ``held_out`` ones and those of ``judge_test``, nor similar to them."""

    ift: Callable[[], list[SFTExample]] | None = None
    rankings: Callable[[], list[RankedResponses]] | None = None
    held_out: Callable[[], list[Prompt]] | None = None
    max_share: float = 0.4
    agrees: Agrees = whole_order
    judge_test: Callable[[], list[RankedResponses]] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share is {self.max_share}; it lies in (0, 1]")


@stored_as("methods.self_rewarding.PairConfig")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig:
    """``length_control`` is Meta-Rewarding's rho (0: off); pairs with a smaller score gap than ``min_gap`` are left
    out. ``cut_off``: let responses that the token limit cut off be in pairs, for a model that does not stop by
    itself."""

    length_control: float = 0.0
    min_gap: float = 0.0
    cut_off: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.length_control < 0.5 or not self.min_gap >= 0:
            raise ValueError(f"length_control is {self.length_control} (in [0, 0.5)), min_gap {self.min_gap} (>= 0)")


def check_seeded(cfg: Any) -> None:
    """Raises: ValueError if the parts of ``cfg`` do not fit one another."""
    if cfg.iterations < 1:
        raise ValueError(f"iterations is {cfg.iterations}; it is at least 1 (M_1 alone)")
    if cfg.sampling.num_samples < 2:
        raise ValueError(f"sampling.num_samples is {cfg.sampling.num_samples}; a pair needs at least 2 candidates")
    data = SeedData() if cfg.seed_data is None else cfg.seed_data
    if data.rankings is not None and isinstance(cfg.rubric, RankingRubric):
        raise ValueError(f"rubric {cfg.rubric.name!r} ranks; EFT needs one that grades a response or compares two")
    if cfg.sft is not None and data.ift is None and data.rankings is None:
        raise ValueError("sft is set, but seed_data has neither ift nor rankings to train on; give them, or no sft")
    if isinstance(cfg.prompts, SelfInstruct) and data.ift is None:
        raise ValueError("seed_data has no ift for new prompts to imitate; give it, or prompts as a file or texts")


def first_model(cfg: Any, base: LM, run: Run) -> LM:
    """M_1 = SFT(M_0, IFT + EFT), or the model as given."""
    it, data = run.at("iter_1"), SeedData() if cfg.seed_data is None else cfg.seed_data
    ift: list[SFTExample] = []
    if data.ift is not None:
        ift = it.records("ift", demonstrations, data.ift, judge_test(data, run), of=SFTExample)
    if cfg.sft is None:
        model = keep(base, it)
    else:
        eft = [] if data.rankings is None else evaluation_examples(cfg, data, cfg.sft, base, run, ift)
        model = sft(base, [*ift, *eft], cfg.sft, it)
    summarise(cfg, run, it, 1, model, {})
    return model


def judge_test(data: SeedData | None, run: Run) -> list[RankedResponses]:
    """The rankings on which every M_t is measured as a judge, kept in iter_1; there may be none."""
    if data is None or data.judge_test is None:
        return []
    return run.at("iter_1").records("judge_test", data.judge_test, of=RankedResponses)


def demonstrations(ift: Callable[[], list[SFTExample]], test: list[RankedResponses]) -> list[SFTExample]:
    """IFT without the prompts that measure the judge."""
    return without_prompts(ift(), test)


def evaluation_examples(
    cfg: Any, data: SeedData, training: TrainConfig, base: LM, run: Run, ift: list[SFTExample]
) -> list[SFTExample]:
    """EFT: what a judge trained on IFT alone, or M_0 without IFT, wrote when it ordered responses as people did."""
    assert data.rankings is not None
    it = run.at("iter_1")
    baseline = sft(base, ift, training, run.at("sft_baseline")) if ift else base
    ranked = it.records("rankings", data.rankings, of=RankedResponses)
    judged = it.sharded(
        "eft_judgments", answers(*as_responses(ranked)), read_answers, judges.judge, baseline, cfg.rubric, cfg.judge,
        it.key("eft"), of=Judgment,
    )  # fmt: skip
    seed = seed_of(it, "eft")
    eft, _ = it.counted(
        "eft", agreeing_examples, ranked, judged, cfg.rubric, agrees=data.agrees, max_share=data.max_share, seed=seed,
        ift=ift, test=judge_test(data, run), of=SFTExample,
    )  # fmt: skip
    return eft


def next_prompts(cfg: Any, base: LM, run: Run, t: int) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts of iteration t, new to the run: generated by M_0 or another model, or the next part of a file."""
    earlier = [p for s in range(2, t) for p in run.at(f"iter_{s}").finished("prompts", of=Prompt)]
    texts: list[str] = []
    if cfg.seed_data is not None and cfg.seed_data.held_out is not None:
        held_out = run.at("iter_0").records("seed_held_out", cfg.seed_data.held_out, of=Prompt)
        texts += [prompt.text for prompt in held_out]
    texts += [prompt.text for prompt in as_responses(judge_test(cfg.seed_data, run))[0]]
    if not isinstance(cfg.prompts, SelfInstruct):
        prompts = next_part(cfg.prompts, earlier, cfg.iterations - t + 1, frozenset(texts))
        return prompts, {"kept": len(prompts)}
    made_by = cfg.prompts.generator
    generator = base if made_by is None else borrowed(made_by, cfg.sampling.dtype, base.mesh)
    if made_by is not None:
        same_model(run.at("iter_0"), "generator", made_by, generator)
    ift = run.at("iter_1").finished("ift", of=SFTExample)
    seeds = [Prompt(id=example.id, messages=example.messages) for example in ift]
    key, asked_before = run.at(f"iter_{t}").key("prompts"), [prompt.text for prompt in earlier]
    counts: Counter[str] = Counter()
    prompts = new_prompts(
        generator, seeds, cfg.prompts, key, earlier=asked_before, held_out=texts, prefix=f"iter{t}", counts=counts
    )
    return prompts, dict(counts)


def paired(
    cfg: Any, settings: PairConfig, candidates: list[Response], judgments: list[Judgment], prompts: list[Prompt]
) -> tuple[list[PreferencePair], dict[str, Any]]:
    """(x, y_w, y_l) of each prompt whose best and worst scores differ, and what became of the others; an error if
    hardly a judgment parsed."""
    statistics = judgment_statistics(judgments, cfg.rubric)
    check_judge(statistics, cfg.judge)
    pairs, counts = best_and_worst(
        candidates, judgments, prompts, length_control=settings.length_control, min_gap=settings.min_gap,
        reject_cut_off=settings.cut_off, choose_cut_off=settings.cut_off,
    )  # fmt: skip
    return pairs, counts | pair_statistics(pairs) | {"judge": statistics}


def summarise(cfg: Any, run: Run, it: Scope, t: int, model: LM, counts: dict[str, Any], **further: Any) -> None:
    """Reports M_t, and measures it as a judge on human rankings if there are any; M_1 has no counts of pairs.
    ``further``: other entries of the line."""
    judged, ranked = counts.get("judge", {}), judge_test(cfg.seed_data, run)
    report(
        cfg, run, it, t, model, parse_rate=judged.get("parse_rate"), pairs=counts.get("pairs"),
        ties=counts.get("ties"), alarms=judged.get("alarms"), win_rate=counts.get("win_rate"),
        judge_quality=measured_judge(it, ranked, model, cfg.rubric, cfg.judge) if ranked else None,
        **further,
    )  # fmt: skip
