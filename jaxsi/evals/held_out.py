"""How often a run's model wins over earlier ones on held-out prompts: a figure of each iteration that needs no outside
service.

A judge compares two responses in both orders; if its answers disagree, it is a tie, which counts half. The same judge
compares in every iteration, with the same noise, so the figures of two iterations can be compared.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.metrics import share_ci
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Judgment, Prompt, Response, read_jsonl
from jaxsi.runs.run import Scope
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.answers import answers, read_answers, with_room
from jaxsi.stages.early_stop import outcomes_of
from jaxsi.stages.improve.pit import pit
from jaxsi.stages.improve.rounds import draft_round, improve
from jaxsi.stages.improve.srt import srt
from jaxsi.stages.judges import Judge, ModelJudge
from jaxsi.stages.prompts.comparison import AnyRubric, read_rubric
from jaxsi.stages.verdicts import JudgeConfig

KEY = ("held-out win rate",)


@stored_as("evals.held_out.everyday_prompts")
def everyday_prompts() -> list[Prompt]:
    """66 everyday requests, written for this package: writing, advice, explanations, reasoning, code, extraction, other
    languages, and dialogues of several turns."""
    return read_jsonl(Path(__file__).with_name("everyday.jsonl"), Prompt)


# How a model answers: (prompts, lm, the run's config, sampling, what the method passes to its evaluation) -> a response
# to each prompt.
Respond = Callable[..., list[Response]]


@stored_as("evals.held_out.first_response")
def first_response(
    prompts: Sequence[Prompt], lm: LM, config: Any, sampling: SamplingConfig, *context: Any
) -> list[Response]:
    """The model's own response."""
    return [record.response for record in draft_round(lm, prompts, fold(jax.random.key(0), *KEY), sampling)]


@stored_as("evals.held_out.refined_response")
def refined_response(
    prompts: Sequence[Prompt], lm: LM, config: Any, sampling: SamplingConfig, refines: bool
) -> list[Response]:
    """The answer of an SRT model: its refined response. ``refines`` is False for the model as given."""
    if not refines or config.first_stage.refinement_only:
        return first_response(prompts, lm, config, sampling)
    return _improved(prompts, srt(lm, sampling, config.template, config.critique))


@stored_as("evals.held_out.improved_response")
def improved_response(
    prompts: Sequence[Prompt], lm: LM, config: Any, sampling: SamplingConfig, policy: LM | None, *context: Any
) -> list[Response]:
    """PIT's answer: the improver's response to the policy's. The model as given (no policy) answers itself."""
    if policy is None:
        return first_response(prompts, lm, config, sampling)
    return _improved(prompts, pit(policy, sampling, lm, config.request))


def _improved(prompts: Sequence[Prompt], method: Any) -> list[Response]:
    return [record.response for record in improve(prompts, method, rounds=1)[-1]]


