"""SEFT on the embedded world: the exact quality of the policy's responses, and how good its reviser is."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsi.lm import LM
from jaxsi.runs import metrics
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Prompt, RankedResponses, Response, Revision
from jaxsi.runs.run import Scope
from jaxsi.sampling.generate import generate
from jaxsi.stages.reviser import always_revise, keep_prob, keep_share, labelled_drafts, revise
from jaxsi.text.chat import written_response
from jaxsi.toyworld import careless, world
from jaxsi.toyworld.evaluate import ToyEvaluation, exact, quality

GOOD = 100.0  # the grade of a draft that needs no change


@stored_as("evals.toy_revised.PolicyEvaluation")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyEvaluation:
    """The policy's own responses, sampled as in ``ToyEvaluation``. For ``judged_prompts`` prompts also the labels that
    the run's reviser gives them."""

    num_prompts: int = 500
    num_samples: int = 4
    judged_prompts: int = 100

    def __call__(self, lm: LM, config: Any, scope: Scope, reviser: LM) -> dict[str, Any]:
        """One iteration's figures. judge_agreement: how often P(keep) orders two responses as the exact grader does."""
        prompts = world.evaluation_prompts(self.num_prompts)
        sampled = ToyEvaluation(num_prompts=self.num_prompts, num_samples=self.num_samples)
        responses = scope.records("eval_responses", sampled.sample, lm, of=Response)
        graded, figures = quality(prompts, responses)
        judged = {prompt.id for prompt in prompts[: self.judged_prompts]}
        judged_responses = [response for response in responses if response.prompt_id in judged]
        settings = config.reviser
        labelled = [
            r
            for r in labelled_drafts(reviser, prompts, judged_responses, settings.template, settings.writing)
            if r.label_probs is not None
        ]
        agreement = metrics.pairwise_agreement(
            [keep_prob(r) for r in labelled], [graded[r.id] for r in labelled], [r.prompt_id for r in labelled]
        )
        own = {"no_share": keep_share(labelled, settings.template)}
        return figures | own | metrics.agreement_figures(agreement)


@stored_as("evals.toy_revised.ReviserEvaluation")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReviserEvaluation:
    """The reviser on careless responses to held-out instructions, ranked without slips."""

    num_prompts: int = 200
    per_prompt: int = 4

    def __call__(self, reviser: LM, config: Any, scope: Scope) -> dict[str, Any]:
        """The reviser's figures.

        no_on_best, no_on_worst, major_on_worst: how often that is the label of drafts without a fault, or of each
        prompt's worst.
        good_drafts, all_drafts: their grades after gated revision, and after revising all of them.
        by_label: what revision does to the drafts of each label.
        parse_rate: how often the reviser, left to write by itself, begins with a label.
        label_followed: how often it begins with the likeliest one.
        """
        settings, key = config.reviser, fold(ToyEvaluation().key, "reviser")
        ranked = careless.preferences(self.num_prompts, 9, per_prompt=self.per_prompt, held_out=True, slip=0.0)
        prompts, drafts, grades, worst = self.drafts(reviser, ranked)
        arguments = (reviser, prompts, drafts, settings.template, settings.writing, key)
        gated = scope.records("eval_gated", revise, *arguments, of=Revision)
        always = scope.records("eval_always", always_revise, *arguments, of=Revision)
        texts = {prompt.id: prompt.text for prompt in prompts}
        after_gated, after_always = (
            np.asarray([10 * exact(texts[r.prompt_id], r.response.text) for r in revisions])
            for revisions in (gated, always)
        )
        labels, good = np.asarray([revision.label for revision in gated]), grades == GOOD
        return {
            "no_on_best": float(np.mean(labels[good] == settings.template.no)),
            "no_on_worst": float(np.mean(labels[worst] == settings.template.no)),
            "major_on_worst": float(np.mean(labels[worst] == settings.template.major)),
            "good_drafts": _compared(grades[good], after_gated[good], after_always[good]),
            "all_drafts": _compared(grades, after_gated, after_always),
            "by_label": {
                label: _changed(grades[labels == label], after_gated[labels == label])
                for label in settings.template.labels
            },
            **_free_running(arguments, gated),
        }

    def drafts(
        self, reviser: LM, ranked: Sequence[RankedResponses]
    ) -> tuple[list[Prompt], list[Response], np.ndarray, np.ndarray]:
        """The prompts, their responses, these responses' grades [N], and whether each is its prompt's worst [N]."""
        prompts = [Prompt(id=record.id, messages=record.messages) for record in ranked]
        drafts, grades, worst = [], [], []
        for record in ranked:
            for i, (text, rank) in enumerate(zip(record.responses, record.ranks, strict=True)):
                drafts.append(written_response(reviser.tokenizer, f"{record.id}#{i}", record.id, text))
                grades.append(10 * exact(record.messages[-1]["content"], text))
                worst.append(rank == max(record.ranks))
        return prompts, drafts, np.asarray(grades), np.asarray(worst)


def _compared(before: np.ndarray, gated: np.ndarray, always: np.ndarray) -> dict[str, Any]:
    """Mean grades, and by how much gated revision beats revising everything, with its interval."""
    gain, low, high = metrics.mean_ci(gated - always)
    means = {"draft": before.mean(), "gated": gated.mean(), "always": always.mean()}
    return {name: float(mean) for name, mean in means.items()} | {"gated_gain": gain, "ci95": [low, high]}


def _changed(before: np.ndarray, after: np.ndarray) -> dict[str, float | None]:
    """Mean grades of drafts and revisions, and the share of revisions that are better; an equal one counts half."""
    if not before.size:
        return {"drafts": 0, "before": None, "after": None, "win_rate": None}
    wins = np.mean((after > before) + 0.5 * (after == before))
    return {
        "drafts": len(before), "before": float(before.mean()), "after": float(after.mean()), "win_rate": float(wins),
    }  # fmt: skip


def _free_running(arguments: tuple[Any, ...], gated: Sequence[Revision]) -> dict[str, float]:
    """How the reviser's greedy text after its request parses."""
    reviser, prompts, drafts, template, writing, key = arguments
    messages = {prompt.id: prompt.messages for prompt in prompts}
    requests = [Prompt(id=d.id, messages=template.ask(messages[d.prompt_id], d.text)) for d in drafts]
    written = generate(
        reviser, requests, temperature=0.0, max_new_tokens=writing.max_new_tokens, key=key,
        batch_size=writing.batch_size,
    )  # fmt: skip
    labels = [template.parse(response.text)[0] for response in written]
    return {
        "parse_rate": float(np.mean([label is not None for label in labels])),
        "label_followed": float(np.mean([label == r.label for label, r in zip(labels, gated, strict=True)])),
    }
