"""Revision of drafts by a reviser: its label, then the draft itself or a better answer (SEFT, arXiv 2406.10813).

A reviser reads a prompt and a draft, writes a label (rewrite, correct, keep) and then the final answer. The label is
the one whose whole string is likeliest. A draft to be kept is copied by this code, never generated again. The
probability of the label keep is also a score of the draft, at no extra cost.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Prompt, Response, Revision, SFTExample
from jaxsi.sampling import generate, scoring
from jaxsi.stages.answers import with_prompts
from jaxsi.stages.prompts.reviser import ReviserTemplate
from jaxsi.text.chat import render_prompt, render_response
from jaxsi.text.chat_config import split_thought
from jaxsi.text.tokenizer import Tokenizer

# Sample answers. The tokens that all of them share after a label belong to the label.
_PROBES = ("the", "A", "1", '"', "#", "é")


@stored_as("revise.ReviseConfig")
@dataclass(frozen=True, kw_only=True)
class ReviseConfig:
    """How a reviser answers drafts that it does not keep; its label is never sampled. ``batch_size`` rows are processed
    at a time."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    batch_size: int = 64

    def __post_init__(self) -> None:
        generate.check_sampling(self.temperature, self.max_new_tokens, self.batch_size, self.top_p)


def lead_ids(tokenizer: Tokenizer, template: ReviserTemplate) -> tuple[tuple[int, ...], ...]:
    """The token ids that a reviser's output begins with under each label: those that all answers after it share.

    A token may span the border between the label and its answer (the separator is often part of one of the two), so
    these ids may differ from those of the label's text alone.

    Raises: ValueError if the ids of one label are a prefix of another's, since their probabilities would overlap.
    """
    leads = []
    for label in template.labels:
        rows = [render_response(tokenizer, template.write(label, probe)) for probe in _PROBES]
        shared = 0
        while shared < min(map(len, rows)) and len({row[shared] for row in rows}) == 1:
            shared += 1
        leads.append(tuple(rows[0][:shared]))
    if any(a == b[: len(a)] for i, a in enumerate(leads) for j, b in enumerate(leads) if i != j):
        raise ValueError(
            f"reviser template {template.name!r}: with this tokenizer one of the labels {template.labels} is a "
            f"prefix of another ({leads}); choose other labels, or another separator"
        )
    return tuple(leads)


def label_probs(
    lm: LM, prompts: Sequence[Prompt], responses: Sequence[Response], template: ReviserTemplate, cfg: ReviseConfig
) -> list[tuple[float, float, float] | None]:
    """The probability of each label's whole string, normalised over the three; None if a draft leaves no room for its
    revision in the model's context.

    Raises: ValueError if a response id occurs twice, or if a response's prompt is not among ``prompts``.
    """
    requests = _requests(lm, prompts, responses, template)
    leads = lead_ids(lm.tokenizer, template)
    room = lm.config.max_positions - cfg.max_new_tokens - max(map(len, leads))
    fitting = [id for id, request in requests.items() if len(request) <= room]
    if not fitting:
        return [None] * len(responses)
    logps_N3 = scoring.score_choices(
        lm, [requests[id] for id in fitting], [leads] * len(fitting), batch_size=cfg.batch_size
    )
    probs_N3 = np.exp(logps_N3.astype(np.float64) - logps_N3.max(axis=1, keepdims=True))
    probs_N3 /= probs_N3.sum(axis=1, keepdims=True)
    probs_by_id = {id: tuple(row) for id, row in zip(fitting, probs_N3.tolist(), strict=True)}
    return [probs_by_id.get(response.id) for response in responses]


@stored_as("revise.revise")
def revise(
    lm: LM,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    template: ReviserTemplate,
    cfg: ReviseConfig,
    key: jax.Array,
) -> list[Revision]:
    """Revises each draft with the reviser ``lm``: the likeliest label, then the draft itself or a new answer.

    Args:
      prompts: at least those that the responses name.
      key: typed key of the stage; an answer's noise is folded from it and the draft's id.

    Returns: one Revision per response, in their order. If a draft leaves no room in the model's context, its label is
      None and its response is the draft.

    Raises: like `label_probs`.
    """
    return _revise(lm, prompts, responses, template, cfg, key, template.labels)


@stored_as("revise.always_revise")
def always_revise(
    lm: LM,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    template: ReviserTemplate,
    cfg: ReviseConfig,
    key: jax.Array,
) -> list[Revision]:
    """`revise` without the label keep: the likelier of the other two labels."""
    return _revise(lm, prompts, responses, template, cfg, key, (template.major, template.minor))


@stored_as("revise.best_of_n")
def best_of_n(
    lm: LM,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    template: ReviserTemplate,
    cfg: ReviseConfig,
    key: jax.Array,
) -> list[Revision]:
    """For each prompt, the unchanged draft that the reviser would most probably keep; among equal ones, the first.

    Drafts that were cut off, are empty or leave no room in the context are not chosen, so a prompt may be left without
    one. The arguments are those of `revise`; ``key`` is not used.
    """
    best: dict[str, Revision] = {}
    for revision in labelled_drafts(lm, prompts, responses, template, cfg):
        leader = best.get(revision.prompt_id)
        if usable(revision) and (leader is None or keep_prob(revision) > keep_prob(leader)):
            best[revision.prompt_id] = revision
    return [best[prompt.id] for prompt in prompts if prompt.id in best]


