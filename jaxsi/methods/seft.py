"""SEFT, self-evolution fine-tuning (Chen et al. 2024, arXiv 2406.10813), reconstructed from its abstract and summaries.

    D_r = (x, y_l, y_h)  ranked responses;  P_R a reviser;  l in {MAJOR, MINOR, NO}
    A  warm-up reviser    minimise  -log P_R(y_h | x, y_l)
    B  p = exp(-(1/|y_h|) log P_R(y_h | x, y_l))      l = MAJOR where p > tau, else MINOR; NO where y is the best of x
       adaptive reviser   minimise  -log P_R(l | x, y) - log P_R(y_t | x, y, l)     y_t = y_h; under NO, y itself
    C  for t = 1 .. T:
           y ~ pi_{t-1}(. | x)                                  x: fresh unlabelled prompts
           internal:  target = the y of N with the greatest P_R(NO | x, y)
           external:  l, y+ = R(x, y);  target = y where l is NO, else y+
           pi_t = SFT(pi_{t-1}, (x, target))
       until the share of NO among pi_t's responses to held-out prompts no longer rises

The abstract has: the adaptive reviser, which lifts poor responses and leaves good ones alone; the policy that is
fine-tuned, step by step, on what it makes of unlabelled prompts. Summaries of the text have: D_r, the two phases, that
revision labels exist and that the difficulty of a revision is measured, internal before external evolution. Recalled,
without a source: the label strings, and that a perplexity threshold chooses among them. Reconstructed, so this
project's: the median as tau, the mix of labels, that the adaptive reviser starts from the warm-up one, the label as the
likeliest whole string, the target of an internal round, the stopping rule, and all hyper-parameters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from jaxsi.lm import LM, load, save_checkpoint
from jaxsi.methods.lifecycle import begin, report
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.checkpoint import is_complete
from jaxsi.runs.records import Prompt, RankedResponses, Response, Revision, SFTExample
from jaxsi.runs.run import Run, RunError, Scope
from jaxsi.sampling.generate import SamplingConfig, check_sampled_by, generate
from jaxsi.stages import reviser as reviselib, reviser_data as data
from jaxsi.stages.prompts.reviser import ReviserTemplate, load_reviser_template
from jaxsi.stages.reviser import ReviseConfig
from jaxsi.stages.reviser_data import LabelConfig, RevisionPair
from jaxsi.stages.self_instruct import PromptFile, next_part
from jaxsi.training.train import TrainConfig, seed_of, sft


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReviserConfig:
    """The reviser: ``rankings`` gives D_r, ``model`` its weights before phase A (None: those of the run's model),
    ``warm_up`` and ``adaptive`` train phases A and B. ``evaluate(reviser, config, scope)`` gives its own figures."""

    rankings: Callable[[], list[RankedResponses]]
    model: str | None = None
    template: ReviserTemplate = load_reviser_template()
    warm_up: TrainConfig
    labels: LabelConfig = LabelConfig()
    adaptive: TrainConfig
    writing: ReviseConfig = ReviseConfig()
    evaluate: Callable[..., dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """What an evolution round learns: ``target`` is ``revise.best_of_n``, ``revise.revise`` or another function of
    their signature; ``num_samples`` drafts to each prompt come from the model ``drafts`` (None: from the policy)."""

    target: Callable[..., list[Revision]]
    num_samples: int = 1
    drafts: str | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; a round needs at least 1 draft to each prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. The first ``internal_rounds`` of ``iterations`` rounds are ``internal``, the
    others ``external``; each trains by ``sft``. ``start``, where given, trains the policy before evolution on
    ``demonstrations``. New prompts are none of ``held_out``, by which evolution stops (None: it never does).

    ``evaluate(policy, config, scope, reviser)`` gives the figures of an iteration's summary.
    """

    model: str
    reviser: ReviserConfig
    prompts: PromptFile | Callable[[], list[Prompt]]
    held_out: Callable[[], list[Prompt]] | None = None
    demonstrations: Callable[[], list[SFTExample]] | None = None
    start: TrainConfig | None = None
    sampling: SamplingConfig = SamplingConfig(temperature=1.0, top_p=1.0)
    internal: Round = Round(target=reviselib.best_of_n, num_samples=4)
    external: Round = Round(target=reviselib.revise)
    internal_rounds: int = 1
    sft: TrainConfig
    evaluate: Callable[..., dict[str, Any]] | None = None
    mesh: MeshConfig = MeshConfig()
    iterations: int = 3
    seed: int = 0

    RESUMABLE: ClassVar[frozenset[str]] = frozenset(
        {"start.log_every", "sft.log_every", "reviser.warm_up.log_every", "reviser.adaptive.log_every"}
    )
    ARM_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"prompts", "internal", "external", "internal_rounds", "sft", "iterations"}
    )
    SHARED: ClassVar[tuple[str, ...]] = ("base", "iter_0", "warm_reviser", "reviser")

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.internal_rounds < 0:
            raise ValueError(
                f"iterations is {self.iterations} (at least 1) and internal_rounds {self.internal_rounds} (at least 0)"
            )
        if (self.start is None) != (self.demonstrations is None):
            raise ValueError("start and demonstrations go together: give both, or neither for a policy as given")


