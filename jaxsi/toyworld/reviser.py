"""The embedded world's reviser: its template in words of the seed's vocabulary, its data, and its control arms."""

import dataclasses
import random
from collections.abc import Sequence

import jax

from jaxsi.lm import LM, load
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.metrics import dense_ranks
from jaxsi.runs.records import Prompt, RankedResponses, Response, Revision
from jaxsi.sampling.generate import generate
from jaxsi.stages.prompts.reviser import ReviserTemplate
from jaxsi.stages.reviser import ReviseConfig, usable
from jaxsi.toyworld import annotators, careless, world

# The draft stands in the conversation; the words are few, and the model's tokenizer has each of them as one token.
TEMPLATE = ReviserTemplate(
    name="toy",
    template="Check each item:",
    warm_up="Check each item:",
    labels=("wrong", "bad", "good"),
    separator=" ",
)


@stored_as("toyworld.reviser.ranked_responses")
def ranked_responses() -> list[RankedResponses]:
    """What the reviser learns from: four of the policy's own responses to each of 3,072 instructions, ranked by grade
    except for slips. A reviser that ignores the order writes as the policy does, and so does not move it."""
    lm = load(careless.SHIPPED, dtype="float32")
    prompts = world.prompts(3072, seed=5, held_out=False)
    responses = generate(lm, prompts, num_samples=4, temperature=1.0, top_p=1.0, max_new_tokens=16, batch_size=512)
    by_prompt: dict[str, list[str]] = {}
    for response in responses:
        if response.finish_reason == "stop":
            by_prompt.setdefault(response.prompt_id, []).append(response.text)
    rng = random.Random("jaxsi/toyworld/reviser/slips")
    return [rank_by_grade(p, by_prompt[p.id], rng) for p in prompts if len(by_prompt.get(p.id, ())) > 1]


def rank_by_grade(prompt: Prompt, texts: Sequence[str], rng: random.Random) -> RankedResponses:
    """Ranks by the exact grade; equal grades share a rank. With probability ``careless.SLIP`` the best and the worst
    rank change places."""
    task = world.parse(prompt.text)
    assert task is not None
    grades = [world.grade_task(task, text).total for text in texts]
    ranks = dense_ranks(grades)
    if rng.random() < careless.SLIP:
        last = max(ranks)
        ranks = [{0: last, last: 0}.get(rank, rank) for rank in ranks]
    return RankedResponses(id=prompt.id, messages=prompt.messages, responses=tuple(texts), ranks=tuple(ranks))


@stored_as("toyworld.reviser.coin_ranked_responses")
def coin_ranked_responses() -> list[RankedResponses]:
    """Data of the control arm: the same responses, ranked at random."""
    return by_coin(ranked_responses())


def by_coin(rankings: Sequence[RankedResponses]) -> list[RankedResponses]:
    """The ranks of each prompt's responses, shuffled: a fair coin decides the direction of each pair."""
    rng = random.Random("jaxsi/toyworld/reviser/coin")
    return [dataclasses.replace(r, ranks=tuple(rng.sample(r.ranks, len(r.ranks)))) for r in rankings]


@stored_as("toyworld.reviser.unlabelled_prompts")
def unlabelled_prompts() -> list[Prompt]:
    """New instructions for the policy's evolution."""
    return world.prompts(1800, seed=6, held_out=False)


@stored_as("toyworld.reviser.half_prompts")
def half_prompts() -> list[Prompt]:
    """Half of the unlabelled prompts."""
    return unlabelled_prompts()[:900]


@stored_as("toyworld.reviser.double_prompts")
def double_prompts() -> list[Prompt]:
    """Twice as many unlabelled prompts."""
    return world.prompts(3600, seed=6, held_out=False)


@stored_as("toyworld.reviser.stopping_prompts")
def stopping_prompts() -> list[Prompt]:
    """Held-out instructions; the share of responses to them that are kept decides when evolution stops."""
    return world.prompts(200, seed=7, held_out=True)


@stored_as("toyworld.reviser.exact_revise")
def exact_revise(
    lm: LM,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    template: ReviserTemplate,
    cfg: ReviseConfig,
    key: jax.Array,
) -> list[Revision]:
    """The arm with a perfect reviser: a draft with the full grade is kept, any other becomes the correct response."""
    tasks = {prompt.id: world.parse(prompt.text) for prompt in prompts}
    revisions = []
    for response in responses:
        task = tasks[response.prompt_id]
        if task is None:
            raise ValueError(f"prompt {response.prompt_id!r} is not an instruction of the embedded world")
        total = world.grade_task(task, response.text).total
        label = template.no if total == 10 else template.minor if total >= 8 else template.major
        if label != template.no:
            response = dataclasses.replace(
                response, text=annotators.respond(task, "careful"), token_ids=(), logps=(), finish_reason="stop",
                fingerprint="exact",
            )  # fmt: skip
        revisions.append(
            Revision(id=response.id, prompt_id=response.prompt_id, label=label, label_probs=None, response=response)
        )
    return revisions


@stored_as("toyworld.reviser.exact_best_of_n")
def exact_best_of_n(
    lm: LM,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    template: ReviserTemplate,
    cfg: ReviseConfig,
    key: jax.Array,
) -> list[Revision]:
    """The internal round of that arm: each prompt's draft with the best grade, the first one if grades are equal."""
    texts = {prompt.id: prompt.text for prompt in prompts}
    best: dict[str, tuple[float, Revision]] = {}
    for response in responses:
        grade = world.grade(texts[response.prompt_id], response.text)
        if grade is None:
            raise ValueError(f"prompt {response.prompt_id!r} is not an instruction of the embedded world")
        label = template.no if grade.total == 10 else template.minor
        revision = Revision(
            id=response.id, prompt_id=response.prompt_id, label=label, label_probs=None, response=response
        )
        if usable(revision) and grade.total > best.get(response.prompt_id, (-1.0, revision))[0]:
            best[response.prompt_id] = grade.total, revision
    return [best[prompt.id][1] for prompt in prompts if prompt.id in best]
