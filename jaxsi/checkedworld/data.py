"""What the methods learn from in this world: prompts, the verifier as judge, graded drafts, and the control arms."""

import dataclasses
import random
from collections.abc import Sequence

import jax

from jaxsi.checkedworld import world
from jaxsi.lm import LM, load
from jaxsi.runs.config_snapshot import may_move, stored_as
from jaxsi.runs.metrics import dense_ranks
from jaxsi.runs.records import Judgment, Prompt, RankedResponses, Response
from jaxsi.sampling.generate import generate
from jaxsi.stages.answers import with_prompts
from jaxsi.stages.judge import scored
from jaxsi.stages.pairs import permuted_within_prompt
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.verdicts import JudgeConfig


@stored_as("checkedworld.data.training_prompts")
def training_prompts() -> list[Prompt]:
    """The 720 training tasks."""
    return world.prompts("training")


@stored_as("checkedworld.data.later_prompts")
def later_prompts() -> list[Prompt]:
    """The second half of the training tasks, of which no reviser has seen drafts."""
    return training_prompts()[360:]


@stored_as("checkedworld.data.verifier")
def verifier(
    lm: LM | None, prompts: Sequence[Prompt], responses: Sequence[Response], rubric: AnyRubric, cfg: JudgeConfig,
    key: jax.Array,
) -> list[Judgment]:  # fmt: skip
    """The exact grade as a judge, and so as a reward: the share of its constraints that a response meets."""
    grades = [world.grade(world.task_of(p), r.text) for p, r in with_prompts(prompts, responses)]
    return scored(responses, grades, lm)


@stored_as("checkedworld.data.shuffled_verifier")
def shuffled_verifier(
    lm: LM | None, prompts: Sequence[Prompt], responses: Sequence[Response], rubric: AnyRubric, cfg: JudgeConfig,
    key: jax.Array,
) -> list[Judgment]:  # fmt: skip
    """The control: the same grades, shuffled among the responses of each prompt."""
    judgments = verifier(lm, prompts, responses, rubric, cfg, key)
    return permuted_within_prompt(judgments, seed=str(jax.random.key_data(key).tolist()))


@stored_as("checkedworld.data.GradedDrafts")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GradedDrafts:
    """Responses to training tasks, ranked by their exact grade: ``num_samples`` drafts of ``model``, and the worst of
    them mended by rule. Only finished drafts count. ``by_coin`` ranks at random, for the control."""

    model: str = dataclasses.field(metadata=may_move())
    tasks: int
    num_samples: int = 2
    max_new_tokens: int = 128
    by_coin: bool = False

    def __call__(self) -> list[RankedResponses]:
        lm = load(self.model, dtype="float32")
        prompts = world.prompts("training")[: self.tasks]
        drafts = generate(
            lm, prompts, num_samples=self.num_samples, temperature=0.8, top_p=0.95,
            max_new_tokens=self.max_new_tokens, batch_size=64,
        )  # fmt: skip
        finished: dict[str, list[str]] = {}
        for draft in drafts:
            if draft.finish_reason == "stop" and draft.text.strip():
                finished.setdefault(draft.prompt_id, []).append(draft.text)
        return [self._ranked(prompt, finished[prompt.id]) for prompt in prompts if prompt.id in finished]

    def _ranked(self, prompt: Prompt, drafts: Sequence[str]) -> RankedResponses:
        task = world.task_of(prompt)
        grades = {text: world.grade(task, text) for text in drafts}
        better = world.mended(task, min(grades, key=lambda text: grades[text]))
        grades |= {better: world.grade(task, better)}
        ranks = dense_ranks(list(grades.values()))
        if self.by_coin:
            random.Random(f"jaxsi/checkedworld/coin/{prompt.id}").shuffle(ranks)
        return RankedResponses(id=prompt.id, messages=prompt.messages, responses=tuple(grades), ranks=tuple(ranks))
