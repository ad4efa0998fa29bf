"""Synthetic preferences: the answer of a stronger model is preferred to that of a weaker one.

The third data set of PIT (arXiv 2310.00898) is of this kind: instructions, a better answer by a larger model and a
worse one by a smaller model. Its recipe is not known: neither the instructions nor the models nor any filter. So all
settings here are this project's.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import jax

from jaxsi.lm import borrowed
from jaxsi.runs.config_snapshot import may_move, stored_as
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Prompt, RankedResponses, Response
from jaxsi.sampling.generate import SamplingConfig, generate
from jaxsi.stages.answers import with_room

_log = logging.getLogger(__name__)


@stored_as("synthetic.StrongOverWeak")
@dataclasses.dataclass(frozen=True, kw_only=True)
class StrongOverWeak:
    """Preferences for PIT's ``preferences``, made from ``prompts``: an answer of the model ``strong`` and one of the
    model ``weak`` to each, both sampled by ``sampling``, and the first is preferred.

    The result depends on the models, the prompts and ``seed`` alone: calling it again after a kill gives the same.
    """

    strong: str = dataclasses.field(metadata=may_move())
    weak: str = dataclasses.field(metadata=may_move())
    prompts: Callable[[], list[Prompt]]
    sampling: SamplingConfig = SamplingConfig(num_samples=1, temperature=1.0, top_p=1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampling.num_samples != 1:
            raise ValueError(
                f"sampling.num_samples is {self.sampling.num_samples}; a preference has 1 answer of each model"
            )

    def __call__(self) -> list[RankedResponses]:
        """A record for each prompt, in their order, with the prompt's id. Left out, and counted in the log, are prompts
        that leave one of the models no room, those with an answer that is empty or that the token limit cut off, and
        those with two equal answers.

        Raises: ValueError if two prompts have the same id, or if no preference is left.
        """
        prompts = self.prompts()
        if len({prompt.id for prompt in prompts}) < len(prompts):
            raise ValueError(f"two of the {len(prompts)} prompts have the same id; ids are unique")
        strong, weak = (self._answers(role, prompts) for role in ("strong", "weak"))
        found = []
        for prompt in prompts:
            better, worse = (answers.get(prompt.id) for answers in (strong, weak))
            if better is not None and worse is not None and better != worse:
                messages, responses = prompt.messages, (better, worse)
                found.append(RankedResponses(id=prompt.id, messages=messages, responses=responses, ranks=(0, 1)))
        _log.warning(
            "%d of %d prompts became preferences of %s over %s", len(found), len(prompts), self.strong, self.weak
        )
        if not found:
            raise ValueError(
                f"none of {len(prompts)} prompts has two finished, different answers of {self.strong} and {self.weak}; "
                "raise sampling.max_new_tokens, or give other models"
            )
        return found

    def _answers(self, role: str, prompts: Sequence[Prompt]) -> dict[str, str]:
        """The finished answers of a model, by prompt id."""
        lm = borrowed(getattr(self, role), self.sampling.dtype)
        key = fold(jax.random.key(self.seed, impl="threefry2x32"), "synthetic preferences", role)
        fitting = with_room(lm, prompts, self.sampling.max_new_tokens)
        written: list[Response] = generate(lm, fitting, key=key, **self.sampling.settings)
        return {r.prompt_id: r.text.strip() for r in written if r.finish_reason == "stop" and r.text.strip()}
