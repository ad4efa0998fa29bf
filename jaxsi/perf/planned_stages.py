"""What a stage of a plan is, and how stages follow from settings: rows, lengths, what is in memory beside them."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxsi.model.kv_cache import KVCache
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.self_instruct import PromptFile
from jaxsi.stages.verdicts import JudgeConfig
from jaxsi.training.optim import warmup
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig

Objective = Literal["sft", "dpo", "gap reward", "reward", "rl", "value"]
SHARD = 256  # prompts in one call of a stage that samples (run.Scope.sharded)
CHARACTERS_PER_TOKEN = 3.5  # about, in English
PLANNED_DTYPE = "bfloat16"  # in place of "auto": all chips that a run can be planned for are fast in it
SCORE_TOKENS = 32  # that a model writes when it only gives a score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Numbers that the config does not say. ``prompts``: in an iteration. ``examples``: in the training data.
    ``prompt_tokens``: in a prompt with its template. ``fill``: length of a response as a share of its limit."""

    prompts: int = 1000
    examples: int = 1000
    prompt_tokens: int = 512
    fill: float = 1.0

    def __post_init__(self) -> None:
        if min(self.prompts, self.examples, self.prompt_tokens) < 1 or not 0 < self.fill <= 1:
            raise ValueError(
                f"prompts {self.prompts}, examples {self.examples} and prompt_tokens {self.prompt_tokens} must be at "
                f"least 1, and fill {self.fill} must be in (0, 1]"
            )


class Held(NamedTuple):
    """Models in memory besides the arguments of a program: ``models`` as float32 weights in the training layout,
    ``copies`` as copies for sampling."""

    models: float = 0
    copies: float = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """``each``: True if it runs in every iteration, False if it runs once."""

    name: str
    held: Held
    each: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Stage):
    """``samples`` responses of at most ``new_tokens`` to each of ``prompts``. A prompt is a prefix of ``shared_tokens``
    tokens, the same for all, and ``prompt_tokens`` more. ``at_once``: prompts in one call. ``model``: None for the
    run's model."""

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
    """``steps`` updates on sequences of ``length`` tokens."""

    objective: Objective
    settings: TrainConfig | RLConfig
    length: int
    steps: int

    @property
    def warmup_share(self) -> float:
        """The part of the steps in which the learning rate rises."""
        return min(1.0, warmup(self.settings.optim, self.steps) / self.steps)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Builds the stages of a method."""

    cfg: Any
    assumptions: Assumptions
    positions: int

    @property
    def prompt(self) -> int:
        return min(self.assumptions.prompt_tokens, self.positions // 2)

    @property
    def held_out(self) -> int:
        """Held-out prompts, if the config does not say how many."""
        return min(self.assumptions.examples, 256)

    def new(self, limit: int) -> int:
        return max(1, round(limit * self.assumptions.fill))

    def sampling(
        self, name: str, prompts: int, prompt_tokens: int, settings: SamplingConfig, held: Held, **overrides: Any
    ) -> Stage:
        """A stage that samples by a SamplingConfig; ``overrides`` replace fields of the stage."""
        fields = {
            "samples": settings.num_samples,
            "new_tokens": self.new(settings.max_new_tokens),
            "batch_size": settings.batch_size,
            "cache": settings.cache,
        } | overrides
        return self.writing(name, prompts, prompt_tokens, held, **fields)

    def writing(self, name: str, prompts: int, prompt_tokens: int, held: Held, **fields: Any) -> Stage:
        """A stage that samples; its prompts are cut to what the model's positions leave for them."""
        longest = self.positions - fields["new_tokens"] - fields.get("shared_tokens", 0)
        fields = {"dtype": self.cfg.sampling.dtype} | fields
        tokens = max(1, min(prompt_tokens, longest))
        return Sampling(name=name, held=held, prompts=prompts, prompt_tokens=tokens, **fields)

    def training(
        self, name: str, objective: Objective, part: TrainConfig, rows: float, tokens: int, held: Held, *, each: bool
    ) -> Stage:
        """Training on ``rows`` sequences (or pairs, or groups) of ``tokens`` tokens."""
        steps = part.epochs * math.ceil(rows / part.batch_size)  # an epoch's last batch has what is left
        steps = max(1, min(steps, part.max_steps or steps))
        length = min(part.max_length, tokens)
        return Training(name=name, objective=objective, settings=part, length=length, steps=steps, held=held, each=each)

    def prompts_in(self, source: Any, parts: int = 1) -> int:
        """Prompts of an iteration: those in the file if it exists here, else the assumed number."""
        if isinstance(source, PromptFile):
            if Path(source.path).is_file() and source.path.endswith(".jsonl"):
                with open(source.path, encoding="utf-8") as file:
                    count = sum(bool(line.strip()) for line in file)
                count = min(count, source.max_prompts or count)
                return max(1, count // (1 if source.repeat else parts))
            if source.max_prompts is not None:
                return max(1, source.max_prompts // (1 if source.repeat else parts))
        return self.assumptions.prompts


def judge_settings(plan: StagePlan, cfg: JudgeConfig, rubric: AnyRubric) -> dict[str, Any]:
    return {
        "samples": cfg.num_samples,
        "new_tokens": plan.new(cfg.max_new_tokens),
        "batch_size": cfg.batch_size,
        "shared_tokens": round(len(rubric.template) / CHARACTERS_PER_TOKEN),
    }