@stored_as("evals.held_out.HeldOutWinRate")
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutWinRate:
    """What a config gives as ``evaluate``: the win rates of M_t over the first model that the run evaluates, and over
    the one before M_t, on ``prompts`` that nothing is trained on. A run asks for them once and keeps them.

    ``judging`` compares by ``rubric``, with the settings ``judge``; None is the model that the run began with, which
    stays the same in all iterations. ``sampling``: None is that of the run, with one response to a prompt. ``respond``
    is how the method's model answers. ``most``: the first prompts alone.
    """

    prompts: Callable[[], list[Prompt]] = everyday_prompts
    judging: Judge | None = None
    rubric: AnyRubric = read_rubric("pairwise_judge")
    judge: JudgeConfig = JudgeConfig(num_samples=1, temperature=0.0, top_p=1.0, expected=True, batch_size=16)
    sampling: SamplingConfig | None = None
    respond: Respond = first_response
    most: int | None = None

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise ValueError(f"most is {self.most}; at least one held-out prompt is compared")

    def __call__(self, lm: LM, config: Any, scope: Scope, *context: Any) -> dict[str, Any]:
        """One iteration's figures. The scope keeps the responses and the judgments, in shards.

        Returns: {"evals": {"held-out": {"over_first": {"iteration", "mean", "ci95", "prompts"}, "over_previous": ...}},
          "mean_length" (tokens), "cut_off" (share)}. The first model has no win rate; one over which nothing could be
          judged has no mean.
        """
        sampling = dataclasses.replace(self.sampling or config.sampling, num_samples=1)
        kept = scope.run.at("iter_0").records("held_out_prompts", self.prompts, of=Prompt)
        prompts = with_room(lm, kept[: self.most], sampling.max_new_tokens)
        now = scope.sharded("held_out_responses", prompts, self.respond, lm, config, sampling, *context, of=Response)
        earlier, rates = earlier_models(scope), {}
        if earlier:
            rates["over_first"] = self._over(earlier[0], "over_first", prompts, now, lm, config, scope)
            rates["over_previous"] = rates["over_first"]
        if len(earlier) > 1:
            rates["over_previous"] = self._over(earlier[-1], "over_previous", prompts, now, lm, config, scope)
        return {"evals": {"held-out": rates}, **lengths_of(now)}

    def _over(
        self, folder: str, name: str, prompts: Sequence[Prompt], now: Sequence[Response], lm: LM, config: Any,
        scope: Scope,
    ) -> dict[str, Any]:  # fmt: skip
        """The win rate over the model of ``folder``."""
        before = scope.run.at(folder).finished("held_out_responses", of=Response)
        both = [*_named(now, "now"), *_named(before, "before")]
        judging = self.judging or ModelJudge(config.model)
        judgments = scope.sharded(
            f"held_out_judgments_{name}", answers(prompts, both), read_answers, judging, lm, self.rubric,
            self.judge, fold(jax.random.key(0), *KEY, "judge"), of=Judgment,
        )  # fmt: skip
        scores: dict[str, dict[str, float | None]] = {"now": {}, "before": {}}
        for judgment in judgments:
            scores[judgment.id.rpartition("#")[2]][judgment.prompt_id] = judgment.score
        compared = [prompt.id for prompt in prompts if prompt.id in scores["now"] and prompt.id in scores["before"]]
        outcomes = outcomes_of([scores["now"][id] for id in compared], [scores["before"][id] for id in compared])
        figures = {"iteration": folder.removeprefix("iter_")}
        if not outcomes:
            return figures | {"mean": None, "ci95": [None, None], "prompts": 0}
        mean, low, high = share_ci(outcomes)
        return figures | {"mean": mean, "ci95": [low, high], "prompts": len(outcomes)}


def _named(responses: Sequence[Response], name: str) -> list[Response]:
    """Responses whose ids say which of the two models wrote them."""
    return [dataclasses.replace(r, id=f"{r.prompt_id}#{name}") for r in responses]


def lengths_of(responses: Sequence[Response]) -> dict[str, float | None]:
    """The "mean_length" (tokens) of responses, and the share that the token limit "cut_off"; None over nothing."""
    if not responses:
        return {"mean_length": None, "cut_off": None}
    return {
        "mean_length": float(np.mean([len(response.token_ids) for response in responses])),
        "cut_off": float(np.mean([response.finish_reason == "length" for response in responses])),
    }


def earlier_models(scope: Scope) -> list[str]:
    """The folders of the models that were evaluated before that of ``scope``, in order."""
    if scope.name == "base":
        return []
    summary, t = scope.run.summary, int(scope.name.removeprefix("iter_"))
    done = [entry["iteration"] for entry in summary.get("iterations", []) if entry["iteration"] < t]
    return [*(["base"] if "base" in summary else []), *(f"iter_{number}" for number in done)]


@stored_as("evals.held_out.Evaluations")
@dataclasses.dataclass(frozen=True)
class Evaluations:
    """Several evaluations as one: the figures of all; of two figures of the same name, the first one's. Those under
    "evals" are joined."""

    parts: tuple[Callable[..., Mapping[str, Any]], ...]

    def __post_init__(self) -> None:
        kinds = [type(part) for part in self.parts if dataclasses.is_dataclass(part)]
        if twice := [kind.__name__ for kind in kinds if kinds.count(kind) > 1]:
            raise ValueError(
                f"parts has {twice[0]} {len(twice)} times, which would keep its responses in the same files; give it "
                "once, or measure the rest with `jaxsi eval`"
            )

    def __call__(self, *asked: Any) -> dict[str, Any]:
        figures: dict[str, Any] = {"evals": {}}
        for part in self.parts:
            measured = part(*asked)
            figures = {**measured, **figures, "evals": {**figures["evals"], **measured.get("evals", {})}}
        return figures
