"""What a config will do, in numbers: the stages of its method, each with what goes through which program how often, and
which models are in memory meanwhile. The reader of a method finds its stages here in the same order.

Data are not read: where the config does not say how many prompts or examples there are, or how long, `Assumed` does.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxsi.methods import pit, seft, self_rewarding, spin, srt
from jaxsi.model.kv_cache import KVCache
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages import judge
from jaxsi.stages.critique import LocalCritic
from jaxsi.stages.self_instruct import PromptFile, SelfInstruct
from jaxsi.training.rl import RLConfig, ppo
from jaxsi.training.train import TrainConfig

Objective = Literal["sft", "dpo", "gap reward", "reward", "rl", "value"]
SHARD = 256  # prompts that a stage samples for in one call (run.Scope.sharded)
CHARACTERS = 3.5  # of English in a token, about
SCORE_TOKENS = 32  # that a model writes where it gives a score alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumed:
    """What the config does not say. ``prompts``, ``examples``: how many, of an iteration and of training data.
    ``prompt_tokens``: of a prompt with its template. ``fill``: the share of its limit that a response takes."""

    prompts: int = 1000
    examples: int = 1000
    prompt_tokens: int = 512
    fill: float = 1.0

    def __post_init__(self) -> None:
        if min(self.prompts, self.examples, self.prompt_tokens) < 1 or not 0 < self.fill <= 1:
            raise ValueError(
                f"prompts {self.prompts}, examples {self.examples} and prompt_tokens {self.prompt_tokens} are at least "
                f"1, fill {self.fill} lies in (0, 1]"
            )


class Held(NamedTuple):
    """Models in memory beside what a program is given: as float32 weights in the training layout, and as copies for
    sampling."""

    models: float = 0
    copies: float = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """``each``: it runs in each iteration, else once."""

    name: str
    held: Held
    each: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Stage):
    """``samples`` responses of at most ``new_tokens`` to each of ``prompts``, whose beginnings of ``shared_tokens`` are
    the same and whose own ``prompt_tokens`` follow. ``at_once``: prompts of one call. ``model``: where it is another
    than the run's."""

    prompts: int
    samples: int
    prompt_tokens: int
    shared_tokens: int = 0
    new_tokens: int
    batch_size: int
    cache: KVCache = "exact"
    dtype: str
    at_once: int = SHARD
    model: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring(Stage):
    """Log-probabilities, or rewards, of ``rows`` texts of ``length`` tokens, ``batch_size`` at a time."""

    rows: int
    length: int
    batch_size: int
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Stage):
    """``steps`` updates on rows of ``length`` tokens."""

    objective: Objective
    settings: TrainConfig | RLConfig
    length: int
    steps: float


def stages(cfg: Any, assumed: Assumed, max_positions: int, *, packs: bool) -> list[Stage]:
    """The stages of a method's config in their order; ``packs``: SFT packs its rows, as it does but on GPUs."""
    plan = _Plan(cfg, assumed, max_positions, packs)
    match cfg:
        case self_rewarding.Config():
            return list(_self_rewarding(plan))
        case srt.Config():
            return list(_srt(plan))
        case seft.Config():
            return list(_seft(plan))
        case pit.Config():
            return list(_pit(plan))
        case spin.Config():
            return list(_spin(plan))
    raise TypeError(f"{type(cfg)} is no method's Config")


def iterations(cfg: Any) -> int:
    """How often the stages of each iteration run in the whole run."""
    match cfg:
        case self_rewarding.Config():
            return cfg.iterations - 1
        case seft.Config() | spin.Config():
            return cfg.iterations
        case pit.Config():
            return sum(steps > 0 for steps in cfg.rounds)
    return 1


