"""Critics: language feedback, a score and an improved response to every response (SRT, arXiv 2406.07168).

A critic is a function (prompts, responses, template, key) -> critiques: a stronger local model (`LocalCritic`), a model
behind an endpoint (`endpoint.EndpointCritic`), the embedded world's exact critic, or the model itself, which continues
its own response (`continue_critique`). Parts that do not parse are None; they are dropped and counted later.
"""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax

from jaxsi.lm import LM, borrowed
from jaxsi.runs.config_snapshot import AUTO, may_move, stored_as
from jaxsi.runs.records import Critique, FinishReason, PreferencePair, Prompt, Response, SFTExample
from jaxsi.runs.run import StaleRecordsError
from jaxsi.sampling import generate
from jaxsi.stages.answers import with_prompts, with_room
from jaxsi.stages.prompts import question_text
from jaxsi.stages.prompts.critique import CritiqueTemplate
from jaxsi.text.chat import marker_ids, render_prompt, render_response
from jaxsi.text.chat_config import split_thought
from jaxsi.text.tokenizer import Tokenizer

Critic = Callable[[Sequence[Prompt], Sequence[Response], CritiqueTemplate, jax.Array], list[Critique]]


@stored_as("critique.CritiqueConfig")
@dataclass(frozen=True, kw_only=True)
class CritiqueConfig:
    """How a model critiques its own responses. The paper's temperature is 0."""

    temperature: float = 0.0
    max_new_tokens: int = 2048
    batch_size: int = 64

    def __post_init__(self) -> None:
        generate.check_sampling(self.temperature, self.max_new_tokens, self.batch_size)


@stored_as("critique.LocalCritic")
@dataclass(frozen=True, kw_only=True)
class LocalCritic:
    """A stronger model on this machine: ``model`` is anything that ``load`` takes, with all devices on fsdp. On resume
    a copy may take its place: see `check_same_critic`."""

    model: str = dataclasses.field(metadata=may_move())
    temperature: float = 0.0
    max_new_tokens: int = 2048
    batch_size: int = 64
    dtype: str = AUTO

    def __post_init__(self) -> None:
        generate.check_sampling(self.temperature, self.max_new_tokens, self.batch_size)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], template: CritiqueTemplate, key: jax.Array
    ) -> list[Critique]:
        """One critique for each response; an empty one if the request leaves no room for feedback."""
        lm = borrowed(self.model, self.dtype)
        fitting = with_room(lm, critic_requests(prompts, responses, template), self.max_new_tokens)
        written = generate.generate(
            lm,
            fitting,
            num_samples=1,
            temperature=self.temperature,
            top_p=1.0,
            max_new_tokens=self.max_new_tokens,
            key=key,
            batch_size=self.batch_size,
        )
        texts = {w.prompt_id: (w.text, w.finish_reason) for w in written}
        return [
            critique(response, *texts.get(response.id, ("", "length")), template, lm.fingerprint, lm.tokenizer)
            for response in responses
        ]


def check_same_critic(critic: Critic, critiques: Sequence[Critique]) -> None:
    """Raises: StaleRecordsError if the model of a `LocalCritic` has changed since the first of ``critiques``."""
    if not isinstance(critic, LocalCritic) or not critiques:
        return
    first = critiques[0]
    for c in critiques:
        if (c.fingerprint, c.template) != (first.fingerprint, first.template):
            raise StaleRecordsError(
                f"{critic.model} now has the weights {c.fingerprint} and the chat template {c.template}, but critique "
                f"{first.id!r} of this run is by {first.fingerprint} with {first.template}; give it back the model "
                "that the run began with and delete the newer critiques, or start a new run directory"
            )


@stored_as("critique_by")
@dataclass(frozen=True)
class CritiqueBy:
    """A plain function of texts as a critic: see `critique_by`."""

    function: Callable[[str, str], str]

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], template: CritiqueTemplate, key: jax.Array
    ) -> list[Critique]:
        texts = {prompt.id: question_text(prompt.messages) for prompt in prompts}
        return [
            critique(response, self.function(texts[response.prompt_id], response.text), "stop", template, "")
            for response in responses
        ]


