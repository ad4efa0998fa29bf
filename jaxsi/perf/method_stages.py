"""What a config will do, in numbers: for each stage of its method, how much goes through which program, and which
models are in memory at that time. The stages are in the same order as in the method's own file.

Data are not read: if the config does not say how many prompts or examples there are, or how long, `Assumptions` does.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxsi.evals.held_out import Evaluations, HeldOutWinRate, everyday_prompts
from jaxsi.evals.ifeval import PROMPTS as IFEVAL_PROMPTS, IFEval
from jaxsi.methods import cream, grpo, meta_rewarding, online_dpo, pit, seft, self_rewarding, spin, srt, temporal
from jaxsi.perf.planned_stages import (
    CHARACTERS_PER_TOKEN,
    PLANNED_DTYPE,
    SCORE_TOKENS,
    SHARD,
    Assumptions,
    Held,
    Objective,
    Scoring,
    Stage,
    StagePlan,
    Training,
    judge_settings,
)
from jaxsi.runs.config_snapshot import with_dtypes
from jaxsi.runs.errors import InputError
from jaxsi.stages import judge
from jaxsi.stages.critique import LocalCritic
from jaxsi.stages.meta_judge import compare_judgments
from jaxsi.stages.prompts import Rubric
from jaxsi.stages.self_instruct import PromptFile, SelfInstruct
from jaxsi.training.ppo import ppo
from jaxsi.training.rl import RLConfig


def stages(cfg: Any, assumptions: Assumptions, max_positions: int) -> list[Stage]:
    """The stages of a method's config, in order."""
    plan = StagePlan(with_dtypes(cfg, lambda _: PLANNED_DTYPE), assumptions, max_positions)
    return [*_of_method(plan), *_evaluation(plan)]


def _of_method(plan: StagePlan) -> Iterator[Stage]:
    match cfg := plan.cfg:
        case self_rewarding.Config() | meta_rewarding.Config():
            return _self_rewarding(plan)
        case srt.Config():
            return _srt(plan)
        case seft.Config():
            return _seft(plan)
        case pit.Config():
            return _pit(plan)
        case spin.Config():
            return _spin(plan)
        case grpo.Config() | online_dpo.Config():
            return _judged_rl(plan)
        case cream.Config():
            return _cream(plan)
        case temporal.Config():
            return _temporal(plan)
    raise InputError(
        f"{type(cfg).__module__}.{type(cfg).__name__} is not the Config of a method of this package; a plan knows the "
        "stages of these methods alone"
    )


def iterations(cfg: Any) -> int:
    """How often a run repeats the stages that run in every iteration."""
    match cfg:
        case self_rewarding.Config() | meta_rewarding.Config() | cream.Config() | temporal.Config():
            return cfg.iterations - 1
        case seft.Config() | spin.Config() | grpo.Config() | online_dpo.Config():
            return cfg.iterations
        case pit.Config():
            return sum(steps > 0 for steps in cfg.rounds)
    return 1


# ------------------------------------------------------------------------------------------------------------- methods


def _self_rewarding(plan: StagePlan) -> Iterator[Stage]:
    cfg, prompts = plan.cfg, _new_prompts(plan)
    yield from _seeded(plan)
    yield plan.sampling("candidates", prompts, plan.prompt, cfg.sampling, Held(2))
    yield from _judgments(plan, "judgments", prompts)
    pair, rows = plan.prompt + cfg.sampling.max_new_tokens, float(prompts)
    if isinstance(cfg, meta_rewarding.Config) and cfg.pairs.meta.judge_iterations:
        both = judge_settings(plan, plan.cfg.judge, plan.cfg.rubric)["shared_tokens"] + plan.prompt
        pair = max(pair, both + cfg.sampling.max_new_tokens + cfg.judge.max_new_tokens)
        rows = prompts / (1 - cfg.pairs.meta.judge_share)
        answer, judgment = plan.new(cfg.sampling.max_new_tokens), plan.new(cfg.judge.max_new_tokens)
        yield from _meta_judge(plan, prompts, both + answer + 2 * judgment)
    yield plan.training("dpo", "dpo", cfg.dpo.train, rows, pair, Held(2), each=True)
    yield from _early_stop(plan, prompts)