def labelled_drafts(
    lm: LM, prompts: Sequence[Prompt], responses: Sequence[Response], template: ReviserTemplate, cfg: ReviseConfig
) -> list[Revision]:
    """Each draft with its likeliest label, without a new answer."""
    probs = label_probs(lm, prompts, responses, template, cfg)
    return [
        Revision(
            id=response.id,
            prompt_id=response.prompt_id,
            label=None if row is None else template.labels[row.index(max(row))],
            label_probs=row,
            response=response,
        )
        for response, row in zip(responses, probs, strict=True)
    ]


def keep_prob(revision: Revision) -> float:
    """P(keep), the reviser's score of the draft."""
    assert revision.label_probs is not None
    return revision.label_probs[-1]


def keep_share(revisions: Sequence[Revision], template: ReviserTemplate) -> float | None:
    """The share of labelled drafts whose label is keep; None without labelled drafts."""
    labels = [revision.label for revision in revisions if revision.label is not None]
    return labels.count(template.no) / len(labels) if labels else None


def usable(revision: Revision) -> bool:
    """Whether a revision can be trained on: labelled, not cut off, and not empty."""
    response = revision.response
    return revision.label is not None and response.finish_reason == "stop" and bool(response.text.strip())


def targets(prompts: Sequence[Prompt], revisions: Sequence[Revision]) -> list[SFTExample]:
    """(x, target) of each usable revision."""
    messages = {prompt.id: prompt.messages for prompt in prompts}
    return [
        SFTExample(id=revision.id, messages=messages[revision.prompt_id], response=revision.response.text)
        for revision in revisions
        if usable(revision)
    ]


def revision_statistics(
    drafts: Sequence[Response], revisions: Sequence[Revision], template: ReviserTemplate
) -> dict[str, float | None]:
    """Counts of drafts, of revisions by label, and of reasons why some are not targets. "unchanged" is the share of
    revisions whose text equals the draft's."""
    counts = Counter(revision.label for revision in revisions)
    texts = {draft.id: draft.text for draft in drafts}
    unchanged = sum(revision.response.text == texts[revision.id] for revision in revisions)
    return {
        "drafts": float(len(drafts)),
        "revisions": float(len(revisions)),
        **{label: float(counts[label]) for label in template.labels},
        "too_long": float(counts[None]),
        "cut_off": float(sum(revision.response.finish_reason != "stop" for revision in revisions)),
        "empty": float(sum(not revision.response.text.strip() for revision in revisions)),
        "unchanged": unchanged / len(revisions) if revisions else None,
        "keep_share": keep_share(revisions, template),
    }


def _requests(
    lm: LM, prompts: Sequence[Prompt], responses: Sequence[Response], template: ReviserTemplate
) -> dict[str, list[int]]:
    """The token ids of each draft's request, by the draft's id."""
    return {
        response.id: render_prompt(lm.tokenizer, template.ask(prompt.messages, response.text))
        for prompt, response in with_prompts(prompts, responses)
    }


def _revise(
    lm: LM,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    template: ReviserTemplate,
    cfg: ReviseConfig,
    key: jax.Array,
    allowed: Sequence[str],
) -> list[Revision]:
    """`revise` with the likeliest of the ``allowed`` labels."""
    places = [template.labels.index(label) for label in allowed]
    drafts = {r.id: r for r in labelled_drafts(lm, prompts, responses, template, cfg)}
    for id, draft in drafts.items():
        if (probs := draft.label_probs) is not None:
            drafts[id] = replace(draft, label=template.labels[max(places, key=lambda place, p=probs: p[place])])
    changed = [draft for draft in drafts.values() if draft.label not in (None, template.no)]
    answers = _written(lm, prompts, changed, template, cfg, key)
    return [replace(draft, response=answers.get(id, draft.response)) for id, draft in drafts.items()]


def _written(
    lm: LM,
    prompts: Sequence[Prompt],
    changed: Sequence[Revision],
    template: ReviserTemplate,
    cfg: ReviseConfig,
    key: jax.Array,
) -> dict[str, Response]:
    """The answers that the reviser writes after each draft's label, by the draft's id."""
    if not changed:
        return {}
    requests = _requests(lm, prompts, [draft.response for draft in changed], template)
    leads = dict(zip(template.labels, lead_ids(lm.tokenizer, template), strict=True))
    rows = [[*requests[draft.id], *leads[draft.label]] for draft in changed if draft.label is not None]
    sampled = generate.generate_ids(
        lm,
        rows,
        generate.named_keys(key, [draft.id for draft in changed]),
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        max_new_tokens=cfg.max_new_tokens,
        batch_size=cfg.batch_size,
    )
    written = {}
    for draft, [triple] in zip(changed, sampled, strict=True):
        thought = split_thought(lm.tokenizer.decode(triple[0]))
        thought = thought._replace(answer=thought.answer.strip())  # a separator may be part of its first token
        old = draft.response
        written[draft.id] = generate.as_response(lm, old.id, old.prompt_id, old.sample, triple, thought)
    return written