def critique_by(function: Callable[[str, str], str]) -> CritiqueBy:
    """A critic for SRT's ``critic``: `function(prompt, response)` returns a critique in the format of the run's
    template, which `template.write` makes. With SRT's own template, its lines begin with "Weaknesses:", "Suggestions:",
    "Overall Score:" and "### Improved Response"; a critique may leave parts out. The rules for the function of
    ``judge_by`` apply."""
    return CritiqueBy(function)


def critic_requests(
    prompts: Sequence[Prompt], responses: Sequence[Response], template: CritiqueTemplate
) -> list[Prompt]:
    """The critic's request for each response, under the response's id.

    Raises: ValueError if a response's prompt is not among ``prompts``, or if an id occurs twice; the message names it.
    """
    return [
        Prompt.of(response.id, template.render(question_text(prompt.messages), response.text))
        for prompt, response in with_prompts(prompts, responses)
    ]


def critique(
    response: Response,
    text: str,
    finish_reason: FinishReason,
    template: CritiqueTemplate,
    fingerprint: str,
    tokenizer: Tokenizer | None = None,
) -> Critique:
    """A critic's text as a record; an improved response that the token limit cut off is left out."""
    parts = template.parse(text, cut_off=finish_reason != "stop")
    return Critique(
        id=response.id,
        prompt_id=response.prompt_id,
        weaknesses=parts.weaknesses,
        suggestions=parts.suggestions,
        score=None if parts.score is None else float(parts.score),
        improved=parts.improved if finish_reason == "stop" else None,
        text=text,
        finish_reason=finish_reason,
        fingerprint=fingerprint,
        template="" if tokenizer is None else tokenizer.template_hash,
    )


# ----------------------------------------------------------------------------------------------- a model's own feedback


def marked_response(
    tokenizer: Tokenizer, id: str, prompt_id: str, text: str, template: CritiqueTemplate, fingerprint: str
) -> Response:
    """A text as a response that ends with the feedback marker instead of an end of turn, like those of ``generate``
    with ``stop_text=template.feedback``."""
    ids, marker = render_response(tokenizer, template.marked(text)), list(marker_ids(tokenizer, template.feedback))
    end = next((i for i in range(len(ids) - len(marker), -1, -1) if ids[i : i + len(marker)] == marker), None)
    if end is None:
        raise ValueError(
            f"response {id!r}: the tokens of {template.feedback!r} depend on the text before them; choose a "
            "heading that always begins a new token"
        )
    return Response(
        id=id,
        prompt_id=prompt_id,
        sample=0,
        text=template.marked(text),
        token_ids=tuple(ids[: end + len(marker)]),
        logps=(),
        finish_reason="stop",
        fingerprint=fingerprint,
        template=tokenizer.template_hash,
    )


def continue_critique(
    lm: LM,
    prompts: Sequence[Prompt],
    drafts: Sequence[Response],
    template: CritiqueTemplate,
    cfg: CritiqueConfig,
    key: jax.Array,
    *,
    marker: Sequence[int] = (),
) -> list[Critique]:
    """Continues prompt and marked draft with ``lm``: its own feedback and improved response. The continuation follows
    the draft's own ids, so that y, f and r are one sequence.

    A draft without a marker, or without room after it, gets an empty critique.

    Args:
      marker: token ids at which the continuation stops, beside the end of the turn.
    """
    heads = {prompt.id: render_prompt(lm.tokenizer, prompt.messages) for prompt in prompts}
    room = lm.config.max_positions - cfg.max_new_tokens
    prefixes = {
        draft.id: [*heads[draft.prompt_id], *draft.token_ids]
        for draft in drafts
        if template.unmarked(draft.text) is not None
    }
    ids = [id for id, prefix in prefixes.items() if len(prefix) <= room]
    sampled = generate.generate_ids(
        lm,
        [prefixes[id] for id in ids],
        generate.named_keys(key, ids),
        temperature=cfg.temperature,
        top_p=1.0,
        max_new_tokens=cfg.max_new_tokens,
        marker=marker,
        batch_size=cfg.batch_size,
    )
    texts: dict[str, tuple[str, FinishReason]] = {}
    for id, [(token_ids, _, stopped)] in zip(ids, sampled, strict=True):
        # The thought, if any, was before the draft: a template begins it at the start of the turn.
        thought = split_thought(lm.tokenizer.decode(token_ids))
        texts[id] = (thought.answer, "stop" if stopped and thought.closed else "length")
    return [
        critique(draft, *texts.get(draft.id, ("", "length")), template, lm.fingerprint, lm.tokenizer)
        for draft in drafts
    ]


