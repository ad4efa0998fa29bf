"""SRT: self-refinement tuning (Hu et al. 2024, arXiv 2406.07168): a critic's language feedback, then one's own.

    Stage 1, from a stronger critic                                          x_i of the first prompts
        y_i       ~ M_base(. | x_i)
        f_i, r_i  ~ M_critic(. | x_i, y_i)      weaknesses, suggestions, a score; the improved response
        keep i where f_i is complete and score(r_i) >= score(y_i), two independent calls of the critic
        M_self    = argmin  -(1/N) sum_i log P(y_i, f_i, r_i | x_i)          only x is masked
    Stage 2, from its own feedback                                           x_j of the other prompts
        y'_j ~ M_self(. | x_j);   f'_j, r'_j ~ M_self(. | x_j, y'_j)         r', f' at temperature 0
        keep j where score(r'_j) > score(y'_j), two independent calls of M_self
        M    = DPO(M_self, r'_j over y'_j, reference M_self)

At inference y -> f -> r is one sequence, and r is the response. In stage 1's format y is followed by the beginning of
feedback, only r by an end of turn: so both sides of a pair end where feedback begins, or DPO would teach the model to
stop after its first response. Scores are those that feedback ends in. The paper's constants are in configs/srt/; it
does not state stage 2's batch, lengths and optimizer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from jaxsi.lm import LM
from jaxsi.methods.lifecycle import begin, report
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.records import Critique, PreferencePair, Prompt, Response, SFTExample
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig, check_sampled_by, generate
from jaxsi.stages.critique import (
    CritiqueConfig,
    continue_critique,
    improved_responses,
    is_complete,
    loaded,
    refinement_examples,
    refinement_pairs,
)
from jaxsi.stages.endpoint import EndpointCritic
from jaxsi.stages.prompts.critique import CritiqueTemplate, load_critique_template
from jaxsi.stages.self_instruct import PromptFile, read_source
from jaxsi.training.train import DPOConfig, TrainConfig, dpo, sft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. The critic sees the first ``critic_prompts`` prompts, stage 2 has the others.

    ``critic(prompts, responses, template, key)`` gives critiques (``stages.critique``). ``refinement_only`` trains
    stage 1 on x -> r, an ablation; ``template.parts`` are the others. ``dpo`` None: stage 1 alone. ``scoring(prompts,
    responses, template)``, where given, scores stage 2's responses in the model's place, and ``direction(pairs, seed)``
    may turn pairs round: the control arms.
    """

    model: str
    prompts: PromptFile | Callable[[], list[Prompt]]
    critic_prompts: int
    critic: Callable[..., list[Critique]]
    template: CritiqueTemplate = load_critique_template()
    refinement_only: bool = False
    sampling: SamplingConfig = SamplingConfig(num_samples=1, temperature=0.7, top_p=1.0)
    critique: CritiqueConfig = CritiqueConfig()
    sft: TrainConfig
    dpo: DPOConfig | None
    scoring: Callable[..., list[float | None]] | None = None
    direction: Callable[..., list[PreferencePair]] | None = None
    evaluate: Callable[..., dict[str, Any]] | None = None
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    RESUMABLE: ClassVar[frozenset[str]] = frozenset(
        {"sft.log_every", "dpo.train.log_every", *(f"critic.{name}" for name in EndpointCritic.RESUMABLE)}
    )
    ARM_FIELDS: ClassVar[frozenset[str]] = frozenset({"dpo", "scoring", "direction"})
    SHARED: ClassVar[tuple[str, ...]] = ("base", "iter_0")

    def __post_init__(self) -> None:
        if self.critic_prompts < 1 or self.sampling.num_samples != 1:
            raise ValueError(
                f"critic_prompts is {self.critic_prompts} (at least 1), sampling.num_samples "
                f"{self.sampling.num_samples} (1: each prompt has one draft)"
            )


