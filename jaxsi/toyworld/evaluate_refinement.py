"""Exact quality of an SRT model's refined responses to the held-out instructions.

What counts as the model's answer is `refinement`, the rule of ``jaxsi improve srt``: the refined response, ungated.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxsi.lm import LM
from jaxsi.runs import metrics
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Critique, Prompt, Response
from jaxsi.runs.run import Scope
from jaxsi.sampling.generate import generate
from jaxsi.stages.critique import continue_critique
from jaxsi.stages.improve.srt import refinement, unmarked
from jaxsi.stages.prompts.critique import CritiqueTemplate
from jaxsi.toyworld import world
from jaxsi.toyworld.evaluate import ToyEvaluation, quality


@stored_as("evals.toy_refined.RefinedEvaluation")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinedEvaluation:
    """What is measured: drafts at temperature 0.7, then feedback and refinement at temperature 0, with the noise of
    ``ToyEvaluation``. The first ``reranked_prompts`` prompts are also answered by re-ranking."""

    num_prompts: int = 500
    num_samples: int = 4
    reranked_prompts: int = 250

    def __call__(self, lm: LM, config: Any, scope: Scope, refine: bool) -> dict[str, Any]:
        """One iteration's figures, by the run's ``config.template`` and ``config.critique``. If ``refine`` is False,
        only those of the first responses."""
        prompts = world.evaluation_prompts(self.num_prompts)
        sampled = ToyEvaluation(num_prompts=self.num_prompts, num_samples=self.num_samples)
        if not refine or config.first_stage.refinement_only:
            return quality(prompts, scope.records("eval_responses", sampled.sample, lm, of=Response))[1]
        template: CritiqueTemplate = config.template
        key = fold(sampled.key, "critique")

        def draft(count: int, asked: list[Prompt], name: str) -> list[Response]:
            return generate(
                lm, asked, num_samples=count, temperature=sampled.temperature, top_p=sampled.top_p,
                max_new_tokens=sampled.max_new_tokens, stop_text=template.feedback, key=fold(sampled.key, name),
                batch_size=512,
            )  # fmt: skip

        def criticise(drafts: list[Response]) -> list[Critique]:
            return continue_critique(lm, prompts, drafts, template, config.critique, key)

        drafts = scope.records("eval_drafts", draft, self.num_samples, prompts, "drafts", of=Response)
        critiques = scope.records("eval_critiques", criticise, drafts, of=Critique)
        first = [unmarked(draft, template) for draft in drafts]
        refined = [
            refinement(lm.tokenizer, draft, critique, template)[1]
            for draft, critique in zip(drafts, critiques, strict=True)
        ]
        graded_first, of_first = quality(prompts, first)
        _, figures = quality(prompts, refined)
        scored = [c for c in critiques if c.score is not None]
        agreement = metrics.pairwise_agreement(
            [c.score for c in scored], [graded_first[c.id] for c in scored], [c.prompt_id for c in scored]
        )
        return figures | {
            "first": of_first["quality"],
            "gain_of_refining": dict(zip(("mean", "low", "high"), metrics.mean_ci(
                np.asarray(figures["by_prompt"]) - np.asarray(of_first["by_prompt"]), seed=0), strict=True)),
            "feedback_rate": float(np.mean([template.unmarked(d.text) is not None for d in drafts])),
            "refined_rate": float(np.mean([c.improved is not None for c in critiques])),
            **metrics.agreement_figures(agreement),
            "parse_rate": len(scored) / len(critiques),
            "reranked": self.reranked(
                lm, prompts, drafts, critiques, figures["by_prompt"], draft, criticise, scope, template
            ),
        }  # fmt: skip

    def reranked(
        self, lm: LM, prompts: Any, drafts: Any, critiques: Any, by_prompt: Any, draft: Any, criticise: Any,
        scope: Scope, template: CritiqueTemplate,
    ) -> dict[str, Any]:  # fmt: skip
        """What re-ranking gives for the tokens that refining takes.

        One draft with its feedback and refinement costs as many generated tokens as n drafts, each with feedback up to
        its score. The draft with the highest of the model's own scores is chosen, the first one if scores are equal.
        """
        reranked = prompts[: self.reranked_prompts]
        draft_cost = np.mean([len(d.token_ids) for d in drafts])
        full = np.mean([len(lm.tokenizer.encode_text(c.text)) for c in critiques])
        short = np.mean([len(lm.tokenizer.encode_text(c.text.partition(template.improved)[0])) for c in critiques])
        count = max(2, int(np.ceil((draft_cost + full) / (draft_cost + short))))
        many = scope.records("eval_reranked_drafts", draft, count, reranked, "reranked", of=Response)
        scored = scope.records("eval_reranked_scores", criticise, many, of=Critique)
        scores = {c.id: -np.inf if c.score is None else c.score for c in scored}  # a score of 0 counts as a score
        best: dict[str, Response] = {}
        for response in many:
            previous = best.get(response.prompt_id)
            if previous is None or scores[response.id] > scores[previous.id]:
                best[response.prompt_id] = response
        chosen = [unmarked(response, template) for response in best.values()]
        _, figures = quality(reranked, chosen)
        gain = np.asarray(by_prompt[: len(reranked)]) - np.asarray(figures["by_prompt"])
        return {"samples": count, "quality": figures["quality"], "refined_is_better_by": metrics.mean_ci(gain, seed=0)}