def _cream(plan: StagePlan) -> Iterator[Stage]:
    cfg, prompts = plan.cfg, _new_prompts(plan)
    yield from _seeded(plan)
    yield plan.sampling("candidates", prompts, plan.prompt, cfg.sampling, Held(3))
    pair = plan.prompt + cfg.sampling.max_new_tokens
    rows = 4 * prompts * cfg.sampling.num_samples  # M_{t-1}, M_{t-2}, and M_0 beside each of them
    dtype = cfg.sampling.dtype
    yield Scoring(name="implicit scores", held=Held(2, 1), rows=rows, length=pair, batch_size=32, dtype=dtype)
    yield plan.training("dpo", "dpo", cfg.dpo.train, prompts, pair, Held(3), each=True)
    yield from _early_stop(plan, prompts)


def _temporal(plan: StagePlan) -> Iterator[Stage]:
    cfg, prompts = plan.cfg, _new_prompts(plan)
    pair = plan.prompt + cfg.sampling.max_new_tokens
    yield from _seeded(plan)
    for name in ("candidates", "past candidates"):
        yield plan.sampling(name, prompts, plan.prompt, cfg.sampling, Held(3))
        yield from _judgments(plan, f"judgments of {name}", prompts)
    yield plan.training("dpo of the future model", "dpo", cfg.dpo.train, prompts, pair, Held(3), each=True)
    yield plan.sampling("future candidates", prompts, plan.prompt, cfg.sampling, Held(4))
    yield from _judgments(plan, "judgments of future candidates", prompts)
    yield plan.training("dpo", "dpo", cfg.dpo.train, prompts, pair, Held(3), each=True)
    yield from _early_stop(plan, prompts)


def _judged_rl(plan: StagePlan) -> Iterator[Stage]:
    """GRPO and online DPO: a judge's scores are the reward. M_{t-1} judges and, or M_0, is the reference."""
    cfg, rl = plan.cfg, plan.cfg.rl
    length = min(plan.prompt + rl.max_new_tokens, plan.positions)
    state = 1 if rl.optim.offload else 3
    held = Held(2 + state)
    yield plan.writing(
        "rl: responses", rl.steps * rl.prompts_per_step, plan.prompt, held, samples=rl.group_size,
        new_tokens=plan.new(rl.max_new_tokens), batch_size=rl.batch_size, at_once=rl.prompts_per_step,
    )  # fmt: skip
    if cfg.judging is judge.judge:
        both = plan.prompt + plan.new(rl.max_new_tokens)
        settings = judge_settings(plan, cfg.judge, cfg.rubric)
        yield plan.writing("rl: judgments", rl.steps * rl.rows, both, held, at_once=rl.rows, **settings)
    dtype, micro, rows = cfg.sampling.dtype, rl.rows_at_once, 2 * rl.steps * rl.rows
    if cfg.judging is judge.judge and cfg.judge.expected:
        yield _expected(plan, "expected scores", rl.steps * rl.rows, plan.prompt + plan.new(rl.max_new_tokens))
    yield Scoring(name="rl: logps", held=Held(1 + state, 1), length=length, rows=rows, batch_size=micro, dtype=dtype)
    yield Training(
        name="rl: updates", objective="rl", settings=rl, length=length, steps=rl.updates, held=Held(2), each=True
    )


def _new_prompts(plan: StagePlan) -> int:
    """The prompts of an iteration of a method that begins with human data."""
    cfg = plan.cfg
    if isinstance(cfg.prompts, SelfInstruct):
        return cfg.prompts.num_prompts
    return plan.prompts_in(cfg.prompts, cfg.iterations - 1)


def _seeded(plan: StagePlan) -> Iterator[Stage]:
    """M_1 and the new prompts of a method that begins with human data."""
    cfg, pair = plan.cfg, plan.prompt + plan.cfg.sampling.max_new_tokens
    if cfg.sft is not None:  # held besides the training state: M_0, and the judge that writes EFT
        yield plan.training("sft", "sft", cfg.sft, 2.0 * plan.assumptions.examples, pair, Held(2), each=False)
    if isinstance(cfg.prompts, SelfInstruct):
        shot_tokens = (cfg.prompts.num_seed_shots + cfg.prompts.num_generated_shots) * 64
        yield plan.writing(
            "new prompts",
            cfg.prompts.num_prompts,
            shot_tokens,
            Held(2 if cfg.prompts.generator is None else 2.5),
            samples=1,
            batch_size=cfg.prompts.batch_size,
            new_tokens=plan.new(cfg.prompts.max_new_tokens),
            model=cfg.prompts.generator,
        )


