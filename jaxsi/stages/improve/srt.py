"""Self-refinement at inference time by a model that SRT trained (arXiv 2406.07168).

The model drafts, goes on with feedback on its own response, and refines it. A refined response is accepted only if the
model scores it higher in a separate call.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax

from jaxsi.lm import LM
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Critique, Improvement, Outcome, Prompt, Response
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.critique import CritiqueConfig, continue_critique, continue_score, improved_responses
from jaxsi.stages.improve.rounds import Item, Method, Past, draft_round, next_record
from jaxsi.stages.prompts.critique import CritiqueTemplate
from jaxsi.text.chat import marker_ids
from jaxsi.text.tokenizer import Tokenizer


def srt(lm: LM, sampling: SamplingConfig, template: CritiqueTemplate, cfg: CritiqueConfig) -> Method:
    """``lm`` drafts, criticises and refines; ``template`` is the one it was trained with."""

    def draft(prompts: Sequence[Prompt], key: jax.Array) -> list[Improvement]:
        drafts = draft_round(lm, prompts, key, sampling, stop_text=template.feedback)
        return [dataclasses.replace(d, response=_unmarked(d.response, template)) for d in drafts]

    return Method(draft, functools.partial(srt_round, lm, template=template, cfg=cfg))


def srt_round(
    lm: LM, items: Sequence[Item], key: jax.Array, *, template: CritiqueTemplate, cfg: CritiqueConfig
) -> list[Improvement]:
    """Feedback and a refined response, written by ``lm`` after its own response.

    The outcome is "accepted" if the refined response scores higher, in a separate call, than the response before;
    "kept" if it equals the response before; "no response" if no feedback follows the response or a part of the feedback
    does not parse. A response's token ids end in the marker that begins feedback; its text leaves the marker out.
    """
    prompts = [prompt for prompt, _ in items]
    responses = [_marked(lm.tokenizer, past[-1].response, template) for _, past in items]
    critiques = continue_critique(lm, prompts, responses, template, cfg, fold(key, "critiques"))
    changes = [
        critique
        for critique, response in zip(critiques, responses, strict=True)
        if critique.improved != _unmarked(response, template).text
    ]
    refined = improved_responses(lm.tokenizer, changes, template, marked=True)
    checks = continue_score(lm, prompts, refined, template, cfg, fold(key, "checks"))
    refined_by_id = {check.id: response for check, response in zip(checks, refined, strict=True)}
    check_by_id = {check.id: check for check in checks}
    return [
        _next_record(
            past,
            critique,
            lm.tokenizer,
            template,
            ends_in_marker=template.unmarked(response.text) is not None,
            refined=refined_by_id.get(critique.id),
            check=check_by_id.get(critique.id),
        )
        for (_, past), response, critique in zip(items, responses, critiques, strict=True)
    ]


def _next_record(
    past: Past,
    critique: Critique,
    tokenizer: Tokenizer,
    template: CritiqueTemplate,
    *,
    ends_in_marker: bool,
    refined: Response | None,
    check: Critique | None,
) -> Improvement:
    texts = [critique.text] if check is None else [critique.text, check.text]
    record = functools.partial(
        next_record,
        past,
        feedback=critique.text.partition(template.improved)[0].strip() or None,
        tokens=sum(len(tokenizer.encode_text(text)) for text in texts if text),
    )
    if not ends_in_marker:
        return record("no response", past[-1].score)
    if critique.improved is None:
        return record(_fault_of_critique(critique), critique.score)
    if refined is None or check is None:
        return record("kept", critique.score)
    if critique.score is None or check.score is None:
        return record(_fault_of_critique(check), critique.score)
    if check.score > critique.score:
        return record("accepted", check.score, response=_unmarked(refined, template))
    return record("rejected", critique.score)


def _fault_of_critique(critique: Critique) -> Outcome:
    """Why a critique lacks a part. A request without room for an answer has an empty text and no end."""
    if critique.finish_reason == "stop":
        return "no response"
    return "cut off" if critique.text else "too long"


def _unmarked(response: Response, template: CritiqueTemplate) -> Response:
    """The response without the marker that begins its feedback."""
    text = template.unmarked(response.text)
    return response if text is None else dataclasses.replace(response, text=text)


def _marked(tokenizer: Tokenizer, response: Response, template: CritiqueTemplate) -> Response:
    """Undoes `_unmarked`: a response whose token ids end in the marker of feedback gets the marker back in its text."""
    marker = marker_ids(tokenizer, template.feedback)
    if response.token_ids[-len(marker) :] != marker or response.text.endswith(template.feedback):
        return response
    return dataclasses.replace(response, text=template.marked(response.text))
