"""Drafts kept or revised by SEFT's adaptive reviser (arXiv 2406.10813)."""

import functools
from collections.abc import Sequence

import jax

from jaxsi.lm import LM
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Improvement, Revision
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.improve.rounds import Item, Method, Past, drafter, fault_of, next_record, token_count
from jaxsi.stages.prompts.reviser import ReviserTemplate
from jaxsi.stages.reviser import ReviseConfig, keep_prob, label_probs, revise


def seft(lm: LM, sampling: SamplingConfig, reviser: LM, template: ReviserTemplate, cfg: ReviseConfig) -> Method:
    """``lm`` drafts; ``reviser`` labels each response, and keeps or revises it."""
    return Method(drafter(lm, sampling), functools.partial(seft_round, reviser, template=template, cfg=cfg))


def seft_round(
    reviser: LM, items: Sequence[Item], key: jax.Array, *, template: ReviserTemplate, cfg: ReviseConfig
) -> list[Improvement]:
    """The reviser's likeliest label, which is the feedback, then its answer. On NO the response is kept as it is."""
    prompts = [prompt for prompt, _ in items]
    responses = [past[-1].response for _, past in items]
    revisions = revise(reviser, prompts, responses, template, cfg, fold(key, "revisions"))
    accepted = [r.response for r in revisions if r.label not in (None, template.no) and fault_of(r.response) is None]
    probs = label_probs(reviser, prompts, accepted, template, cfg)
    score = {response.id: None if row is None else row[-1] for response, row in zip(accepted, probs, strict=True)}

    def record(past: Past, revision: Revision) -> Improvement:
        if revision.label is None:
            return next_record(past, "too long", None)
        old_score = keep_prob(revision)
        if revision.label == template.no:
            return next_record(past, "kept", old_score, feedback=revision.label)
        response = revision.response
        fault, tokens = fault_of(response), token_count(response)
        if fault is not None:
            return next_record(past, fault, old_score, feedback=revision.label, tokens=tokens)
        return next_record(
            past, "accepted", score[revision.id], response=response, feedback=revision.label, tokens=tokens
        )

    return [record(past, revision) for (_, past), revision in zip(items, revisions, strict=True)]
