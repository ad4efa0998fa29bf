"""Judges beside the model itself (`judge.judge`), plain functions (`judge.judge_by`) and endpoints (`EndpointJudge`):
another model, a reward model, a check against known answers; and any judge in SRT's, SEFT's and PIT's place for one.
"""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxsi.lm import LM, borrowed
from jaxsi.runs.config_snapshot import file_content, may_change, stored_as
from jaxsi.runs.errors import InputError
from jaxsi.runs.records import Judgment, Prompt, Response, Revision
from jaxsi.stages.answers import with_prompts
from jaxsi.stages.gap import Item
from jaxsi.stages.judge import judge, scored
from jaxsi.stages.prompts import load_rubric
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.prompts.critique import CritiqueTemplate
from jaxsi.stages.prompts.reviser import ReviserTemplate
from jaxsi.stages.reviser import ReviseConfig
from jaxsi.stages.rows import rows, version_of
from jaxsi.stages.verdicts import JudgeConfig
from jaxsi.training.reward import RewardOf

Judge = Callable[..., list[Judgment]]  # (lm, prompts, responses, rubric, config, key)


class JudgeError(InputError, ValueError):
    """A judge that cannot judge what it is given; the message names it and says what to do."""


def placed(model: str, lm: LM | None) -> LM:
    """MODEL for judging alone, on the mesh and in the dtype of ``lm``."""
    return borrowed(model, "auto") if lm is None else borrowed(model, lm.dtype, lm.mesh)


@stored_as("judges.ModelJudge")
@dataclasses.dataclass(frozen=True)
class ModelJudge:
    """Another model in this process: ``model`` is anything that ``load`` takes. It stays the same while the run's model
    improves."""

    model: str

    def __call__(
        self,
        lm: LM | None,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        rubric: AnyRubric,
        cfg: JudgeConfig,
        key: jax.Array,
    ) -> list[Judgment]:
        return judge(placed(self.model, lm), prompts, responses, rubric, cfg, key)


@stored_as("judges.RewardJudge")
@dataclasses.dataclass(frozen=True)
class RewardJudge:
    """A reward model: a Hugging Face sequence classifier with one label, or a run of ``jaxsi reward``. A response's
    score is its reward; a text that is longer than the reward model's context has none. The rubric is not used."""

    model: str
    batch_size: int = dataclasses.field(default=64, metadata=may_change())

    def __call__(
        self, lm: LM | None, prompts: Sequence[Prompt], responses: Sequence[Response], *_: object
    ) -> list[Judgment]:
        return rewarded(placed(self.model, lm), lm, prompts, responses, batch_size=self.batch_size)


def rewarded(
    reward_lm: LM,
    lm: LM | None,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    *_: object,
    batch_size: int = 64,
) -> list[Judgment]:
    """The rewards of responses as judgments by ``reward_lm``; ``lm`` is the model that sampled them.

    Raises: RewardError: if ``reward_lm`` has no scalar head, or if a reward is not finite.
    """
    reward = RewardOf(reward_lm, None if lm is None else lm.tokenizer, batch_size)
    values = [None if math.isnan(value) else value for value in reward(prompts, responses).tolist()]
    judgments = scored(responses, values, reward_lm)
    return [dataclasses.replace(j, texts=()) if j.score is None else j for j in judgments]


# ----------------------------------------------------------------------------------------------------------- verifiers


@stored_as("judges.same_answer")
def same_answer(response: str, answer: str) -> bool:
    """Whether a response ends in the known answer: the content of its last \\boxed{}, what follows its last "####",
    "answer:" or "answer is", or else its last number. Numbers are compared by value, other texts without case and
    spaces.

    The known answer is read the same way, so that GSM8K's solutions, which end in "#### 72", are one.
    """
    expected, given = final_answer(answer), final_answer(response)
    a, b = _value(expected), _value(given)
    if a is not None and b is not None:
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    return _plain(expected) == _plain(given)


_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FINAL = re.compile(r"(?:####|\banswer[*_ \t]*(?:is\b[ \t]*:?|[:=]))[*_ \t]*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?|[-+]?\.[0-9]+")


def final_answer(text: str) -> str:
    """The answer in which a text ends; see `same_answer`."""
    for pattern in (_BOXED, _FINAL):
        found = pattern.findall(text)
        if found:
            return found[-1].strip().rstrip(".")
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers and len(text.split()) > 1 else text