def _judgments(plan: StagePlan, name: str, prompts: int) -> Iterator[Stage]:
    """The model's judgments of the responses to ``prompts``; another judge is not planned."""
    cfg, settings = plan.cfg, judge_settings(plan, plan.cfg.judge, plan.cfg.rubric)
    if cfg.judging is not judge.judge:
        return
    per_call, responses = SHARD * cfg.sampling.num_samples, prompts * cfg.sampling.num_samples
    both = plan.prompt + plan.new(cfg.sampling.max_new_tokens)
    yield plan.writing(name, responses, both, Held(2), at_once=per_call, **settings)
    if cfg.judge.expected:
        yield _expected(plan, "expected scores" if name == "judgments" else f"expected scores: {name}", responses, both)


def _expected(plan: StagePlan, name: str, responses: int, tokens: int) -> Scoring:
    """The expectation over the score strings after each judgment of ``responses``, which have ``tokens`` tokens with
    their prompts."""
    cfg, settings = plan.cfg, judge_settings(plan, plan.cfg.judge, plan.cfg.rubric)
    length = min(settings["shared_tokens"] + tokens + settings["new_tokens"], plan.positions)
    rows = responses * cfg.judge.num_samples
    return Scoring(name=name, held=Held(1, 1), rows=rows, length=length, batch_size=32, dtype=cfg.sampling.dtype)


def _evaluation(plan: StagePlan) -> Iterator[Stage]:
    """The held-out win rates of an iteration, over two earlier models, each in both orders, M_0 is the judge; and the
    responses to IFEval's prompts."""
    evaluate, held = plan.cfg.evaluate, Held(4 if isinstance(plan.cfg, pit.Config) else 3)
    for part in evaluate.parts if isinstance(evaluate, Evaluations) else (evaluate,):
        if isinstance(part, IFEval):
            sampling = part.sampling or plan.cfg.sampling
            prompts = min(part.most or IFEVAL_PROMPTS, IFEVAL_PROMPTS)
            yield plan.sampling("IFEval: responses", prompts, plan.prompt, sampling, held, samples=1)
        if not isinstance(part, HeldOutWinRate):
            continue
        known = len(everyday_prompts()) if part.prompts is everyday_prompts else plan.held_out
        prompts, sampling = min(part.most or known, known), part.sampling or plan.cfg.sampling
        yield plan.sampling("evaluation: responses", prompts, plan.prompt, sampling, held, samples=1)
        if part.judging is None:
            asked = plan.prompt + 2 * plan.new(sampling.max_new_tokens)
            settings = judge_settings(plan, part.judge, part.rubric)
            yield plan.writing("evaluation: judgments", 4 * prompts, asked, held, **settings)


def _early_stop(plan: StagePlan, prompts: int) -> Iterator[Stage]:
    """Two models' responses to the held-out prompts, and the model's judgments of both, at every comparison."""
    cfg, stop = plan.cfg, plan.cfg.early_stop
    if stop is None:
        return
    checks = float(stop.iterations)
    if stop.checkpoints:
        part = cfg.dpo.train
        checks += prompts * part.epochs / part.batch_size // part.checkpoint_every + 1
    answers = 2 * round(checks * plan.held_out)
    held = Held(7)  # the training state, M_{t-1}, M_0 and two snapshots
    yield plan.sampling("early stop: responses", answers, plan.prompt, cfg.sampling, held, samples=1)
    if stop.judging is judge.judge:
        responses = 1 if isinstance(stop.rubric, Rubric) else 2  # in a request; a pair is asked about in both orders
        asked = plan.prompt + responses * plan.new(cfg.sampling.max_new_tokens)
        settings = judge_settings(plan, stop.judge or cfg.judge, stop.rubric)
        yield plan.writing("early stop: judgments", answers, asked, held, **settings)