# ------------------------------------------------------------------------------------------------------------- methods


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the methods' stages are made with."""

    cfg: Any
    assumed: Assumed
    positions: int
    packs: bool

    @property
    def prompt(self) -> int:
        return min(self.assumed.prompt_tokens, self.positions // 2)

    def new(self, limit: int) -> int:
        return max(1, round(limit * self.assumed.fill))

    def sampling(self, name: str, prompts: int, own: int, settings: SamplingConfig, held: Held, **other: Any) -> Stage:
        fields = {
            "samples": settings.num_samples,
            "new_tokens": self.new(settings.max_new_tokens),
            "batch_size": settings.batch_size,
            "cache": settings.cache,
        } | other
        return self.writing(name, prompts, own, held, **fields)

    def writing(self, name: str, prompts: int, own: int, held: Held, **fields: Any) -> Stage:
        longest = self.positions - fields["new_tokens"] - fields.get("shared_tokens", 0)
        fields = {"dtype": self.cfg.sampling.dtype} | fields
        return Sampling(name=name, held=held, prompts=prompts, prompt_tokens=max(1, min(own, longest)), **fields)

    def training(
        self, name: str, objective: Objective, part: TrainConfig, rows: float, tokens: int, held: Held, *, each: bool
    ) -> Stage:
        """``rows`` sequences (pairs, groups) of ``tokens`` tokens."""
        length = min(part.max_length, tokens)
        if objective == "sft" and self.packs:
            rows, length = rows * length / part.max_length, part.max_length
        steps = max(1.0, rows * part.epochs / part.batch_size)
        if part.max_steps is not None:
            steps = min(steps, part.max_steps)
        return Training(
            name=name, objective=objective, settings=part, length=length, steps=steps, held=held, each=each
        )  # fmt: skip

    def of_source(self, source: Any, parts: int = 1) -> int:
        """Prompts of an iteration: of a file that is here, or as many as are assumed."""
        if isinstance(source, PromptFile):
            if Path(source.path).is_file() and source.path.endswith(".jsonl"):
                with open(source.path, encoding="utf-8") as file:
                    count = sum(bool(line.strip()) for line in file)
                count = min(count, source.max_prompts or count)
                return max(1, count // (1 if source.repeat else parts))
            if source.max_prompts is not None:
                return max(1, source.max_prompts // (1 if source.repeat else parts))
        return self.assumed.prompts


def _self_rewarding(plan: _Plan) -> Iterator[Stage]:
    cfg, a = plan.cfg, plan.assumed
    answer = plan.new(cfg.sampling.max_new_tokens)
    rubric = round(len(cfg.rubric.template) / CHARACTERS)
    pair = plan.prompt + cfg.sampling.max_new_tokens
    if cfg.sft is not None:  # beside the training state: M_0, and the judge that writes EFT
        yield plan.training("sft", "sft", cfg.sft, 2.0 * a.examples, pair, Held(2), each=False)
    prompts = plan.of_source(cfg.prompts, cfg.iterations - 1)
    if isinstance(cfg.prompts, SelfInstruct):
        prompts = cfg.prompts.num_prompts
        shots = (cfg.prompts.num_seed_shots + cfg.prompts.num_generated_shots) * 64
        own = cfg.prompts.generator is None
        yield plan.writing(
            "new prompts", prompts, shots, Held(2 if own else 2.5), samples=1, batch_size=cfg.prompts.batch_size,
            new_tokens=plan.new(cfg.prompts.max_new_tokens), model=cfg.prompts.generator,
        )  # fmt: skip
    yield plan.sampling("candidates", prompts, plan.prompt, cfg.sampling, Held(2))
    judged = {"samples": cfg.judge.num_samples, "new_tokens": plan.new(cfg.judge.max_new_tokens)}
    judged |= {"batch_size": cfg.judge.batch_size, "shared_tokens": rubric}
    if cfg.judging is judge.judge:
        per_call = SHARD * cfg.sampling.num_samples
        responses = prompts * cfg.sampling.num_samples
        yield plan.writing("judgments", responses, plan.prompt + answer, Held(2), at_once=per_call, **judged)
        if cfg.judge.expected:
            rows, length = responses * cfg.judge.num_samples, rubric + plan.prompt + answer + judged["new_tokens"]
            yield Scoring(
                name="expected scores", held=Held(1, 1), rows=rows, length=min(length, plan.positions), batch_size=32,
                dtype=cfg.sampling.dtype,
            )  # fmt: skip
    yield plan.training("dpo", "dpo", cfg.dpo.train, prompts, pair, Held(2), each=True)
    if cfg.early_stop is not None:
        checks = prompts * cfg.dpo.train.epochs / cfg.dpo.train.batch_size // cfg.dpo.train.checkpoint_every + 1
        asked = round(checks * min(a.examples, 256))
        held = Held(7)  # the training state, M_{t-1}, M_0 and two snapshots
        yield plan.sampling("early stop: responses", 2 * asked, plan.prompt, cfg.sampling, held, samples=1)
        yield plan.writing("early stop: judgments", 2 * asked, plan.prompt + answer, held, **judged)


def _srt(plan: _Plan) -> Iterator[Stage]:
    cfg = plan.cfg
    learnt, own = cfg.critic_prompts, plan.assumed.prompts
    if isinstance(cfg.prompts, PromptFile):
        own = max(1, plan.of_source(cfg.prompts) - learnt)
    draft, critique = plan.new(cfg.sampling.max_new_tokens), plan.new(cfg.critique.max_new_tokens)
    whole = plan.prompt + draft + critique
    write = {"samples": 1, "batch_size": cfg.critique.batch_size}
    yield plan.sampling("drafts of the base", learnt, plan.prompt, cfg.sampling, Held(1), each=False)
    if isinstance(cfg.critic, LocalCritic):
        told = {"samples": 1, "batch_size": cfg.critic.batch_size, "dtype": cfg.critic.dtype, "model": cfg.critic.model}
        told["each"] = False
        long = {"new_tokens": plan.new(cfg.critic.max_new_tokens)}
        yield plan.writing("critiques of the critic", learnt, plan.prompt + draft, Held(1, 1), **told, **long)
        yield plan.writing("checks of the critic", learnt, whole, Held(1, 1), **told, new_tokens=SCORE_TOKENS)
    yield plan.training("sft", "sft", cfg.sft, learnt, whole, Held(1), each=False)
    if cfg.dpo is None:
        return
    yield plan.sampling("drafts", own, plan.prompt, cfg.sampling, Held(2))
    yield plan.writing("critiques", own, plan.prompt + draft, Held(2), new_tokens=critique, **write)
    yield plan.writing("checks", own, whole, Held(2), new_tokens=SCORE_TOKENS, **write)
    yield plan.training("dpo", "dpo", cfg.dpo.train, own, plan.prompt + draft, Held(2), each=True)


def _seft(plan: _Plan) -> Iterator[Stage]:
    cfg, a = plan.cfg, plan.assumed
    prompts = plan.of_source(cfg.prompts, cfg.iterations)
    draft = plan.new(cfg.sampling.max_new_tokens)
    both, of = plan.prompt + draft, cfg.reviser
    pairs = 6 * a.examples  # of seven ranked responses, say
    if cfg.start is not None:
        yield plan.training("sft", "sft", cfg.start, a.examples, both, Held(1), each=False)
    yield plan.training("reviser: warm-up", "sft", of.warm_up, pairs, both + draft, Held(2), each=False)
    scored = {"held": Held(3), "batch_size": of.labels.batch_size, "dtype": cfg.sampling.dtype, "each": False}
    yield Scoring(name="reviser: labels", rows=pairs, length=min(both + draft, plan.positions), **scored)
    yield plan.training("reviser: adaptive", "sft", of.adaptive, pairs, both + draft, Held(3), each=False)
    kind = cfg.external if cfg.internal_rounds < cfg.iterations else cfg.internal
    most = max(cfg.internal.num_samples if cfg.internal_rounds else 0, kind.num_samples)
    yield plan.sampling("drafts", prompts, plan.prompt, cfg.sampling, Held(3), samples=most)
    written = {"new_tokens": plan.new(of.writing.max_new_tokens), "batch_size": of.writing.batch_size}
    yield plan.writing("revisions", prompts, both, Held(3), samples=1, **written)
    yield plan.training("sft of the policy", "sft", cfg.sft, prompts, both, Held(3), each=True)


def _pit(plan: _Plan) -> Iterator[Stage]:
    cfg, a = plan.cfg, plan.assumed
    part = max(1, a.examples // 3)
    answer = plan.new(cfg.sampling.max_new_tokens)
    asked = plan.prompt + answer + round(len(cfg.request) / CHARACTERS)
    learns = {"value": cfg.learner is ppo}
    yield plan.training("sft of the policy", "sft", cfg.sft, part, plan.prompt + answer, Held(1), each=False)
    yield plan.training("policy's reward", "reward", cfg.reward, part, plan.prompt + answer, Held(2), each=False)
    yield from _reinforcing(plan, "policy rl", cfg.policy_rl, plan.prompt, 3, each=False, **learns)
    yield plan.training("sft of the improver", "sft", cfg.sft, part, asked + answer, Held(2), each=False)
    yield plan.training("gap reward", "gap reward", cfg.reward, part, asked + answer, Held(3), each=False)
    yield plan.sampling("references", part, plan.prompt, cfg.sampling, Held(4))
    steps = max(cfg.rounds)
    yield from _reinforcing(plan, "rl", dataclasses.replace(cfg.rl, steps=steps), asked, 4, each=True, **learns)


def _reinforcing(
    plan: _Plan, name: str, rl: RLConfig, own: int, models: int, *, each: bool, value: bool
) -> Iterator[Stage]:
    """Sampling, rewards, log-probabilities under the policy and its reference, updates; the training state, three
    models large (without its moments one), is there all the time, and a value model's."""
    own_state = 1 if rl.optim.offload else 3
    state = own_state * (2 if value else 1)
    length = min(own + rl.max_new_tokens, plan.positions)
    rows = rl.steps * rl.rows
    micro, dtype = rl.rows_at_once, plan.cfg.sampling.dtype
    yield plan.writing(
        f"{name}: responses", rl.steps * rl.prompts_per_step, own, Held(models + state), samples=rl.group_size,
        new_tokens=plan.new(rl.max_new_tokens), batch_size=rl.batch_size, at_once=rl.prompts_per_step,
        each=each,
    )  # fmt: skip
    scored = {"held": Held(models + state - 1, 1), "each": each, "length": length, "batch_size": micro, "dtype": dtype}
    yield Scoring(name=f"{name}: rewards", rows=rows, **scored)
    yield Scoring(name=f"{name}: logps", rows=(3 if value else 2) * rows, **scored)
    objectives: tuple[Objective, ...] = ("rl", "value") if value else ("rl",)
    for objective in objectives:
        yield Training(
            name=f"{name}: updates" + (" of the value" if objective == "value" else ""), objective=objective,
            settings=rl, length=length, steps=rl.updates, held=Held(models + state - own_state), each=each,
        )  # fmt: skip


def _spin(plan: _Plan) -> Iterator[Stage]:
    cfg, examples = plan.cfg, plan.assumed.examples
    yield plan.sampling("responses", examples, plan.prompt, cfg.sampling, Held(1))
    length = plan.prompt + cfg.sampling.max_new_tokens
    yield plan.training("dpo", "dpo", cfg.dpo.train, examples, length, Held(1), each=True)
