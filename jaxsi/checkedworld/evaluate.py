"""How many constraints of the held-out tasks a model's responses meet, and how well a judge of the run sees it."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsi.checkedworld import world
from jaxsi.evals.held_out import Respond, first_response, lengths_of
from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.metrics import mean_ci
from jaxsi.runs.records import Prompt, Response
from jaxsi.runs.run import Scope
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.answers import with_room


@stored_as("checkedworld.evaluate.ConstraintsMet")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstraintsMet:
    """What a config gives as ``evaluate``. Every model responds with the same noise, so that differences between
    iterations come from the models alone. ``respond`` is how the method's model answers; ``most``: the first tasks."""

    sampling: SamplingConfig
    respond: Respond = first_response
    most: int | None = None

    def __call__(self, lm: LM, config: Any, scope: Scope, *context: Any) -> dict[str, Any]:
        """One iteration's figures, see `quality`. The scope keeps the responses."""
        sampling = dataclasses.replace(self.sampling, num_samples=1)
        prompts = with_room(lm, world.prompts("held_out")[: self.most], sampling.max_new_tokens)
        responses = scope.sharded(
            "eval_responses", prompts, self.respond, lm, config, sampling, *context, of=Response,
            shard_size=sampling.batch_size,
        )  # fmt: skip
        return quality(prompts, responses)


def quality(prompts: Sequence[Prompt], responses: Sequence[Response]) -> dict[str, Any]:
    """The share of constraints that responses to tasks of this world meet, from 0 to 100, one response to a prompt.

    Returns: {"quality": {"mean", "ci95"}: over prompts; "all_met": share of responses that meet all; "kinds": the share
      of each kind of constraint; "by_prompt"; "mean_length" (tokens), "cut_off" (share)}.
    """
    tasks = {prompt.id: world.task_of(prompt) for prompt in prompts}
    by_prompt: list[float] = []
    kinds: dict[str, list[bool]] = defaultdict(list)
    for response in responses:
        task = tasks[response.prompt_id]
        met = world.met(task, response.text)
        by_prompt.append(100 * sum(met) / len(met))
        for (kind, _), is_met in zip(task.constraints, met, strict=True):
            kinds[kind].append(is_met)
    mean, low, high = mean_ci(by_prompt)
    return {
        "quality": {"mean": mean, "ci95": [low, high]},
        "all_met": float(np.mean([share == 100 for share in by_prompt])),
        "kinds": {kind: float(np.mean(values)) for kind, values in sorted(kinds.items())},
        "by_prompt": by_prompt,
        **lengths_of(responses),
    }