def _meta_judge(plan: StagePlan, contests: int, tokens: int) -> Iterator[Stage]:
    """Every two of a response's N judgments, in both orders, as if all were different. Counted for each iteration,
    though only the first ``judge_iterations`` have it."""
    cfg, meta = plan.cfg, plan.cfg.pairs.meta
    if meta.judging is not compare_judgments:
        return
    comparisons = contests * cfg.judge.num_samples * (cfg.judge.num_samples - 1)
    template = round(len(meta.rubric.template) / CHARACTERS_PER_TOKEN)
    new = plan.new(meta.judge.max_new_tokens)
    yield plan.writing(
        "comparisons", comparisons, tokens, Held(2), samples=meta.judge.num_samples, new_tokens=new,
        batch_size=meta.judge.batch_size, shared_tokens=template,
    )  # fmt: skip
    if meta.judge.expected:
        yield Scoring(
            name="expected verdicts",
            held=Held(1, 1),
            rows=comparisons * meta.judge.num_samples,
            length=min(template + tokens + new, plan.positions),
            batch_size=meta.judge.batch_size,
            dtype=cfg.sampling.dtype,
        )


def _srt(plan: StagePlan) -> Iterator[Stage]:
    cfg = plan.cfg
    critic_prompts, prompts = cfg.critic_prompts, plan.assumptions.prompts
    if isinstance(cfg.prompts, PromptFile):
        prompts = max(1, plan.prompts_in(cfg.prompts) - critic_prompts)
    draft, critique = plan.new(cfg.sampling.max_new_tokens), plan.new(cfg.critique.max_new_tokens)
    whole = plan.prompt + draft + critique
    writing = {"samples": 1, "batch_size": cfg.critique.batch_size}
    drafter = cfg.first_stage.drafts
    name, held = ("drafts of the base", Held(1)) if drafter is None else ("drafts of another model", Held(1, 1))
    yield plan.sampling(name, critic_prompts, plan.prompt, cfg.sampling, held, model=drafter, each=False)
    if isinstance(cfg.critic, LocalCritic):
        fields = {"samples": 1, "batch_size": cfg.critic.batch_size, "dtype": cfg.critic.dtype}
        fields |= {"model": cfg.critic.model, "each": False}
        critic, held = plan.new(cfg.critic.max_new_tokens), Held(1, 1)
        both = plan.prompt + draft
        yield plan.writing("critiques of the critic", critic_prompts, both, held, new_tokens=critic, **fields)
        checks = critic_prompts * cfg.first_stage.rounds  # whole critiques: the next round takes their refinements
        yield plan.writing("checks of the critic", checks, whole, held, new_tokens=critic, **fields)
    yield plan.training("sft", "sft", cfg.sft, critic_prompts, whole, Held(1), each=False)
    if cfg.dpo is None:
        return
    yield plan.sampling("drafts", prompts, plan.prompt, cfg.sampling, Held(2))
    yield plan.writing("critiques", prompts, plan.prompt + draft, Held(2), new_tokens=critique, **writing)
    yield plan.writing("checks", prompts, whole, Held(2), new_tokens=SCORE_TOKENS, **writing)
    yield plan.training("dpo", "dpo", cfg.dpo.train, prompts, plan.prompt + draft, Held(2), each=True)


def _seft(plan: StagePlan) -> Iterator[Stage]:
    cfg, examples = plan.cfg, plan.assumptions.examples
    prompts = plan.prompts_in(cfg.prompts, cfg.iterations)
    draft = plan.new(cfg.sampling.max_new_tokens)
    both, reviser = plan.prompt + draft, cfg.reviser
    pairs = 6 * examples  # as if each example ranked seven responses
    if cfg.start is not None:
        yield plan.training("sft", "sft", cfg.start, examples, both, Held(1), each=False)
    yield plan.training("reviser: warm-up", "sft", reviser.warm_up, pairs, both + draft, Held(2), each=False)
    yield Scoring(
        name="reviser: labels",
        held=Held(3),
        rows=pairs,
        length=min(both + draft, plan.positions),
        batch_size=reviser.labels.batch_size,
        dtype=cfg.sampling.dtype,
        each=False,
    )
    yield plan.training("reviser: adaptive", "sft", reviser.adaptive, pairs, both + draft, Held(3), each=False)
    kind = cfg.external if cfg.internal_rounds < cfg.iterations else cfg.internal
    most = max(cfg.internal.num_samples if cfg.internal_rounds else 0, kind.num_samples)
    lent = Held(3, 1)  # a model that a round borrows, beside the run's own
    held = Held(3) if kind.drafts is None else lent
    yield plan.sampling("drafts", prompts, plan.prompt, cfg.sampling, held, samples=most, model=kind.drafts)
    writing = {"new_tokens": plan.new(reviser.writing.max_new_tokens), "batch_size": reviser.writing.batch_size}
    held = Held(3) if kind.reviser is None else lent
    yield plan.writing("revisions", prompts, both, held, samples=1, model=kind.reviser, **writing)
    yield plan.training("sft of the policy", "sft", cfg.sft, prompts, both, Held(3), each=True)