def continue_score(
    lm: LM,
    prompts: Sequence[Prompt],
    drafts: Sequence[Response],
    template: CritiqueTemplate,
    cfg: CritiqueConfig,
    key: jax.Array,
) -> list[Critique]:
    """`continue_critique` up to the improved response, for calls that need only the score."""
    marker = marker_ids(lm.tokenizer, template.improved)
    return continue_critique(lm, prompts, drafts, template, cfg, key, marker=marker)


def read_drafts(
    drafts: Sequence[Response], critic: Critic, prompts: Sequence[Prompt], template: CritiqueTemplate, key: jax.Array
) -> list[Critique]:
    """The critiques of ``drafts`` by a critic from outside; a stage for ``Scope.sharded``."""
    return critic(prompts, drafts, template, key)


# ----------------------------------------------------------------------------------------------------- filters and data


def improved_responses(
    tokenizer: Tokenizer, critiques: Sequence[Critique], template: CritiqueTemplate, *, marked: bool
) -> list[Response]:
    """The improved responses as separate responses, under the ids of the drafts, for a second, independent call of the
    critic."""
    responses = []
    for c in critiques:
        if c.improved is None:
            continue
        response = marked_response(tokenizer, c.id, c.prompt_id, c.improved, template, c.fingerprint)
        responses.append(response if marked else replace(response, text=c.improved))
    return responses


def has_all_parts(c: Critique) -> bool:
    """Whether a critique has all its parts (the paper's first filter)."""
    return None not in (c.weaknesses, c.suggestions, c.score, c.improved)


def best_refinements(
    critiques: Sequence[Critique], rounds: Sequence[Sequence[Critique]]
) -> tuple[list[Critique], list[Critique]]:
    """The critiques with the best-scored of several refinements in the place of the first, and that refinement's own
    critique. The paper does so if there are several rounds. Among equal scores the earlier round is taken; a round
    without a score is taken only if no other has one.

    Args:
      critiques: of the drafts; their improved responses are those of the first round.
      rounds: for each round the critiques of its improved responses, under the ids of the drafts; those of round k hold
        the improved responses of round k + 1.
    """
    best: dict[str, tuple[Critique, Critique]] = {}  # (what the refinement is written in, its own critique)
    for source, checks in zip([critiques, *rounds], rounds, strict=False):
        written_in = {c.id: c for c in source}
        for check in checks:
            leader = best.get(check.id)
            if leader is None or _is_better(check.score, leader[1].score):
                best[check.id] = written_in[check.id], check
    chosen = [replace(c, improved=best[c.id][0].improved) if c.id in best else c for c in critiques]
    return chosen, [best[c.id][1] for c in critiques if c.id in best]


def _is_better(score: float | None, than: float | None) -> bool:
    return score is not None and (than is None or score > than)


def mean_scores(critiques: Sequence[Critique], rounds: Sequence[Sequence[Critique]]) -> list[float | None]:
    """The critic's mean score of the drafts, then of the refined responses of each round, over those that have a score;
    None without one. The paper's figures for GPT-4 Turbo are 5.42, then 6.93, 7.04, 6.91 and 6.85."""
    scores = [[c.score for c in group if c.score is not None] for group in (critiques, *rounds)]
    return [statistics.fmean(group) if group else None for group in scores]


