"""Self-Refine (arXiv 2303.17651): feedback that a critic is asked for, then a response that follows it."""

import functools
from collections.abc import Sequence

import jax

from jaxsi.lm import LM
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Improvement, Prompt
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.improve.rounds import Item, Method, Past, drafter, fault_of, next_record, respond, token_count
from jaxsi.stages.prompts.self_refine import SelfRefineTemplate


def self_refine(
    lm: LM, sampling: SamplingConfig, template: SelfRefineTemplate, critic: LM, cfg: SamplingConfig
) -> Method:
    """``critic`` (``lm`` itself in the paper) writes feedback, sampled by ``cfg``; ``lm`` follows it."""
    one_round = functools.partial(self_refine_round, lm, sampling=sampling, template=template, critic=critic, cfg=cfg)
    return Method(drafter(lm, sampling), one_round)


def self_refine_round(
    lm: LM,
    items: Sequence[Item],
    key: jax.Array,
    *,
    sampling: SamplingConfig,
    template: SelfRefineTemplate,
    critic: LM,
    cfg: SamplingConfig,
) -> list[Improvement]:
    """Feedback on the response, then a response in view of all responses and feedback so far. The response is kept if
    the feedback says that it is enough."""
    questions = [
        Prompt(id=prompt.id, messages=template.ask_feedback(prompt.messages, past[-1].response.text))
        for prompt, past in items
    ]
    feedback = respond(critic, questions, fold(key, "feedback"), cfg)
    requests = []
    for prompt, past in items:
        newest = feedback.get(prompt.id)
        if newest is not None and fault_of(newest) is None and not template.is_enough(newest.text):
            # The record of round r holds the feedback on the response of round r - 1.
            texts = [record.feedback or "" for record in past[1:]] + [newest.text]
            history = [(record.response.text, text) for record, text in zip(past, texts, strict=True)]
            requests.append(Prompt(id=prompt.id, messages=template.ask_refine(prompt.messages, history)))
    refined = respond(lm, requests, fold(key, "refined"), sampling)

    def record(prompt: Prompt, past: Past) -> Improvement:
        newest, response = feedback.get(prompt.id), refined.get(prompt.id)
        outcome = functools.partial(
            next_record,
            past,
            score=None,
            feedback=None if newest is None else newest.text,
            tokens=token_count(newest) + token_count(response),
        )
        fault = fault_of(newest)
        if fault is not None or newest is None:
            return outcome(fault or "too long")
        if template.is_enough(newest.text):
            return outcome("kept")
        fault = fault_of(response)
        return outcome("accepted", response=response) if fault is None else outcome(fault)

    return [record(prompt, past) for prompt, past in items]
