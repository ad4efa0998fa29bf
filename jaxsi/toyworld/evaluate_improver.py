"""Exact quality of what a PIT improver makes of a policy's responses to the held-out instructions."""

import dataclasses
from typing import Any

from jaxsi.lm import LM
from jaxsi.runs import metrics
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Response, Revision
from jaxsi.runs.run import Scope
from jaxsi.stages.gap import gains, gap_group
from jaxsi.stages.improve.pit import improve_once
from jaxsi.stages.pairs import preferences
from jaxsi.toyworld import careless, world
from jaxsi.toyworld.evaluate import ToyEvaluation, quality
from jaxsi.training.reward import GAP, inequalities


@stored_as("evals.toy_improved.ImprovedEvaluation")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImprovedEvaluation:
    """What is measured. Every iteration improves the same responses: those of the policy after RLHF, the one that is
    deployed, sampled with the noise of ``ToyEvaluation``."""

    num_prompts: int = 500
    num_samples: int = 4
    judged_prompts: int = 100
    preferences: int = 256

    def __call__(self, lm: LM, config: Any, scope: Scope, policy: LM | None, gap_reward: LM) -> dict[str, Any]:
        """One iteration's figures, by the run's ``config.request``. If ``policy`` is None, those of ``lm``'s own
        responses."""
        prompts = world.evaluation_prompts(self.num_prompts)
        sampled = ToyEvaluation(num_prompts=self.num_prompts, num_samples=self.num_samples)
        drafts = scope.records("eval_drafts", sampled.sample, policy or lm, of=Response)
        _, before = quality(prompts, drafts)
        if policy is None:
            return before

        def improved() -> list[Revision]:
            settings = {"temperature": sampled.temperature, "top_p": sampled.top_p, "batch_size": 512}
            key = sampled.key
            return improve_once(
                lm, prompts, drafts, config.request, key, max_new_tokens=sampled.max_new_tokens, **settings
            )  # fmt: skip

        revisions = scope.records("eval_improved", improved, of=Revision)
        responses = [dataclasses.replace(r.response, id=r.id, prompt_id=r.prompt_id) for r in revisions]
        graded, after = quality(prompts, responses)
        changes = list(zip(drafts, responses, strict=True))
        return after | {
            "draft": before["quality"],
            "draft_by_prompt": before["by_prompt"],
            "copied": sum(a.text == b.text for a, b in changes) / len(changes),
            "edit_distance": sum(metrics.edit_distance(a.text.split(), b.text.split()) for a, b in changes)
            / len(changes),
            **metrics.agreement_figures(self.agreement(prompts, drafts, responses, graded, gap_reward, config.request)),
            "inequalities": self.orders(gap_reward, config.request),
        }

    def agreement(
        self, prompts: Any, drafts: Any, responses: Any, graded: dict[str, float], gap_reward: LM, request: str
    ) -> metrics.PairwiseAgreement:
        """How often the gap reward orders two improved responses to one prompt as the grader does. The reference of
        both is the prompt's first draft."""
        messages = {prompt.id: prompt.messages for prompt in prompts[: self.judged_prompts]}
        first = {draft.prompt_id: draft.text for draft in reversed(drafts)}
        judged = [response for response in responses if response.prompt_id in messages]
        items = [(messages[r.prompt_id], r, first[r.prompt_id]) for r in judged]
        scores = gains(gap_reward, items, request, batch_size=256)
        return metrics.pairwise_agreement(
            scores.tolist(), [graded[r.id] for r in judged], [r.prompt_id for r in judged]
        )

    def orders(self, gap_reward: LM, request: str) -> dict[str, float]:
        """How often the gap reward satisfies each of the five inequalities, on held-out preferences without slips."""
        pairs, _ = preferences(careless.preferences(self.preferences, 9, least=1, held_out=True, slip=0.0))
        groups = [gap_group(gap_reward.tokenizer, pair, request) for pair in pairs]
        return dict(inequalities(gap_reward, groups, GAP, batch_size=256))
