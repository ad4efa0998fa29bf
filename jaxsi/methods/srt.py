"""SRT: self-refinement tuning (Hu et al. 2024, arXiv 2406.07168): a critic's feedback in words, then the model's.

    Stage 1, from a stronger critic                                          x_i of the first prompts
        y_i       ~ M_base(. | x_i)
        f_i, r_i  ~ M_critic(. | x_i, y_i)      weaknesses, suggestions, a score; the improved response
        r_i is refined in the same way again, if there are several rounds: the r_i with the best score is taken
        keep i if f_i is complete and score(r_i) >= score(y_i), two independent calls of the critic
        M_self    = argmin  -(1/N) sum_i log P(y_i, f_i, r_i | x_i)          only x is masked
    Stage 2, from its own feedback                                           x_j of the other prompts
        y'_j ~ M_self(. | x_j);   f'_j, r'_j ~ M_self(. | x_j, y'_j)         r', f' at temperature 0
        keep j if score(r'_j) > score(y'_j), two independent calls of M_self
        M    = DPO(M_self, r'_j over y'_j, reference M_self)

At inference y -> f -> r is one sequence, and r is the response. In stage 1's format y is followed by the beginning of
feedback, only r by an end of turn: so both sides of a pair end where feedback begins, or DPO would teach the model to
stop after its first response. Scores are those that feedback ends in. The paper's constants are in configs/srt/; it
does not state stage 2's batch, lengths and optimizer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxsi.lm import LM, borrowed
from jaxsi.methods.lifecycle import begin, report, same_model
from jaxsi.model.mesh import MeshConfig
from jaxsi.runs.config_snapshot import may_move, stored_as, was
from jaxsi.runs.records import Critique, PreferencePair, Prompt, Response, SFTExample
from jaxsi.runs.run import Run, Scope
from jaxsi.sampling.generate import SamplingConfig, sample
from jaxsi.stages.answers import answers, read_answers
from jaxsi.stages.critique import (
    CritiqueConfig,
    best_refinements,
    check_same_critic,
    continue_critique,
    continue_score,
    has_all_parts,
    improved_responses,
    mean_scores,
    read_drafts,
    refinement_examples,
    refinement_pairs,
)
from jaxsi.stages.prompts.critique import CritiqueTemplate, load_critique_template
from jaxsi.stages.self_instruct import PromptFile, prompt_source, read_source
from jaxsi.text.chat_config import ChatConfig
from jaxsi.training.train import DPOConfig, TrainConfig, dpo, sft


@stored_as("methods.srt.FirstStage")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstStage:
    """Where stage 1 departs from its plainest form.

    ``drafts``: the model that writes y (None: the run's own). In the paper the 7B writes it for every size. ``rounds``
    of refinement by the critic, which is asked ``rounds`` + 1 times a prompt: the paper tried up to four, and one was
    enough. ``refinement_only`` trains on x -> r, an ablation; ``template.parts`` are the others.
    """

    drafts: str | None = dataclasses.field(default=None, metadata=may_move())
    rounds: int = 1
    refinement_only: bool = dataclasses.field(default=False, metadata=was("refinement_only"))

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"first_stage.rounds is {self.rounds}; the critic refines at least once")


@stored_as("methods.srt.Config")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run. The critic sees the first ``critic_prompts`` prompts, stage 2 has the others.

    ``critic(prompts, responses, template, key)`` gives critiques (``stages.critique``). ``dpo`` None: stage 1 alone.
    ``scoring(prompts, drafts, refined, template)``, if given, gives the scores of both in the model's place
    (``judges.ScoringBy``, and the control arms), and ``direction(pairs, seed)`` may turn pairs round.
    """

    model: str = dataclasses.field(metadata=may_move())
    prompts: PromptFile | Callable[[], list[Prompt]]
    critic_prompts: int
    critic: Callable[..., list[Critique]]
    template: CritiqueTemplate = load_critique_template()
    first_stage: FirstStage = FirstStage()
    sampling: SamplingConfig = SamplingConfig(num_samples=1, temperature=0.7, top_p=1.0)
    critique: CritiqueConfig = CritiqueConfig()
    sft: TrainConfig
    dpo: DPOConfig | None
    scoring: Callable[..., tuple[list[float | None], list[float | None]]] | None = None
    direction: Callable[..., list[PreferencePair]] | None = None
    evaluate: Callable[..., dict[str, Any]] | None = None
    chat: ChatConfig = ChatConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", prompt_source(self.prompts))
        if self.critic_prompts < 1 or self.sampling.num_samples != 1:
            raise ValueError(
                f"critic_prompts is {self.critic_prompts} (at least 1), sampling.num_samples "
                f"{self.sampling.num_samples} (1: each prompt has one draft)"
            )
        if self.dpo is not None:
            self.dpo.check_single_round()


def srt(cfg: Config, run: Run) -> LM:
    """Runs, or goes on with, the whole method; returns the final model (M_self without stage 2)."""
    base = begin(cfg, run)  # M_base
    summarise(cfg, run, "base", base)
    prompts = run.at("iter_0").records("prompts", read_source, cfg.prompts, of=Prompt)
    first, others = prompts[: cfg.critic_prompts], prompts[cfg.critic_prompts :]

    it = run.at("iter_0")
    drafts = first_drafts(cfg, base, first, it)  # y
    finished = [draft for draft in drafts if draft.finish_reason == "stop" and draft.text.strip()]
    critiques = it.sharded(
        "critiques", finished, read_drafts, cfg.critic, first, cfg.template, it.key("critiques"), of=Critique
    )  # f, r
    check_same_critic(cfg.critic, critiques)
    rounds = refined_in_rounds(cfg, base, first, critiques, it)  # score(r), by round
    scores = mean_scores(critiques, rounds)
    critiques, checks = best_refinements(critiques, rounds)
    examples, counts = it.counted(
        "examples", learnable, cfg, prompts=first, drafts=drafts, critiques=critiques, checks=checks, of=SFTExample
    )
    model = sft(base, examples, cfg.sft, it)  # M_self
    summarise(cfg, run, 0, model, examples=counts, critic_scores=scores)
    if cfg.dpo is None:
        return model

    it = run.at("iter_1")
    drafts = it.sharded(
        "drafts", others, sample, model, cfg.sampling, it.key("drafts"), cfg.template.feedback, of=Response, by=model
    )  # y'
    critiques = it.sharded(
        "critiques", answers(others, drafts), read_answers, continue_critique, model, cfg.template, cfg.critique,
        it.key("critiques"), of=Critique,
    )  # f', r'  # fmt: skip
    refined = improved_responses(model.tokenizer, critiques, cfg.template, marked=True)
    checks = it.sharded(
        "checks", answers(others, refined), read_answers, continue_score, model, cfg.template, cfg.critique,
        it.key("checks"), of=Critique,
    )  # score(r')  # fmt: skip
    pairs, counts = it.counted(
        "pairs", better_refinements, cfg, prompts=others, drafts=drafts, critiques=critiques, refined=refined,
        checks=checks, of=PreferencePair,
    )  # fmt: skip
    if cfg.direction is not None:
        pairs = cfg.direction(pairs, cfg.seed)
    model = dpo(model, pairs, cfg.dpo, it)  # M
    summarise(cfg, run, 1, model, pairs=counts["pairs"], ties=counts["ties"], counts=counts)
    return model


def first_drafts(cfg: Config, base: LM, prompts: Sequence[Prompt], it: Scope) -> list[Response]:
    """Stage 1's drafts, by the base model or by the one that is named for them."""
    path, model = cfg.first_stage.drafts, base
    if path is not None:
        model = borrowed(path, cfg.sampling.dtype, base.mesh)
        same_model(it, "draft_model", path, model)
    return it.sharded("drafts", prompts, sample, model, cfg.sampling, it.key("drafts"), of=Response, by=model)


def refined_in_rounds(
    cfg: Config, base: LM, prompts: Sequence[Prompt], critiques: Sequence[Critique], it: Scope
) -> list[list[Critique]]:
    """The critic's critiques of the refined responses of each round, which a call of its own makes: each has the score
    of its response, and the refined response of the next round."""
    rounds: list[list[Critique]] = []
    for number in range(1, cfg.first_stage.rounds + 1):
        complete = [critique for critique in (rounds[-1] if rounds else critiques) if has_all_parts(critique)]
        refined = improved_responses(base.tokenizer, complete, cfg.template, marked=False)
        name = "checks" if number == 1 else f"checks_{number}"
        checks = it.sharded(name, refined, read_drafts, cfg.critic, prompts, cfg.template, it.key(name), of=Critique)
        check_same_critic(cfg.critic, [*critiques, *checks])
        rounds.append(checks)
    return rounds


def learnable(cfg: Config, **records: Any) -> tuple[list[SFTExample], dict[str, int]]:
    """Stage 1's examples by the paper's filters, and the counts; an error if no example is left."""
    examples, counts = refinement_examples(
        **records, template=cfg.template, refinement_only=cfg.first_stage.refinement_only
    )
    if not examples:
        advice = "look at critiques.jsonl: does the critic follow the template?"
        if counts["empty"] == counts["drafts"]:
            advice = "all drafts are empty, or cut off by the token limit; raise sampling.max_new_tokens, in a new run"
        raise ValueError(f"none of the critic's {counts['drafts']} critiques can be learnt from ({counts}); {advice}")
    return examples, counts


def better_refinements(
    cfg: Config,
    *,
    prompts: Sequence[Prompt],
    drafts: Sequence[Response],
    critiques: Sequence[Critique],
    refined: Sequence[Response],
    checks: Sequence[Critique],
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Stage 2's pairs, by the model's own scores or those of ``cfg.scoring``, and the counts."""
    if cfg.scoring is None:
        before, after = [critique.score for critique in critiques], [check.score for check in checks]
    else:
        before, after = cfg.scoring(prompts, drafts, refined, cfg.template)
    return refinement_pairs(prompts, drafts, critiques, refined, before, after)


def summarise(cfg: Config, run: Run, t: int | Literal["base"], model: LM, **counts: Any) -> None:
    """Reports a model; the base model's responses are not refined."""
    it = run.at("base" if t == "base" else f"iter_{t}")
    report(cfg, run, it, t, model, t != "base", figures=("first", "feedback_rate", "reranked"), **counts)
