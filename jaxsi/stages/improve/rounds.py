"""Responses improved at inference time: a draft to each prompt, then rounds that revise it, by any of five methods.

    y_0 ~ M(. | x);    y_r from x and y_0 .. y_{r-1},  r = 1 .. K

    method       a round writes                           y_r is new where              score (of y_r, but for PIT)
    srt          feedback on y, then a refined y          its score rises               what M itself gives it
    seft         a label, then a revised y                the label is not NO           the reviser's P(NO)
    pit          the improver's y                         the gap reward sees a gain    the newest response's gain
    self_refine  feedback, then a y that follows it       feedback has not "enough"     none
    best_of_n    N samples                                one of them scores higher     the judge's or reward model's

arXiv 2406.07168, 2406.10813, 2310.00898, 2303.17651. A prompt that a round did not improve has ended, but with
best_of_n, which goes on with other samples. The rule of srt beyond its first round and PIT's are ours.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from jaxsi.lm import LM
from jaxsi.runs import metrics
from jaxsi.runs.records import Critique, Improvement, Message, Outcome, Prompt, Response
from jaxsi.runs.run import fold
from jaxsi.sampling.generate import SamplingConfig, generate
from jaxsi.stages import reviser as reviselib
from jaxsi.stages.critique import CritiqueConfig, continue_critique, improved_responses
from jaxsi.stages.gap import gains, gap_sequence
from jaxsi.stages.improve import pit as improverlib
from jaxsi.stages.prompts.critique import CritiqueTemplate
from jaxsi.stages.prompts.reviser import ReviserTemplate
from jaxsi.stages.prompts.self_refine import SelfRefineTemplate
from jaxsi.stages.reviser import ReviseConfig
from jaxsi.text.chat import marker_ids, render_prompt
from jaxsi.text.tokenizer import Tokenizer
from jaxsi.training.reward import lm_config

Past = tuple[Improvement, ...]  # of one prompt, round 0 first
Item = tuple[Prompt, Past]
Draft = Callable[[Sequence[Prompt], jax.Array], list[Improvement]]
Round = Callable[[Sequence[Item], jax.Array], list[Improvement]]
Keep = Callable[[int, Sequence[Any], Callable[[Sequence[Any]], list[Improvement]]], list[Improvement]]


class Scored(NamedTuple):
    """A response's number, None where there is none, and the tokens that were generated for it."""

    score: float | None
    tokens: int


Scorer = Callable[[Sequence[Prompt], Sequence[Response], jax.Array], list[Scored]]


# ------------------------------------------------------------------------------------------------------------- the loop


def changed(last: Improvement) -> bool:
    """Whether a round gave a new response."""
    return last.outcome in ("draft", "accepted")


def answered(last: Improvement) -> bool:
    """Whether there is a response at all."""
    return bool(last.response.token_ids)


class Method(NamedTuple):
    """How round 0 drafts, what a later round does with the prompts that go on, and which these are."""

    draft: Draft
    round: Round
    goes_on: Callable[[Improvement], bool] = changed


def at_once(
    number: int, items: Sequence[Any], stage: Callable[[Sequence[Any]], list[Improvement]]
) -> list[Improvement]:
    """The stage of a round, computed and not kept."""
    return stage(items)


def improve(
    prompts: Sequence[Prompt | str],
    method: Method,
    *,
    rounds: int = 1,
    seed: int = 0,
    grade: Scorer | None = None,
    keep: Keep = at_once,
) -> list[list[Improvement]]:
    """Drafts a response to each prompt and improves it ``rounds`` times, e.g.
    ``improve(["Why is the sky blue?"], best_of_n(lm, SamplingConfig(num_samples=8), scorer))``.

    Args:
      prompts: records, or plain texts (which become prompts with their number as id).
      method: what `srt`, `seft`, `pit` or `self_refine` of this module gives, or `reranking.best_of_n`.
      grade: the ``quality`` of new responses; it decides nothing.
      keep: ``keep(round, items, stage)`` gives ``stage(items)``, or what it gave an earlier time; items may be cut in
        parts. A run's is ``lambda r, items, stage: run.at(f"round_{r}").sharded("responses", items, stage, ...)``.

    Returns: for each round from 0, one Improvement per prompt, in the order of ``prompts``.

    Raises: ValueError for a doubled prompt id or rounds below 0.
    """
    asked = [p if isinstance(p, Prompt) else Prompt.of(str(i), p) for i, p in enumerate(prompts)]
    if rounds < 0 or len({prompt.id for prompt in asked}) < len(asked):
        raise ValueError(f"rounds is {rounds} (at least 0), or two of the {len(asked)} prompts have one id")
    key = jax.random.key(seed)
    made = [keep(0, asked, functools.partial(_first, method, grade, key))]
    for number in range(1, rounds + 1):
        items = list(zip(asked, zip(*made, strict=True), strict=True))
        made.append(keep(number, items, functools.partial(_following, method, grade, key, number)))
    return made


