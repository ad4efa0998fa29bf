"""Exact quality on the held-out instructions of the embedded world, and how well the model judges its own responses."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxsi.evals.held_out import lengths_of
from jaxsi.lm import LM
from jaxsi.runs import metrics
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Judgment, Prompt, Response
from jaxsi.runs.run import Scope
from jaxsi.sampling.generate import generate
from jaxsi.stages import judge
from jaxsi.stages.judge import JudgeConfig
from jaxsi.stages.prompts import Rubric
from jaxsi.toyworld import world


@stored_as("evals.toy.ToyEvaluation")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyEvaluation:
    """What is measured. Every model is sampled with the same noise (common random numbers), so that differences between
    iterations come from the models alone."""

    num_prompts: int = 500
    num_samples: int = 4
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 24
    judged_prompts: int = 100

    def __call__(self, lm: LM, config: Any, scope: Scope) -> dict[str, Any]:
        """One iteration's figures, by the run's ``config.rubric`` and ``config.judge``; the scope keeps the samples."""
        responses = scope.records("eval_responses", self.sample, lm, of=Response)
        judgments = scope.records("eval_judgments", self.judge, lm, responses, config.rubric, config.judge, of=Judgment)
        return self.figures(responses, judgments, scope.records("eval_greedy", self.greedy, lm, of=Response))

    def measure(self, lm: LM, rubric: Rubric, judging: JudgeConfig) -> dict[str, Any]:
        """The same figures for a model outside a run."""
        responses = self.sample(lm)
        return self.figures(responses, self.judge(lm, responses, rubric, judging), self.greedy(lm))

    @property
    def key(self) -> jax.Array:
        return fold(jax.random.key(0), "toy evaluation")

    def sample(self, lm: LM) -> list[Response]:
        """``num_samples`` responses to each held-out instruction."""
        return generate(
            lm,
            world.evaluation_prompts(self.num_prompts),
            num_samples=self.num_samples,
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            key=self.key,
            batch_size=512,
        )

    def greedy(self, lm: LM) -> list[Response]:
        """The greedy response to each held-out instruction."""
        prompts = world.evaluation_prompts(self.num_prompts)
        return generate(lm, prompts, temperature=0.0, max_new_tokens=self.max_new_tokens, key=self.key, batch_size=512)

    def judge(self, lm: LM, responses: list[Response], rubric: Rubric, judging: JudgeConfig) -> list[Judgment]:
        """The model's own judgments of its responses to the first ``judged_prompts`` instructions."""
        prompts = world.evaluation_prompts(self.num_prompts)[: self.judged_prompts]
        ids = {prompt.id for prompt in prompts}
        judged = [response for response in responses if response.prompt_id in ids]
        return judge.judge(lm, prompts, judged, rubric, judging, fold(self.key, "judge"))

    def figures(self, responses: list[Response], judgments: list[Judgment], greedy: list[Response]) -> dict[str, Any]:
        """Quality from 0 to 100 with its interval over prompts, the best of the samples, and the judge's agreement."""
        prompts = world.evaluation_prompts(self.num_prompts)
        graded, figures = quality(prompts, responses)
        valid = [score for j in judgments for score in j.scores if score is not None]
        total = sum(len(j.scores) for j in judgments)
        scored = [j for j in judgments if j.score is not None]
        agreement = metrics.pairwise_agreement(
            [j.score for j in scored], [graded[j.id] for j in scored], [j.prompt_id for j in scored]
        )
        return figures | {
            "greedy": quality(prompts, greedy)[1]["quality"]["mean"],
            **metrics.agreement_figures(agreement),
            "parse_rate": len(valid) / total if total else None,
        }


@stored_as("evals.toy.ToyQuality")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyQuality:
    """Only the quality of a model, for methods without a judge; the samples are those of ``ToyEvaluation``."""

    num_prompts: int = 500
    num_samples: int = 4

    def __call__(self, lm: LM, config: Any, scope: Scope) -> dict[str, Any]:
        """One iteration's figures; the scope keeps the samples."""
        sampled = ToyEvaluation(num_prompts=self.num_prompts, num_samples=self.num_samples)
        responses = scope.records("eval_responses", sampled.sample, lm, of=Response)
        return quality(world.evaluation_prompts(self.num_prompts), responses)[1]


def quality(prompts: Sequence[Prompt], responses: Sequence[Response]) -> tuple[dict[str, float], dict[str, Any]]:
    """(The exact grade, 0 to 100, of each response by its id; the figures that every evaluation of the world has.)

    The figures are the mean with its interval over prompts, the best of each prompt's samples, and lengths. All prompts
    have the same number of responses.
    """
    texts = {prompt.id: prompt.text for prompt in prompts}
    graded = {response.id: 10 * exact(texts[response.prompt_id], response.text) for response in responses}
    groups: dict[str, list[float]] = {prompt.id: [] for prompt in prompts}
    for response in responses:
        groups[response.prompt_id].append(graded[response.id])
    by_prompt = np.asarray(list(groups.values()))
    mean, low, high = metrics.mean_ci(by_prompt.mean(axis=1), seed=0)
    return graded, {
        "quality": {"mean": mean, "ci95": [low, high]},
        "best_of_samples": float(by_prompt.max(axis=1).mean()),
        **lengths_of(responses),
        "by_prompt": by_prompt.mean(axis=1).tolist(),
    }


def exact(instruction: str, response: str) -> float:
    """The grade, 0 to 10, of a response to an instruction of the world."""
    grade = world.grade(instruction, response)
    if grade is None:
        raise ValueError(f"{instruction!r} is not an instruction of the embedded world")
    return float(grade.total)