def seft(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns the policy after the last round."""
    both = cfg.reviser.warm_up, cfg.reviser.adaptive
    base = begin(run, cfg.model, cfg.mesh, cfg.sampling.dtype, cfg.start, cfg.sft, *both)
    policy = first_policy(cfg, base, run.at("iter_0"))  # pi_0
    reviser = adaptive_reviser(cfg, base, run)  # P_R
    shares = [summarise(cfg, run, 0, run.at("iter_0"), policy, reviser)]
    given = run.at("iter_0" if cfg.start is None else "base")  # the same model is measured once
    summarise(cfg, run, "base", given, base, reviser)

    for t in range(1, cfg.iterations + 1):
        it = run.at(f"iter_{t}")
        round = cfg.internal if t <= cfg.internal_rounds else cfg.external
        source = policy if round.drafts is None else load(round.drafts, policy.mesh, cfg.sampling.dtype)
        prompts = it.records("prompts", prompts_of, cfg, it, t, of=Prompt)
        drafts = it.sharded("drafts", prompts, drafter(cfg, round, source, it), of=Response)  # y
        check_sampled_by(source, drafts)
        source.release()
        del source  # where it is another model than the policy, all of it
        revisions = it.sharded("revisions", prompts, chooser(cfg, round, reviser, drafts, it), of=Revision)  # l, y+
        reviser.release()
        counts = it.value("targets_counts", reviselib.revision_statistics, drafts, revisions, cfg.reviser.template)
        targets = it.records("targets", reviselib.targets, prompts, revisions, of=SFTExample)
        policy = sft(policy, targets, cfg.sft, it)  # pi_t
        shares.append(summarise(cfg, run, t, it, policy, reviser, targets=len(targets), revisions=counts))
        if stops(shares):
            break

    run.update_summary({"status": "complete", "rounds": len(shares) - 1, "stopped": stops(shares)})
    return policy


def first_policy(cfg: Config, base: LM, it: Scope) -> LM:
    """pi_0: the model as given, or after SFT on demonstrations."""
    if cfg.start is not None and cfg.demonstrations is not None:
        return sft(base, it.records("demonstrations", cfg.demonstrations, of=SFTExample), cfg.start, it)
    if not is_complete(it.path / "checkpoint" / "weights"):
        save_checkpoint(base, it.path / "checkpoint", {"step": 0})
    return base


def adaptive_reviser(cfg: Config, base: LM, run: Run) -> LM:
    """Phases A and B: a warm-up reviser on (x, y_l) -> y_h, then one that says first how much it will change."""
    of, template = cfg.reviser, cfg.reviser.template
    if of.model is not None:
        base = load(of.model, base.mesh, cfg.sampling.dtype, weights_dtype="float32")
    it = run.at("warm_reviser")
    pairs = it.records("pairs", pairs_of, cfg, base, it, of=RevisionPair)  # D_r
    warm = sft(base, data.warm_up_examples(pairs, template), of.warm_up, it)

    it = run.at("reviser")
    labelled = it.records("labels", data.label_pairs, warm, pairs, template, of.labels, of=RevisionPair)
    counts = it.value("labels_counts", data.label_statistics, labelled, template)
    examples = data.reviser_examples(labelled, template, of.labels.mix, seed_of(it, "mix"))
    reviser = sft(warm, examples, of.adaptive, it)
    figures = it.value("evaluation", of.evaluate, reviser, cfg, it) if of.evaluate is not None else {}
    run.update_summary({"reviser": {"labels": counts, **figures, "seconds": it.seconds()}})
    return reviser


def pairs_of(cfg: Config, base: LM, it: Scope) -> list[RevisionPair]:
    """D_r, without what is empty, equal or too long for the models and for training."""
    longest = min(base.config.max_positions, cfg.reviser.warm_up.max_length, cfg.reviser.adaptive.max_length)

    def fits(pair: RevisionPair) -> bool:
        return data.longest_text(base.tokenizer, pair, cfg.reviser.template) <= longest

    pairs, counts = data.revision_pairs(it.records("rankings", cfg.reviser.rankings, of=RankedResponses), fits)
    it.value("pairs_counts", lambda: counts)
    if not any(pair.gap for pair in pairs):
        raise ValueError(
            f"the rankings give no pair of a better and a worse response ({counts}), so there is nothing to learn to "
            "revise; look at the counts, or raise max_length"
        )
    return pairs


def absent(t: int) -> list[Prompt]:
    """In place of a stage that an earlier round has done."""
    raise RunError(f"the prompts of iteration {t} are gone; put iter_{t}/prompts.jsonl back, or begin a new run")


def prompts_of(cfg: Config, it: Scope, t: int) -> list[Prompt]:
    """An equal part of the prompts that no round has had, none of them held out."""
    earlier = [p for s in range(1, t) for p in it.run.at(f"iter_{s}").records("prompts", absent, s, of=Prompt)]
    held_out = frozenset(prompt.text for prompt in cfg.held_out()) if cfg.held_out is not None else frozenset[str]()
    return next_part(cfg.prompts, earlier, cfg.iterations - t + 1, held_out)


def drafter(cfg: Config, round: Round, source: LM, it: Scope) -> Callable[[Sequence[Prompt]], list[Response]]:
    """The stage that samples the drafts."""
    settings = cfg.sampling.settings | {"num_samples": round.num_samples}
    return lambda prompts: generate(source, prompts, key=it.key("drafts"), **settings)


def chooser(
    cfg: Config, round: Round, reviser: LM, drafts: Sequence[Response], it: Scope
) -> Callable[[Sequence[Prompt]], list[Revision]]:
    """The stage that makes targets of all drafts to each prompt."""
    by_prompt: dict[str, list[Response]] = {}
    for draft in drafts:
        by_prompt.setdefault(draft.prompt_id, []).append(draft)

    def choose(prompts: Sequence[Prompt]) -> list[Revision]:
        part = [draft for prompt in prompts for draft in by_prompt[prompt.id]]
        of = cfg.reviser
        return round.target(reviser, prompts, part, of.template, of.writing, it.key("revisions"))

    return choose


def held_out_share(cfg: Config, policy: LM, reviser: LM, it: Scope) -> float | None:
    """The share of pi_t's responses to the held-out prompts that the reviser would keep."""
    assert cfg.held_out is not None
    prompts = cfg.held_out()
    settings = cfg.sampling.settings | {"num_samples": 1}
    # The same noise in every round: what changes is the policy.
    responses = generate(policy, prompts, key=it.run.at("iter_0").key("held_out"), **settings)
    labelled = reviselib.labelled_drafts(reviser, prompts, responses, cfg.reviser.template, cfg.reviser.writing)
    return reviselib.keep_share(labelled, cfg.reviser.template)


def stops(shares: Sequence[float | None]) -> bool:
    """Whether the newest NO share is not above the one before."""
    now, before = shares[-1], shares[-2] if len(shares) > 1 else None
    return now is not None and before is not None and now <= before


def summarise(
    cfg: Config, run: Run, t: int | Literal["base"], it: Scope, policy: LM, reviser: LM, **counts: Any
) -> float | None:
    """Evaluates pi_t, writes its line of summary.json and gives its NO share on the held-out prompts."""
    figures = it.value("evaluation", cfg.evaluate, policy, cfg, it, reviser) if cfg.evaluate is not None else {}
    share = None
    if cfg.held_out is not None and t != "base":
        share = it.value("held_out_share", held_out_share, cfg, policy, reviser, it)
    semantics = {"init_from": "pi_{t-1}", "reference": "none", "data": "current", "optimizer": "reset"}
    report(run, it, t, policy, figures, method="seft", semantics=semantics, no_share=share, **counts)
    return share