def _first(method: Method, grade: Scorer | None, key: jax.Array, prompts: Sequence[Prompt]) -> list[Improvement]:
    return _graded(prompts, method.draft(prompts, fold(key, "round", 0)), grade, key)


def _following(
    method: Method, grade: Scorer | None, key: jax.Array, number: int, items: Sequence[Item]
) -> list[Improvement]:
    going = [(prompt, past) for prompt, past in items if method.goes_on(past[-1])]
    made = {new.prompt_id: new for new in method.round(going, fold(key, "round", number))} if going else {}
    records = [made[prompt.id] if prompt.id in made else step(past, "ended", past[-1].score) for prompt, past in items]
    return _graded([prompt for prompt, _ in items], records, grade, key)


def _graded(
    prompts: Sequence[Prompt], records: list[Improvement], grade: Scorer | None, key: jax.Array
) -> list[Improvement]:
    """The records, those of new responses with their quality; the noise of judging is the same in every round."""
    new = [record for record in records if changed(record)]
    if grade is None or not new:
        return records
    scored = grade(prompts, [record.response for record in new], fold(key, "quality"))
    of = {record.id: quality.score for record, quality in zip(new, scored, strict=True)}
    return [dataclasses.replace(r, quality=of[r.id]) if r.id in of else r for r in records]


def step(
    past: Past,
    outcome: Outcome,
    score: float | None,
    *,
    response: Response | None = None,
    feedback: str | None = None,
    tokens: int = 0,
) -> Improvement:
    """The next record of a prompt; without a response, with the one there is."""
    last = past[-1]
    return Improvement(
        id=f"{last.prompt_id}@{last.round + 1}", prompt_id=last.prompt_id, round=last.round + 1,
        response=last.response if response is None else response, outcome=outcome, score=score,
        quality=last.quality if response is None else None, feedback=feedback, tokens=tokens,
    )  # fmt: skip


