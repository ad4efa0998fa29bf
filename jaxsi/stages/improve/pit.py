"""PIT's improver: a model that answers (prompt, response) with a better response, and when to accept its answer.

Wang et al. 2024, arXiv 2310.00898. The improver reads the layout of ``prompts.ask_to_improve``. The paper does not say
when to stop improving. Our rule: accept a response if the gap reward model sees a gain over its reference.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from jaxsi.lm import LM
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Improvement, Outcome, Prompt, Response, Revision
from jaxsi.sampling.generate import SamplingConfig, generate
from jaxsi.stages.answers import with_prompts
from jaxsi.stages.gap import gains, gap_sequence
from jaxsi.stages.improve.rounds import (
    Item,
    Method,
    Past,
    drafter,
    fault_of,
    next_record,
    token_count,
)
from jaxsi.stages.prompts import ask_to_improve
from jaxsi.text.chat import render_prompt
from jaxsi.training.reward import lm_config, reads_as


def pit(
    lm: LM,
    sampling: SamplingConfig,
    improver: LM,
    request: str,
    *,
    gap_lm: LM | None = None,
    delta: float = 0.0,
) -> Method:
    """``lm`` drafts; ``improver`` improves while the gap reward model sees a gain, or in every round without one.

    Raises: RewardError: if ``gap_lm`` has no scalar head.
    """
    if gap_lm is not None:
        lm_config(gap_lm)
    one_round = functools.partial(pit_round, improver, request=request, sampling=sampling, gap_lm=gap_lm, delta=delta)
    return Method(drafter(lm, sampling), one_round)


def pit_round(
    improver: LM,
    items: Sequence[Item],
    key: jax.Array,
    *,
    request: str,
    sampling: SamplingConfig,
    gap_lm: LM | None,
    delta: float,
) -> list[Improvement]:
    """The improver's response, accepted if g(x, y, y_ref) - g(x, y_ref, y_ref) > ``delta``, with the response before as
    y_ref. Without ``gap_lm`` it is always accepted."""
    prompts = [prompt for prompt, _ in items]
    responses = [past[-1].response for _, past in items]
    settings = {name: value for name, value in sampling.settings.items() if name != "num_samples"}
    revisions = improve_once(improver, prompts, responses, request, fold(key, "improved"), **settings)
    improved: dict[str, Response] = {}
    for prompt, revision in zip(prompts, revisions, strict=True):
        if revision.label is None:
            improved[prompt.id] = dataclasses.replace(revision.response, id=revision.id, prompt_id=prompt.id)
    usable = [(p, improved[p.id], past[-1].response) for p, past in items if fault_of(improved.get(p.id)) is None]
    gain_by_id = None if gap_lm is None else _gains(gap_lm, improver, usable, request, sampling.batch_size)

    def record(prompt: Prompt, past: Past) -> Improvement:
        response = improved.get(prompt.id)
        fault, tokens, last_score = fault_of(response), token_count(response), past[-1].score
        if fault is not None:
            return next_record(past, fault, last_score, tokens=tokens)
        if gain_by_id is None:
            return next_record(past, "accepted", None, response=response, tokens=tokens)
        if prompt.id not in gain_by_id:
            return next_record(past, "too long", last_score, tokens=tokens)
        gain = gain_by_id[prompt.id]
        accepted = gain > delta
        outcome: Outcome = "accepted" if accepted else "rejected"
        return next_record(past, outcome, gain, response=response if accepted else None, tokens=tokens)

    return [record(prompt, past) for prompt, past in items]


def improve_once(
    lm: LM,
    prompts: Sequence[Prompt],
    drafts: Sequence[Response],
    request: str,
    key: jax.Array,
    **sampling: Any,
) -> list[Revision]:
    """The improver's response to each of ``drafts``, in their order; ``sampling`` goes to ``generate``.

    A draft that leaves no room for a response in the model's context comes back as it is, with the label "TOO LONG".

    Raises: ValueError if a draft's prompt is not among ``prompts``, or if a draft's id occurs twice.
    """
    requests = [
        Prompt(id=draft.id, messages=ask_to_improve(prompt.messages, draft.text, request))
        for prompt, draft in with_prompts(prompts, drafts)
    ]
    room = lm.config.max_positions - sampling["max_new_tokens"]
    fitting = [prompt for prompt in requests if len(render_prompt(lm.tokenizer, prompt.messages)) <= room]
    improved = {r.prompt_id: r for r in generate(lm, fitting, num_samples=1, key=key, **sampling)}
    return [
        Revision(
            id=draft.id,
            prompt_id=draft.prompt_id,
            label=None if draft.id in improved else "TOO LONG",
            label_probs=None,
            response=improved.get(draft.id, draft),
        )
        for draft in drafts
    ]


def _gains(
    gap_lm: LM, improver: LM, triples: Sequence[tuple[Prompt, Response, Response]], request: str, batch_size: int
) -> dict[str, float]:
    """The gain of each improved response over its reference, by the prompt's id. A prompt is left out if the gap reward
    model has no room for one of the two texts."""
    read = reads_as(gap_lm.tokenizer, improver.tokenizer)
    items = {}
    for prompt, new, old in triples:
        sequences = [
            gap_sequence(gap_lm.tokenizer, prompt.messages, text, old.text, request) for text in (read(new), old.text)
        ]
        if max(len(sequence.tokens) for sequence in sequences) <= gap_lm.config.max_positions:
            items[prompt.id] = prompt.messages, read(new), old.text
    values = gains(gap_lm, list(items.values()), request, batch_size=batch_size).tolist() if items else []
    return dict(zip(items, values, strict=True))