def _value(text: str) -> float | None:
    """The number that a text is, or holds as its only one; None if there is none."""
    numbers = _NUMBER.findall(text)
    if len(numbers) != 1:
        return None
    over, _, under = numbers[0].replace(",", "").partition("/")
    if not under:
        return float(over)
    return float(over) / float(under) if float(under) else None


def _plain(text: str) -> str:
    return re.sub(r"[\s$.*_]+", "", text).casefold()


@stored_as("judges.Verifier")
@dataclasses.dataclass(frozen=True)
class Verifier:
    """A check against known answers: a response's score is ``check(response, answer)``, 1 or 0 for `same_answer`.

    ``answers`` is a file of any format that prompts have, with the columns ``prompt`` and ``answer``; a prompt is found
    by its text. A run keeps a hash of the file: with another content it does not go on.
    """

    answers: str = dataclasses.field(metadata=file_content())
    prompt: str = "prompt"
    answer: str = "answer"
    check: Callable[[str, str], float | bool | None] = same_answer

    def __call__(
        self, lm: LM | None, prompts: Sequence[Prompt], responses: Sequence[Response], *_: object
    ) -> list[Judgment]:
        known = _answers(self.answers, self.prompt, self.answer, version_of(self.answers))
        scores: list[float | None] = []
        for prompt, response in with_prompts(prompts, responses):
            if prompt.text.strip() not in known:
                raise JudgeError(
                    f"{self.answers} has no answer to the prompt {prompt.text!r:.80}; give a file that answers every "
                    "prompt"
                )
            value = self.check(response.text, known[prompt.text.strip()])
            scores.append(None if value is None else float(value))
        return scored(responses, scores, lm)


@functools.lru_cache(maxsize=2)
def _answers(path: str, prompt: str, answer: str, version: object) -> dict[str, str]:
    known = {}
    for place, row in rows(Path(path)):
        missing = [name for name in (prompt, answer) if not isinstance(row, dict) or row.get(name) is None]
        if missing:
            there = ", ".join(map(repr, row)) if isinstance(row, dict) else "no columns"
            raise JudgeError(
                f"{path}:{place}: no column {missing[0]!r} (it has {there}); name the columns: "
                f"verifier:{path},prompt=NAME,answer=NAME"
            )
        known[str(row[prompt]).strip()] = str(row[answer])
    return known


# ----------------------------------------------------------------------------------------- a judge in a method's place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """A judge with its rubric and settings. The model itself is not one: these places have no model that judges."""

    judging: Judge
    rubric: AnyRubric = load_rubric()
    judge: JudgeConfig = JudgeConfig()

    def __post_init__(self) -> None:
        if self.judging is judge:
            raise JudgeError(f"{type(self).__name__} needs a judge of another kind: ModelJudge, EndpointJudge, ...")

    def side_by_side(
        self, prompts: Sequence[Prompt], firsts: Sequence[str], seconds: Sequence[str], lm: LM | None = None
    ) -> tuple[list[float | None], list[float | None]]:
        """The scores of two texts for each prompt, which the rubric may compare. The noise of a judgment depends on
        the texts, and not on their places."""
        return side_by_side(self.judging, lm, prompts, firsts, seconds, self.rubric, self.judge, jax.random.key(0))


def side_by_side(
    judging: Judge,
    lm: LM | None,
    prompts: Sequence[Prompt],
    firsts: Sequence[str],
    seconds: Sequence[str],
    rubric: AnyRubric,
    cfg: JudgeConfig,
    key: jax.Array,
) -> tuple[list[float | None], list[float | None]]:
    """The judge's scores of two texts for each prompt."""
    rows = [(prompt.messages, a, b) for prompt, a, b in zip(prompts, firsts, seconds, strict=True)]
    ids = [_named(row) for row in rows]
    asked = dict(zip(ids, rows, strict=True))
    questions = [Prompt(id=id, messages=messages) for id, (messages, *_) in asked.items()]
    responses = [
        Response.of(f"{id}#{k}", id, k, text) for id, (_, *texts) in asked.items() for k, text in enumerate(texts)
    ]
    judgments = judging(lm, questions, responses, rubric, cfg, key)
    scores = {judgment.id: judgment.score for judgment in judgments}
    return [scores[f"{id}#0"] for id in ids], [scores[f"{id}#1"] for id in ids]