def _pit(plan: StagePlan) -> Iterator[Stage]:
    cfg, examples = plan.cfg, plan.assumptions.examples
    part = max(1, examples // 3)
    answer = plan.new(cfg.sampling.max_new_tokens)
    request = plan.prompt + answer + round(len(cfg.request) / CHARACTERS_PER_TOKEN)
    value = cfg.learner is ppo
    yield plan.training("sft of the policy", "sft", cfg.sft, part, plan.prompt + answer, Held(1), each=False)
    yield plan.training("sft of the improver", "sft", cfg.sft, part, request + answer, Held(2), each=False)
    yield plan.training("gap reward", "gap reward", cfg.reward, part, request + answer, Held(3), each=False)
    yield plan.training("policy's reward", "reward", cfg.reward, part, plan.prompt + answer, Held(3), each=False)
    yield from _reinforcing(plan, "policy rl", cfg.policy_rl, plan.prompt, 4, each=False, value=value)
    yield plan.sampling("references", part, plan.prompt, cfg.sampling, Held(4))
    steps = max(cfg.rounds)
    yield from _reinforcing(plan, "rl", dataclasses.replace(cfg.rl, steps=steps), request, 4, each=True, value=value)


def _reinforcing(
    plan: StagePlan, name: str, rl: RLConfig, prompt_tokens: int, models: int, *, each: bool, value: bool
) -> Iterator[Stage]:
    """Sampling, rewards, log-probabilities under the policy and its reference, updates. The training state stays in
    memory all the time: as large as three models, or one if its moments are offloaded. So does that of a value model.
    """
    policy_state = 1 if rl.optim.offload else 3
    state = policy_state * (2 if value else 1)
    length = min(prompt_tokens + rl.max_new_tokens, plan.positions)
    rows = rl.steps * rl.rows
    micro, dtype = rl.rows_at_once, plan.cfg.sampling.dtype
    yield plan.writing(
        f"{name}: responses",
        rl.steps * rl.prompts_per_step,
        prompt_tokens,
        Held(models + state),
        samples=rl.group_size,
        new_tokens=plan.new(rl.max_new_tokens),
        batch_size=rl.batch_size,
        at_once=rl.prompts_per_step,
        each=each,
    )
    fields = {"held": Held(models + state - 1, 1), "each": each, "length": length, "batch_size": micro, "dtype": dtype}
    yield Scoring(name=f"{name}: rewards", rows=rows, **fields)
    yield Scoring(name=f"{name}: logps", rows=(3 if value else 2) * rows, **fields)
    objectives: tuple[Objective, ...] = ("rl", "value") if value else ("rl",)
    for objective in objectives:
        yield Training(
            name=f"{name}: updates" + (" of the value" if objective == "value" else ""),
            objective=objective,
            settings=rl,
            length=length,
            steps=rl.updates,
            held=Held(models + state - policy_state),
            each=each,
        )


def _spin(plan: StagePlan) -> Iterator[Stage]:
    cfg, examples = plan.cfg, plan.assumptions.examples
    yield plan.sampling("responses", examples, plan.prompt, cfg.sampling, Held(1))
    length = plan.prompt + cfg.sampling.max_new_tokens
    yield plan.training("dpo", "dpo", cfg.dpo.train, examples, length, Held(1), each=True)
    yield from _early_stop(plan, examples)