def refinement_examples(
    prompts: Sequence[Prompt],
    drafts: Sequence[Response],
    critiques: Sequence[Critique],
    checks: Sequence[Critique],
    template: CritiqueTemplate,
    *,
    refinement_only: bool = False,
) -> tuple[list[SFTExample], dict[str, int]]:
    """x -> y, f, r for each draft that passes the paper's two filters: the feedback has all its parts, and r scores at
    least as high as y in a separate call (``checks``, critiques of the improved responses).

    Args:
      refinement_only: x -> r instead (the ablation).

    Returns: examples in the order of ``drafts``, and counts: drafts, kept, "empty" or cut-off drafts, "incomplete"
      feedback, "unscored" checks, and "worse" refinements.
    """
    messages = {prompt.id: prompt.messages for prompt in prompts}
    by_id, checked = {c.id: c for c in critiques}, {c.id: c for c in checks}
    counts = Counter(dict.fromkeys(("drafts", "kept", "empty", "incomplete", "unscored", "worse"), 0))
    examples = []
    for draft in drafts:
        c, check = by_id.get(draft.id), checked.get(draft.id)
        counts["drafts"] += 1
        if not draft.text.strip() or draft.finish_reason != "stop":
            counts["empty"] += 1
        elif c is None or c.weaknesses is None or c.suggestions is None or c.score is None or c.improved is None:
            counts["incomplete"] += 1
        elif check is None or check.score is None:
            counts["unscored"] += 1
        elif check.score < c.score:
            counts["worse"] += 1
        else:
            feedback = template.write(c.weaknesses, c.suggestions, int(c.score), c.improved)
            text = c.improved if refinement_only else template.marked(draft.text) + feedback
            examples.append(SFTExample(id=draft.id, messages=messages[draft.prompt_id], response=text))
    counts["kept"] = len(examples)
    return examples, dict(counts)


def refinement_pairs(
    prompts: Sequence[Prompt],
    drafts: Sequence[Response],
    critiques: Sequence[Critique],
    refined: Sequence[Response],
    draft_scores: Sequence[float | None],
    refined_scores: Sequence[float | None],
) -> tuple[list[PreferencePair], dict[str, int]]:
    """(x, r, y) for each draft whose improved response scores strictly higher. Both sides end where feedback begins: if
    one ended with an end of turn, DPO would teach when to stop instead of what to write.

    Args:
      refined: marked improved responses, under the ids of their drafts; ``refined_scores`` are theirs.

    Returns: pairs in the order of ``drafts``, and counts: drafts, pairs, "no_marker" (drafts without
      feedback), "no_refinement", "unscored", "ties" (and worse ones), "identical".
    """
    messages = {prompt.id: prompt.messages for prompt in prompts}
    refined_by_id = {r.id: (r, score) for r, score in zip(refined, refined_scores, strict=True)}
    names = ("drafts", "pairs", "no_marker", "no_refinement", "unscored", "ties", "identical")
    counts = Counter(dict.fromkeys(names, 0))
    pairs = []
    for draft, c, score in zip(drafts, critiques, draft_scores, strict=True):
        counts["drafts"] += 1
        better, better_score = refined_by_id.get(draft.id, (None, None))
        if not c.text:
            counts["no_marker"] += 1
        elif better is None:
            counts["no_refinement"] += 1
        elif score is None or better_score is None:
            counts["unscored"] += 1
        elif better_score <= score:
            counts["ties"] += 1
        elif better.token_ids == draft.token_ids:
            counts["identical"] += 1
        else:
            pairs.append(
                PreferencePair(
                    id=draft.id,
                    messages=messages[draft.prompt_id],
                    chosen=better,
                    rejected=draft,
                    chosen_score=better_score,
                    rejected_score=score,
                )
            )
    counts["pairs"] = len(pairs)
    return pairs, dict(counts)
