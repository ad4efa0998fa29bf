"""Self-refinement at inference time by a model that SRT trained (arXiv 2406.07168).

The model drafts, goes on with feedback on its own response, and refines it. As in the paper, the answer of the first
round is the refined response, whatever its score. In a further round, which the paper does not use at inference, the
newer refinement replaces the one before only if the model scores it higher in a separate call: the best one is kept.
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


def srt(
    lm: LM, sampling: SamplingConfig, template: CritiqueTemplate, cfg: CritiqueConfig, *, gate: bool = False
) -> Method:
    """``lm`` drafts, criticises and refines; ``template`` is the one it was trained with. ``gate``: the first
    refinement, too, has to score higher than the response before."""

    def draft(prompts: Sequence[Prompt], key: jax.Array) -> list[Improvement]:
        drafts = draft_round(lm, prompts, key, sampling, stop_text=template.feedback)
        return [dataclasses.replace(d, response=unmarked(d.response, template)) for d in drafts]

    return Method(draft, functools.partial(srt_round, lm, template=template, cfg=cfg, gate=gate))


def srt_round(
    lm: LM, items: Sequence[Item], key: jax.Array, *, template: CritiqueTemplate, cfg: CritiqueConfig, gate: bool
) -> list[Improvement]:
    """Feedback and a refined response, written by ``lm`` after its own response.

    The outcomes are those of `refinement`. In rounds after the first, and in all rounds with ``gate``, a refined
    response is "rejected" unless it scores higher, in a separate call, than the response before. A score is that of the
    response of the record: None for a refinement that was taken without a call for its score. A response's token ids
    end in the marker that begins feedback; its text leaves the marker out.
    """
    prompts = [prompt for prompt, _ in items]
    responses = [_marked(lm.tokenizer, past[-1].response, template) for _, past in items]
    critiques = continue_critique(lm, prompts, responses, template, cfg, fold(key, "critiques"))
    results = [
        refinement(lm.tokenizer, response, critique, template)
        for response, critique in zip(responses, critiques, strict=True)
    ]
    scored = [
        _marked(lm.tokenizer, refined, template)
        for (_, past), (outcome, refined) in zip(items, results, strict=True)
        if outcome == "accepted" and (gate or past[-1].round > 0)
    ]
    checks = continue_score(lm, prompts, scored, template, cfg, fold(key, "checks"))
    check_by_id = {check.id: check for check in checks}
    return [
        _next_record(past, critique, result, check_by_id.get(critique.id), lm.tokenizer, template)
        for (_, past), critique, result in zip(items, critiques, results, strict=True)
    ]


def refinement(
    tokenizer: Tokenizer, response: Response, critique: Critique, template: CritiqueTemplate
) -> tuple[Outcome, Response]:
    """The answer of an SRT model, given its ``response`` with the marker of feedback, and its ``critique``: the refined
    response, whatever the scores ("accepted").

    Without one it is the response itself: "kept" if the refined response equals it; "no response" if no feedback
    follows it, or the refined response does not parse; "cut off" and "too long" if the tokens did not suffice.
    """
    draft = unmarked(response, template)
    if template.unmarked(response.text) is None:
        return "no response", draft
    if critique.improved is None:
        return _fault_of_critique(critique), draft
    if critique.improved == draft.text:
        return "kept", draft
    [refined] = improved_responses(tokenizer, [critique], template, marked=True)
    return "accepted", dataclasses.replace(unmarked(refined, template), sample=draft.sample)


def _next_record(
    past: Past,
    critique: Critique,
    result: tuple[Outcome, Response],
    check: Critique | None,
    tokenizer: Tokenizer,
    template: CritiqueTemplate,
) -> Improvement:
    """The record of a round; ``check`` is the critique of a refined response whose score decides."""
    outcome, refined = result
    texts = [critique.text] if check is None else [critique.text, check.text]
    record = functools.partial(
        next_record,
        past,
        feedback=critique.text.partition(template.improved)[0].strip() or None,
        tokens=sum(len(tokenizer.encode_text(text)) for text in texts if text),
    )
    if outcome != "accepted":
        return record(outcome, past[-1].score if critique.score is None else critique.score)
    if check is None:
        return record("accepted", None, response=refined)
    if critique.score is None or check.score is None:
        return record(_fault_of_critique(check), critique.score)
    if check.score > critique.score:
        return record("accepted", check.score, response=refined)
    return record("rejected", critique.score)


def _fault_of_critique(critique: Critique) -> Outcome:
    """Why a critique lacks a part. A request without room for an answer has an empty text and no end."""
    if critique.finish_reason == "stop":
        return "no response"
    return "cut off" if critique.text else "too long"


def unmarked(response: Response, template: CritiqueTemplate) -> Response:
    """The response without the marker that begins its feedback."""
    text = template.unmarked(response.text)
    return response if text is None else dataclasses.replace(response, text=text)


def _marked(tokenizer: Tokenizer, response: Response, template: CritiqueTemplate) -> Response:
    """Undoes `_unmarked`: a response whose token ids end in the marker of feedback gets the marker back in its text."""
    marker = marker_ids(tokenizer, template.feedback)
    if response.token_ids[-len(marker) :] != marker or response.text.endswith(template.feedback):
        return response
    return dataclasses.replace(response, text=template.marked(response.text))