def srt(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns the final model (M_self without stage 2)."""
    training = None if cfg.dpo is None else cfg.dpo.train
    base = begin(run, cfg.model, cfg.mesh, cfg.sampling.dtype, cfg.sft, training)  # M_base
    summarise(cfg, run, "base", run.at("base"), base)
    prompts = run.at("iter_0").records("prompts", read_source, cfg.prompts, of=Prompt)
    learnt, own = prompts[: cfg.critic_prompts], prompts[cfg.critic_prompts :]

    it = run.at("iter_0")
    drafts = it.sharded("drafts", learnt, sampler(cfg, base, it, stop_text=None), of=Response)  # y
    check_sampled_by(base, drafts)
    shown = [draft for draft in drafts if draft.finish_reason == "stop" and draft.text.strip()]
    critiques = it.sharded("critiques", shown, critic(cfg, learnt, it, "critiques"), of=Critique)  # f, r
    complete = [c for c in critiques if is_complete(c)]
    refined = improved_responses(base.tokenizer, complete, cfg.template, marked=False)
    checks = it.sharded("checks", refined, critic(cfg, learnt, it, "checks"), of=Critique)  # score(r)
    learnable = (learnt, drafts, critiques, checks, cfg.template)
    examples = it.records("examples", examples_of, cfg, *learnable, of=SFTExample)
    counts = it.value("examples_counts", lambda: examples_and_counts(cfg, *learnable)[1])
    base.release()
    loaded.cache_clear()  # a local critic
    model = sft(base, examples, cfg.sft, it)  # M_self
    summarise(cfg, run, 0, it, model, examples=counts)

    if cfg.dpo is not None:
        it = run.at("iter_1")
        drafts = it.sharded("drafts", own, sampler(cfg, model, it, stop_text=cfg.template.feedback), of=Response)  # y'
        check_sampled_by(model, drafts)
        critiques = it.sharded("critiques", drafts, own_critic(cfg, model, own, it, "critiques"), of=Critique)  # f', r'
        refined = improved_responses(model.tokenizer, critiques, cfg.template, marked=True)
        checks = it.sharded("checks", refined, own_critic(cfg, model, own, it, "checks"), of=Critique)  # score(r')
        comparable = (own, drafts, critiques, refined, checks)
        pairs = it.records("pairs", pairs_of, cfg, *comparable, of=PreferencePair)
        counts = it.value("pairs_counts", lambda: pairs_and_counts(cfg, *comparable)[1])
        if cfg.direction is not None:
            pairs = cfg.direction(pairs, cfg.seed)
        model = dpo(model, pairs, cfg.dpo, it)
        summarise(cfg, run, 1, it, model, pairs=counts["pairs"], ties=counts["ties"], counts=counts)

    run.update_summary({"status": "complete"})
    return model


def sampler(cfg: Config, model: LM, it: Scope, stop_text: str | None) -> Callable[[Sequence[Prompt]], list[Response]]:
    """The stage that drafts a response to each prompt; M_self's end where its feedback begins."""
    return lambda part: generate(model, part, key=it.key("drafts"), stop_text=stop_text, **cfg.sampling.settings)


def critic(
    cfg: Config, prompts: Sequence[Prompt], it: Scope, name: str
) -> Callable[[Sequence[Response]], list[Critique]]:
    """The stage in which the stronger critic reads each response by itself."""
    return lambda part: cfg.critic(prompts, part, cfg.template, it.key(name))


def own_critic(
    cfg: Config, model: LM, prompts: Sequence[Prompt], it: Scope, name: str
) -> Callable[[Sequence[Response]], list[Critique]]:
    """The stage in which the model goes on after each response: with feedback and a better one, or its score alone."""
    score_only = name == "checks"
    return lambda part: continue_critique(
        model, prompts, part, cfg.template, cfg.critique, it.key(name), score_only=score_only
    )


def examples_and_counts(cfg: Config, *records: Any) -> tuple[list[SFTExample], dict[str, int]]:
    """Stage 1's examples by the paper's filters; an error where none is left."""
    examples, counts = refinement_examples(*records, refinement_only=cfg.refinement_only)
    if not examples:
        raise ValueError(
            f"none of the critic's {counts['drafts']} critiques can be learnt from ({counts}); look at "
            "critiques.jsonl: does the critic follow the template?"
        )
    return examples, counts


def examples_of(cfg: Config, *records: Any) -> list[SFTExample]:
    return examples_and_counts(cfg, *records)[0]


def pairs_and_counts(
    cfg: Config,
    prompts: Sequence[Prompt],
    drafts: Sequence[Response],
    critiques: Sequence[Critique],
    refined: Sequence[Response],
    checks: Sequence[Critique],
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Stage 2's pairs, by the model's own scores or those of ``cfg.scoring``."""
    if cfg.scoring is None:
        before, after = [c.score for c in critiques], [check.score for check in checks]
    else:
        before, after = (cfg.scoring(prompts, responses, cfg.template) for responses in (drafts, refined))
    return refinement_pairs(prompts, drafts, critiques, refined, before, after)


def pairs_of(cfg: Config, *records: Any) -> list[PreferencePair]:
    return pairs_and_counts(cfg, *records)[0]


def summarise(cfg: Config, run: Run, t: int | Literal["base"], it: Scope, model: LM, **counts: Any) -> None:
    """Evaluates a model and writes its line of summary.json; the base model's responses are not refined."""
    figures = it.value("evaluation", cfg.evaluate, model, cfg, it, t != "base") if cfg.evaluate is not None else {}
    semantics = {"init_from": "iteration 0", "reference": "iteration 0", "data": "current", "optimizer": "reset"}
    extra = {name: figures[name] for name in ("first", "feedback_rate", "reranked") if name in figures}
    report(run, it, t, model, figures, method="srt", semantics=semantics, **extra, **counts)