def _named(content: object) -> str:
    """An id that depends on the content alone."""
    return hashlib.sha256(repr(content).encode("utf-8", "replace")).hexdigest()[:24]


@stored_as("judges.ScoringBy")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringBy(Judged):
    """A judge as SRT's ``scoring`` of drafts and refined responses, in place of the model's own scores."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        drafts: Sequence[Response],
        refined: Sequence[Response],
        template: CritiqueTemplate,
    ) -> tuple[list[float | None], list[float | None]]:
        """The scores of the drafts (None if there is no refined response), and of the refined responses."""
        better = {response.id: response for response in refined}
        both = [(prompt, draft) for prompt, draft in with_prompts(prompts, drafts) if draft.id in better]
        before, after = self.side_by_side(
            [prompt for prompt, _ in both],
            [template.unmarked(draft.text) or draft.text for _, draft in both],
            [template.unmarked(better[draft.id].text) or better[draft.id].text for _, draft in both],
        )
        draft_scores = {draft.id: score for (_, draft), score in zip(both, before, strict=True)}
        refined_scores = {draft.id: score for (_, draft), score in zip(both, after, strict=True)}
        return [draft_scores.get(d.id) for d in drafts], [refined_scores.get(r.id) for r in refined]


@stored_as("judges.TargetsBy")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetsBy(Judged):
    """A judge as the ``target`` of a SEFT round: of a prompt's drafts, the one with the best score is learnt."""

    def __call__(
        self,
        lm: LM,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        template: ReviserTemplate,
        cfg: ReviseConfig,
        key: jax.Array,
    ) -> list[Revision]:
        """As ``reviser.best_of_n``. Drafts that were cut off, are empty or have no score are not chosen; of equal ones
        the first is."""
        usable = [r for r in responses if r.finish_reason == "stop" and r.text.strip()]
        judgments = self.judging(lm, prompts, usable, self.rubric, self.judge, key)
        best: dict[str, tuple[float, Response]] = {}
        for response, judgment in zip(usable, judgments, strict=True):
            leader = best.get(response.prompt_id)
            if judgment.score is not None and (leader is None or judgment.score > leader[0]):
                best[response.prompt_id] = judgment.score, response
        chosen = [best[prompt.id][1] for prompt in prompts if prompt.id in best]
        return [
            Revision(id=r.id, prompt_id=r.prompt_id, label=template.no, label_probs=None, response=r) for r in chosen
        ]


def rewards_by(
    judging: Judge, lm: LM | None, rubric: AnyRubric, cfg: JudgeConfig
) -> Callable[[Sequence[Prompt], Sequence[Response]], np.ndarray]:
    """A judge as the reward of reinforcement learning: (prompts, responses) -> [N] float32, NaN without a score. ``lm``
    is the model that judges, or on whose mesh another one does."""

    def rewards(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        # By its text: the same text is judged alike in every step, and another one with other noise.
        named = [dataclasses.replace(r, id=f"{r.prompt_id}#{r.sample}#{_named(r.text)}") for r in responses]
        judgments = judging(lm, prompts, named, rubric, cfg, jax.random.key(0))
        return np.asarray([math.nan if j.score is None else j.score for j in judgments], np.float32)

    return rewards


@stored_as("judges.RewardsBy")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardsBy(Judged):
    """``rewards_by`` as settings that a run can store. A rubric that compares does so among the responses to a
    prompt."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
        return rewards_by(self.judging, None, self.rubric, self.judge)(prompts, responses)


@stored_as("judges.GapsBy")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GapsBy(Judged):
    """A judge as PIT's ``rewarding``: the gap is the score of the response minus that of the reference."""

    def __call__(
        self, lm: LM, items: Sequence[Item], request: str, *, batch_size: int = 64
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``gap.gaps``; NaN, no reward, without both scores. The zero point is 0."""
        prompts = [Prompt(id=str(i), messages=tuple(messages)) for i, (messages, _, _) in enumerate(items)]
        texts = [response.text if isinstance(response, Response) else response for _, response, _ in items]
        given, reference = self.side_by_side(prompts, texts, [reference for *_, reference in items], lm)
        gaps = [math.nan if a is None or b is None else a - b for a, b in zip(given, reference, strict=True)]
        return np.asarray(gaps, np.float32), np.zeros(len(items), np.float32)
