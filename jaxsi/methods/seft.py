"""SEFT, self-evolution fine-tuning (Chen et al. 2024, arXiv 2406.10813), reconstructed from its abstract and summaries.

    D_r = (x, y_l, y_h)  ranked responses;  P_R a reviser;  l in {MAJOR, MINOR, NO}
    A  warm-up reviser    minimise  -log P_R(y_h | x, y_l)
    B  p = exp(-(1/|y_h|) log P_R(y_h | x, y_l))      l = MAJOR if p > tau, else MINOR; NO if y is the best of x
       adaptive reviser   minimise  -log P_R(l | x, y) - log P_R(y_t | x, y, l)     y_t = y_h; under NO, y itself
    C  for t = 1 .. T:
           y ~ pi_{t-1}(. | x)                                  x: fresh unlabelled prompts
           internal:  target = the y of N with the greatest P_R(NO | x, y)
           external:  l, y+ = R(x, y);  target = y if l is NO, else y+      R: P_R, or a stronger reviser
           pi_t = SFT(pi_{t-1}, (x, target))
       until there is evidence that the share of NO among pi_t's responses to held-out prompts falls, or none that it
       still rises; the result is the pi_t with the greatest share

The body of the paper could not be read. The abstract has: the adaptive reviser, which lifts poor responses and leaves
good ones alone; the policy that is fine-tuned, step by step, on what it makes of unlabelled prompts. Summaries of the
text have: D_r, the two phases, that revision labels exist and that the difficulty of a revision is measured, internal
evolution (within the policy's own response space) before external evolution (a stronger space). Recalled, without a
source: the label strings, and that a perplexity threshold chooses among them. Reconstructed, so this project's: the
median as tau, the mix of labels, that the adaptive reviser starts from the warm-up one, the label as the likeliest
whole string, the targets of the rounds, the stopping rule, and all hyper-parameters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxsi.lm import LM, borrowed, load
from jaxsi.methods.lifecycle import begin, iteration_of, keep, report, same_model
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_snapshot import may_move, stored_as, was
from jaxsi.runs.records import Prompt, RankedResponses, Response, Revision, SFTExample
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig, generate, sample
from jaxsi.stages import reviser as revisers
from jaxsi.stages.answers import answers, read_answers
from jaxsi.stages.evolution import Kept, best_round, stops
from jaxsi.stages.prompts.reviser import ReviserTemplate, load_reviser_template
from jaxsi.stages.reviser import ReviseConfig
from jaxsi.stages.reviser_data import (
    LabelConfig,
    RevisionPair,
    label_pairs,
    label_statistics,
    longest_text,
    reviser_examples,
    revision_pairs,
    warm_up_examples,
)
from jaxsi.stages.self_instruct import PromptFile, next_part, prompt_source
from jaxsi.text.chat_config import ChatConfig
from jaxsi.training.train import TrainConfig, seed_of, sft


@stored_as("methods.seft.ReviserConfig")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReviserConfig:
    """The reviser: ``rankings`` gives D_r, ``model`` its weights before phase A (None: those of the run's model),
    ``warm_up`` and ``adaptive`` train phases A and B. ``evaluate(reviser, config, scope)`` gives its own figures."""

    rankings: Callable[[], list[RankedResponses]]
    model: str | None = dataclasses.field(
        default=None, metadata=may_move(identity="warm_reviser/model.json", made="warm_reviser/*")
    )
    template: ReviserTemplate = load_reviser_template()
    warm_up: TrainConfig
    labels: LabelConfig = LabelConfig()
    adaptive: TrainConfig
    writing: ReviseConfig = ReviseConfig()
    evaluate: Callable[..., dict[str, Any]] | None = None


@stored_as("methods.seft.Round")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """What an evolution round learns: ``target`` is ``reviser.best_of_n``, ``reviser.revise`` or another function of
    their signature; ``num_samples`` drafts to each prompt come from the model ``drafts`` (None: from the policy).

    ``reviser``: a model that is an adaptive reviser already, such as RUN/reviser/checkpoint of a SEFT run with the same
    template (None: the run's own). A stronger one makes an external round leave the policy's own response space.
    """

    target: Callable[..., list[Revision]]
    num_samples: int = 1
    drafts: str | None = None
    reviser: str | None = dataclasses.field(default=None, metadata=may_move())

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; a round needs at least 1 draft to each prompt")


@stored_as("methods.seft.Stopping")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopping:
    """When evolution stops: by the rule of `evolution.stops`, with this ``patience``. The run's own reviser labels a
    response of each policy to each of ``held_out`` (None: every round runs, and the newest policy is the result)."""

    held_out: Callable[[], list[Prompt]] | None = dataclasses.field(default=None, metadata=was("held_out"))
    patience: int = 2

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}; evolution needs at least 1 round before it may stop")


@stored_as("methods.seft.Config")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. The first ``internal_rounds`` of ``iterations`` rounds are ``internal``, the
    others ``external``; each trains by ``sft``. ``start``, if given, trains the policy before evolution on
    ``demonstrations``. New prompts are never among the held-out ones of ``stop``.

    ``evaluate(policy, config, scope, reviser)`` gives the figures of an iteration's summary.
    """

    model: str = dataclasses.field(metadata=may_move())
    reviser: ReviserConfig
    prompts: PromptFile | Callable[[], list[Prompt]]
    stop: Stopping = Stopping()
    demonstrations: Callable[[], list[SFTExample]] | None = None
    start: TrainConfig | None = None
    sampling: SamplingConfig = SamplingConfig(temperature=1.0, top_p=1.0)
    internal: Round = dataclasses.field(
        default=Round(target=revisers.best_of_n, num_samples=4),
        metadata=may_move("drafts", identity="iter_0/internal_drafts.json", made="iter_*/drafts*"),
    )
    external: Round = dataclasses.field(
        default=Round(target=revisers.revise),
        metadata=may_move("drafts", identity="iter_0/external_drafts.json", made="iter_*/drafts*"),
    )
    internal_rounds: int = 1
    sft: TrainConfig
    evaluate: Callable[..., dict[str, Any]] | None = None
    chat: ChatConfig = ChatConfig()
    mesh: MeshConfig = MeshConfig()
    iterations: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", prompt_source(self.prompts))
        if self.iterations < 1 or self.internal_rounds < 0:
            raise ValueError(
                f"iterations is {self.iterations} (at least 1) and internal_rounds {self.internal_rounds} (at least 0)"
            )
        if (self.start is None) != (self.demonstrations is None):
            raise ValueError("start and demonstrations go together: give both, or neither for a policy as given")


def seft(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns the policy of the best round."""
    base = begin(cfg, run)
    policy = first_policy(cfg, base, run)  # pi_0
    reviser = adaptive_reviser(cfg, base, run)  # A, B: P_R
    kept = [summarise(cfg, run, 0, policy, reviser)]
    summarise(cfg, run, "base", base, reviser)

    for t in range(1, cfg.iterations + 1):  # C
        it = run.at(f"iter_{t}")
        round = cfg.internal if t <= cfg.internal_rounds else cfg.external
        prompts, _ = it.counted("prompts", next_prompts, cfg, run, t, of=Prompt)  # x
        drafts = drafts_of(cfg, round, policy, prompts, it)  # y
        revisions = revisions_of(cfg, round, reviser, prompts, drafts, it)  # l, y+
        counts = it.value("targets_counts", revisers.revision_statistics, drafts, revisions, cfg.reviser.template)
        targets = it.records("targets", revisers.targets, prompts, revisions, of=SFTExample)
        policy = sft(policy, targets, cfg.sft, it)  # pi_t
        kept.append(summarise(cfg, run, t, policy, reviser, targets=len(targets), revisions=counts))
        if stopped(cfg, kept):
            break

    newest = len(kept) - 1
    best = newest if cfg.stop.held_out is None else best_round(kept)
    run.update_summary({"rounds": newest, "stopped": stopped(cfg, kept), "best": best})
    return policy if best == newest else iteration_of(policy, run, best)


def stopped(cfg: Config, kept: Sequence[Kept]) -> bool:
    """Whether evolution ends after the newest round. Internal rounds are never the reason to skip external ones."""
    first = cfg.internal_rounds + 1 if cfg.internal_rounds < cfg.iterations else 1
    return cfg.stop.held_out is not None and stops(kept, first=first, patience=cfg.stop.patience)


def first_policy(cfg: Config, base: LM, run: Run) -> LM:
    """pi_0: the model as given, or after SFT on demonstrations."""
    it = run.at("iter_0")
    if cfg.start is None or cfg.demonstrations is None:
        return keep(base, it)
    return sft(base, it.records("demonstrations", cfg.demonstrations, of=SFTExample), cfg.start, it)


def adaptive_reviser(cfg: Config, base: LM, run: Run) -> LM:
    """Phases A and B: a warm-up reviser on (x, y_l) -> y_h, then one that says first how much it will change."""
    reviser, template = cfg.reviser, cfg.reviser.template
    start = base if reviser.model is None else load(reviser.model, base.mesh, base.dtype, weights_dtype="float32")
    it = run.at("warm_reviser")
    if reviser.model is not None:
        same_model(it, "model", reviser.model, start)
    rankings = it.records("rankings", reviser.rankings, of=RankedResponses)
    pairs, _ = it.counted("pairs", fitting_pairs, cfg, start, rankings, of=RevisionPair)  # D_r
    warm = sft(start, warm_up_examples(pairs, template), reviser.warm_up, it)

    it = run.at("reviser")
    labelled = it.records("labels", label_pairs, warm, pairs, template, reviser.labels, of=RevisionPair)
    counts = it.value("labels_counts", label_statistics, labelled, template)
    examples = reviser_examples(labelled, template, reviser.labels.mix, seed_of(it, "mix"))
    adaptive = sft(warm, examples, reviser.adaptive, it)
    figures = it.value("evaluation", reviser.evaluate, adaptive, cfg, it) if reviser.evaluate is not None else {}
    run.update_summary({"reviser": {"labels": counts, **figures, "seconds": it.seconds()}})
    return adaptive


def fitting_pairs(
    cfg: Config, start: LM, rankings: Sequence[RankedResponses]
) -> tuple[list[RevisionPair], dict[str, int]]:
    """D_r, without what is empty, equal or too long for the models and for training; and the counts."""
    longest = min(start.config.max_positions, cfg.reviser.warm_up.max_length, cfg.reviser.adaptive.max_length)

    def fits(pair: RevisionPair) -> bool:
        return longest_text(start.tokenizer, pair, cfg.reviser.template) <= longest

    pairs, counts = revision_pairs(rankings, fits)
    if not any(pair.gap for pair in pairs):
        raise ValueError(
            f"the rankings give no pair of a better and a worse response ({counts}), so there is nothing to learn to "
            "revise; look at the counts, or raise max_length"
        )
    return pairs, counts


def next_prompts(cfg: Config, run: Run, t: int) -> tuple[list[Prompt], dict[str, int]]:
    """An equal part of the prompts that no round has had, none of them held out; and how many there are."""
    earlier = [p for s in range(1, t) for p in run.at(f"iter_{s}").finished("prompts", of=Prompt)]
    texts = frozenset(prompt.text for prompt in held_out_prompts(cfg.stop, run))
    prompts = next_part(cfg.prompts, earlier, cfg.iterations - t + 1, texts)
    return prompts, {"kept": len(prompts)}


def drafts_of(cfg: Config, round: Round, policy: LM, prompts: Sequence[Prompt], it: Scope) -> list[Response]:
    """y: drafts of the policy, or of the model that the round takes them from."""
    model = policy if round.drafts is None else borrowed(round.drafts, cfg.sampling.dtype, policy.mesh)
    if round.drafts is not None:
        same_model(it.run.at("iter_0"), f"{kind(cfg, round)}_drafts", round.drafts, model)
    config = dataclasses.replace(cfg.sampling, num_samples=round.num_samples)
    return it.sharded("drafts", prompts, sample, model, config, it.key("drafts"), of=Response, by=model)


def revisions_of(
    cfg: Config, round: Round, own: LM, prompts: Sequence[Prompt], drafts: Sequence[Response], it: Scope
) -> list[Revision]:
    """l and y+: what the reviser makes of the drafts, the run's own one or the one that the round borrows."""
    reviser = own if round.reviser is None else borrowed(round.reviser, cfg.sampling.dtype, own.mesh)
    if round.reviser is not None:
        same_model(it.run.at(f"{kind(cfg, round)}_reviser"), "model", round.reviser, reviser)
    return it.sharded(
        "revisions", answers(prompts, drafts), read_answers, round.target, reviser, cfg.reviser.template,
        cfg.reviser.writing, it.key("revisions"), of=Revision,
    )  # fmt: skip


def kind(cfg: Config, round: Round) -> str:
    """The round's field in the config, which is part of the names of its files."""
    return "internal" if round is cfg.internal else "external"


def held_out_prompts(stop: Stopping, run: Run) -> list[Prompt]:
    """The prompts on which evolution stops, as they were when the run began; there may be none."""
    if stop.held_out is None:
        return []
    return run.at("iter_0").records("stop_held_out", stop.held_out, of=Prompt)


def labelled_held_out(cfg: Config, policy: LM, reviser: LM, run: Run) -> list[Revision]:
    """pi_t's responses to the held-out prompts, with the reviser's labels."""
    prompts = held_out_prompts(cfg.stop, run)
    settings = cfg.sampling.settings | {"num_samples": 1}
    # The same noise in every round: what changes is the policy.
    responses = generate(policy, prompts, key=run.at("iter_0").key("held_out"), **settings)
    return revisers.labelled_drafts(reviser, prompts, responses, cfg.reviser.template, cfg.reviser.writing)


def summarise(cfg: Config, run: Run, t: int | Literal["base"], policy: LM, reviser: LM, **counts: Any) -> Kept:
    """Reports pi_t, and says to which of the held-out prompts the reviser would keep its response."""
    # Without SFT on demonstrations pi_0 is the model as given, which is measured once.
    it = run.at(f"iter_{t}" if t != "base" else "iter_0" if cfg.start is None else "base")
    labelled: list[Revision] = []
    if cfg.stop.held_out is not None and t != "base":
        labelled = it.records("held_out", labelled_held_out, cfg, policy, reviser, run, of=Revision)
    share = revisers.keep_share(labelled, cfg.reviser.template)
    report(cfg, run, it, t, policy, reviser, no_share=share, **counts)
    return {r.prompt_id: r.label == cfg.reviser.template.no for r in labelled if r.label is not None}