def round_statistics(records: Sequence[Improvement]) -> dict[str, Any]:
    """One round in numbers: how many records have each outcome; means over the prompts with a response (``length`` in
    tokens; of ``score`` and ``quality`` those there are); tokens generated in all. What has no denominator is None."""
    counts = Counter(record.outcome for record in records)
    own = [record for record in records if answered(record)]
    grades = [record.quality for record in own if record.quality is not None]
    mean, low, high = metrics.mean_ci(np.asarray(grades), seed=0) if grades else (None, None, None)
    return {
        "prompts": len(records),
        "outcomes": {outcome: counts[outcome] for outcome in get_args(Outcome) if counts[outcome]},
        "mean_length": _mean([len(record.response.token_ids) for record in own]),
        "mean_score": _mean([record.score for record in own if record.score is not None]),
        "quality": {"mean": mean, "ci95": [low, high]} if grades else None,
        "tokens": sum(record.tokens for record in records),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


# ------------------------------------------------------------------------------------------------------------- writing


def draft_round(
    lm: LM, prompts: Sequence[Prompt], key: jax.Array, sampling: SamplingConfig, stop_text: str | None = None
) -> list[Improvement]:
    """Round 0: one response to each prompt; a prompt that leaves no room for one has an empty one, "too long"."""
    written = _written(lm, prompts, key, sampling, stop_text)
    return [
        Improvement(
            id=f"{prompt.id}@0", prompt_id=prompt.id, round=0, response=response or _absent(lm, prompt),
            outcome="draft" if response is not None else "too long", score=None, quality=None, feedback=None,
            tokens=0 if response is None else len(response.token_ids),
        )
        for prompt, response in ((prompt, written.get(prompt.id)) for prompt in prompts)
    ]  # fmt: skip


def _absent(lm: LM, prompt: Prompt) -> Response:
    return Response(
        id=f"{prompt.id}#0", prompt_id=prompt.id, sample=0, text="", token_ids=(), logps=(), finish_reason="length",
        fingerprint=lm.fingerprint, template=lm.tokenizer.template_hash,
    )  # fmt: skip


def _written(
    lm: LM, asked: Sequence[Prompt], key: jax.Array, sampling: SamplingConfig, stop_text: str | None = None
) -> dict[str, Response]:
    """A response to each prompt that leaves room for it, by the prompt's id."""
    room = lm.config.max_positions - sampling.max_new_tokens
    fitting = [prompt for prompt in asked if len(render_prompt(lm.tokenizer, prompt.messages)) <= room]
    settings = sampling.settings | {"num_samples": 1}
    return {r.prompt_id: r for r in generate(lm, fitting, key=key, stop_text=stop_text, **settings)}


def fault_of(response: Response | None) -> Outcome | None:
    """Why a response is of no use."""
    if response is None:
        return "too long"
    if response.finish_reason != "stop":
        return "cut off"
    return None if response.text.strip() else "empty"


def size_of(response: Response | None) -> int:
    """Its tokens; of none 0."""
    return 0 if response is None else len(response.token_ids)


# ----------------------------------------------------------------------------------------------------------------- SRT


def srt(lm: LM, sampling: SamplingConfig, template: CritiqueTemplate, cfg: CritiqueConfig) -> Method:
    """Self-refinement by a model that SRT trained (arXiv 2406.07168): ``lm`` drafts, criticises and refines."""

    def draft(prompts: Sequence[Prompt], key: jax.Array) -> list[Improvement]:
        drafts = draft_round(lm, prompts, key, sampling, stop_text=template.feedback)
        return [dataclasses.replace(d, response=_unmarked(d.response, template)) for d in drafts]

    return Method(draft, functools.partial(srt_round, lm, template=template, cfg=cfg))


def srt_round(
    lm: LM, items: Sequence[Item], key: jax.Array, *, template: CritiqueTemplate, cfg: CritiqueConfig
) -> list[Improvement]:
    """Feedback and a refined response, as ``lm`` goes on after its own; accepted where its score in a call of its own
    is above that of the response before.

    A response after which no feedback begins, or a part of it that does not parse, is "no response"; "kept" is one that
    is refined to itself. Texts are without the beginning of feedback, in which the ids end.
    """
    prompts = [prompt for prompt, _ in items]
    before = [_marked(lm.tokenizer, past[-1].response, template) for _, past in items]
    critiques = continue_critique(lm, prompts, before, template, cfg, fold(key, "critiques"))
    other = [c for c, r in zip(critiques, before, strict=True) if c.improved != _unmarked(r, template).text]
    refined = improved_responses(lm.tokenizer, other, template, marked=True)
    checks = continue_critique(lm, prompts, refined, template, cfg, fold(key, "checks"), score_only=True)
    after = {c.id: (r, c) for r, c in zip(refined, checks, strict=True)}
    return [
        _refined(lm.tokenizer, past, current, c, *after.get(c.id, (None, None)), template)
        for (_, past), current, c in zip(items, before, critiques, strict=True)
    ]


def _refined(
    tokenizer: Tokenizer,
    past: Past,
    current: Response,
    c: Critique,
    refined: Response | None,
    check: Critique | None,
    template: CritiqueTemplate,
) -> Improvement:
    made = functools.partial(
        step, past, feedback=c.text.partition(template.improved)[0].strip() or None,
        tokens=sum(len(tokenizer.encode_text(said.text)) for said in (c, check) if said is not None and said.text),
    )  # fmt: skip
    if template.unmarked(current.text) is None:
        return made("no response", past[-1].score)
    if c.improved is None:
        return made(_gap(c), c.score)
    if refined is None or check is None:
        return made("kept", c.score)
    if c.score is None or check.score is None:
        return made(_gap(check), c.score)
    if check.score > c.score:
        return made("accepted", check.score, response=_unmarked(refined, template))
    return made("rejected", c.score)


def _gap(c: Critique) -> Outcome:
    """Why a critique lacks a part; a call that left no room has written nothing and has not ended."""
    if c.finish_reason == "stop":
        return "no response"
    return "cut off" if c.text else "too long"


def _unmarked(response: Response, template: CritiqueTemplate) -> Response:
    """The response with the text alone, without what begins its feedback."""
    body = template.unmarked(response.text)
    return response if body is None else dataclasses.replace(response, text=body)


def _marked(tokenizer: Tokenizer, response: Response, template: CritiqueTemplate) -> Response:
    """What `_unmarked` was given: a response whose ids end in the marker of feedback has it in its text, too."""
    marker = marker_ids(tokenizer, template.feedback)
    if response.token_ids[-len(marker) :] != marker or response.text.endswith(template.feedback):
        return response
    return dataclasses.replace(response, text=template.marked(response.text))


# ---------------------------------------------------------------------------------------------------------------- SEFT


def seft(lm: LM, sampling: SamplingConfig, reviser: LM, template: ReviserTemplate, cfg: ReviseConfig) -> Method:
    """Drafts of ``lm``, kept or revised by SEFT's adaptive reviser (arXiv 2406.10813)."""
    return Method(drafter(lm, sampling), functools.partial(seft_round, reviser, template=template, cfg=cfg))


def seft_round(
    reviser: LM, items: Sequence[Item], key: jax.Array, *, template: ReviserTemplate, cfg: ReviseConfig
) -> list[Improvement]:
    """The reviser's likeliest label, which is the feedback, then its answer; on NO the response is kept as it is."""
    prompts = [prompt for prompt, _ in items]
    current = [past[-1].response for _, past in items]
    revisions = reviselib.revise(reviser, prompts, current, template, cfg, fold(key, "revisions"))
    new = [r.response for r in revisions if r.label not in (None, template.no) and fault_of(r.response) is None]
    probs = reviselib.label_probs(reviser, prompts, new, template, cfg)
    score = {response.id: None if row is None else row[-1] for response, row in zip(new, probs, strict=True)}

    def of(past: Past, revision: reviselib.Revision) -> Improvement:
        if revision.label is None:
            return step(past, "too long", None)
        own = reviselib.keep_prob(revision)
        if revision.label == template.no:
            return step(past, "kept", own, feedback=revision.label)
        fault, tokens = fault_of(revision.response), size_of(revision.response)
        if fault is not None:
            return step(past, fault, own, feedback=revision.label, tokens=tokens)
        response = revision.response
        return step(past, "accepted", score[revision.id], response=response, feedback=revision.label, tokens=tokens)

    return [of(past, revision) for (_, past), revision in zip(items, revisions, strict=True)]


# ----------------------------------------------------------------------------------------------------------------- PIT


def pit(
    lm: LM,
    sampling: SamplingConfig,
    improver: LM,
    request: str,
    *,
    gap_lm: LM | None = None,
    delta: float = 0.0,
) -> Method:
    """Drafts of ``lm``, improved by PIT's improver (arXiv 2310.00898) while its gap reward model sees a gain; without
    one, in every round. Raises: RewardError for a ``gap_lm`` without a scalar head."""
    if gap_lm is not None:
        lm_config(gap_lm)
    round = functools.partial(
        pit_round, improver, request=request, sampling=sampling, gap_lm=gap_lm, delta=delta
    )  # fmt: skip
    return Method(drafter(lm, sampling), round)


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
    """The improver's response, accepted where g(x, y, y_ref) - g(x, y_ref, y_ref) > ``delta``, y_ref being the response
    before; without ``gap_lm`` always."""
    prompts = [prompt for prompt, _ in items]
    current = [past[-1].response for _, past in items]
    settings = {name: value for name, value in sampling.settings.items() if name != "num_samples"}
    revisions = improverlib.improve(improver, prompts, current, request, fold(key, "improved"), **settings)
    improved: dict[str, Response] = {}
    for (prompt, _), revision in zip(items, revisions, strict=True):
        if revision.label is None:
            same_id = {"id": revision.id, "prompt_id": prompt.id}
            improved[prompt.id] = dataclasses.replace(revision.response, **same_id)
    usable = [(p, improved[p.id], past[-1].response) for p, past in items if fault_of(improved.get(p.id)) is None]
    gain = None if gap_lm is None else _gains(gap_lm, improver, usable, request, sampling.batch_size)

    def of(prompt: Prompt, past: Past) -> Improvement:
        new = improved.get(prompt.id)
        fault, last = fault_of(new), past[-1].score
        if fault is not None:
            return step(past, fault, last, tokens=size_of(new))
        if gain is None:
            return step(past, "accepted", None, response=new, tokens=size_of(new))
        if prompt.id not in gain:
            return step(past, "too long", last, tokens=size_of(new))
        taken = gain[prompt.id] > delta
        outcome: Outcome = "accepted" if taken else "rejected"
        return step(past, outcome, gain[prompt.id], response=new if taken else None, tokens=size_of(new))

    return [of(prompt, past) for prompt, past in items]


def _gains(
    gap_lm: LM, improver: LM, triples: Sequence[tuple[Prompt, Response, Response]], request: str, batch_size: int
) -> dict[str, float]:
    """The gain of each improved response over its reference, by the prompt's id; absent where the gap reward model has
    no room for one of the two texts."""
    shown = shown_to(gap_lm, improver)
    items: dict[str, tuple[tuple[Message, ...], Response | str, str]] = {}
    for prompt, new, old in triples:
        both = [
            gap_sequence(gap_lm.tokenizer, prompt.messages, text, old.text, request) for text in (shown(new), old.text)
        ]
        if max(len(sequence.tokens) for sequence in both) <= gap_lm.config.max_positions:
            items[prompt.id] = prompt.messages, shown(new), old.text
    values = gains(gap_lm, list(items.values()), request, batch_size=batch_size).tolist() if items else []
    return dict(zip(items, values, strict=True))


# --------------------------------------------------------------------------------------------------------- Self-Refine


def self_refine(
    lm: LM, sampling: SamplingConfig, template: SelfRefineTemplate, critic: LM, cfg: SamplingConfig
) -> Method:
    """Self-Refine (arXiv 2303.17651): ``critic``, by rights ``lm`` itself, writes feedback by ``cfg``; ``lm`` follows
    it."""
    round = functools.partial(self_refine_round, lm, sampling=sampling, template=template, critic=critic, cfg=cfg)
    return Method(drafter(lm, sampling), round)


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
    """Feedback on the response, then a response in view of all responses and feedback so far; kept where the feedback
    says that it is enough."""
    asked = [Prompt(id=p.id, messages=template.ask_feedback(p.messages, past[-1].response.text)) for p, past in items]
    told = _written(critic, asked, fold(key, "feedback"), cfg)
    requests = []
    for prompt, past in items:
        said = told.get(prompt.id)
        if said is not None and fault_of(said) is None and not template.is_enough(said.text):
            feedback = [record.feedback or "" for record in past[1:]] + [said.text]  # of round r on the one before
            history = [(r.response.text, text) for r, text in zip(past, feedback, strict=True)]
            requests.append(Prompt(id=prompt.id, messages=template.ask_refine(prompt.messages, history)))
    refined = _written(lm, requests, fold(key, "refined"), sampling)

    def of(prompt: Prompt, past: Past) -> Improvement:
        said, new = told.get(prompt.id), refined.get(prompt.id)
        made = functools.partial(
            step, past, score=None, feedback=None if said is None else said.text, tokens=size_of(said) + size_of(new)
        )
        fault = fault_of(said)
        if fault is not None or said is None:
            return made(fault or "too long")
        if template.is_enough(said.text):
            return made("kept")
        fault = fault_of(new)
        return made("accepted", response=new) if fault is None else made(fault)

    return [of(prompt, past) for prompt, past in items]


# -------------------------------------------------------------------------------------------------------------- models


def drafter(lm: LM, sampling: SamplingConfig) -> Draft:
    """Round 0 of most methods."""
    return lambda prompts, key: draft_round(lm, prompts, key, sampling)


def shown_to(reader: LM, writer: LM) -> Callable[[Response], Response | str]:
    """A sampled response as a reward model reads it: its ids where they mean the same to both, else its text."""
    a, b, probe = reader.tokenizer, writer.tokenizer, "Reverse: 12 red cats, über."
    same = a.template_hash == b.template_hash and a.vocab_size == b.vocab_size
    same = same and a.encode_text(probe) == b.encode_text(probe)
    return (lambda response: response) if same else (lambda response: response.text)
