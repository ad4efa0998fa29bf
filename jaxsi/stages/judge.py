"""The judge: the model itself, or a plain function; and statistics of judgments. Other judges are in `judges`.

A judge is a function (lm, prompts, responses, rubric, config, key) -> judgments: `lm` is the model that wrote the
responses, which judges them itself or is not used. A response without a valid verdict has the score None everywhere,
never a number.
"""

import logging
import math
import numbers
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxsi.lm import LM
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.records import Judgment, Prompt, Response
from jaxsi.stages.alarms import ONE_SCORE_ALARM, PARSE_ALARM, TIE_ALARM, sentence
from jaxsi.stages.answers import as_records, with_prompts
from jaxsi.stages.prompts import load_rubric, question_text
from jaxsi.stages.prompts.comparison import AnyRubric
from jaxsi.stages.verdicts import JudgeConfig, LocalWriter, judged

_log = logging.getLogger(__name__)


@stored_as("feedback.judge")
def judge(
    lm: LM,
    prompts: Sequence[Prompt | str],
    responses: Sequence[Response | str],
    rubric: AnyRubric | None = None,
    cfg: JudgeConfig = JudgeConfig(),
    key: jax.Array | None = None,
) -> list[Judgment]:
    """Judges responses with `lm` as the judge: each by itself (Self-Rewarding, arXiv 2401.10020, figure 2), or by
    comparing all responses to a prompt, if the rubric compares (`verdicts.judged`).

    Args:
      prompts: at least those that the responses name; or texts, with one response text for each.
      rubric: by default that of the Self-Rewarding paper.
      key: typed key of the stage; a judgment's noise is folded from it, the request's id and the sample number.

    Returns: one Judgment per response, in the order of `responses`. If a judge prompt leaves too little room for
      `cfg.max_new_tokens`, all its scores are None and it has no texts (`judgment_statistics` counts these).

    Raises: ValueError if a response id occurs twice, or if a response's prompt is not among `prompts`.
    """
    prompts, responses = as_records(prompts, responses)
    rubric = load_rubric() if rubric is None else rubric
    return judged(LocalWriter(lm), prompts, responses, rubric, cfg, jax.random.key(0) if key is None else key)


@stored_as("judge_by")
@dataclass(frozen=True)
class JudgeBy:
    """A plain function of texts in place of `judge`: see `judge_by`."""

    function: Callable[[str, str], float | None]

    def __call__(
        self, lm: LM | None, prompts: Sequence[Prompt], responses: Sequence[Response], *_: object
    ) -> list[Judgment]:
        pairs = with_prompts(prompts, responses)
        scores = [number(self.function, question_text(prompt.messages), r.text) for prompt, r in pairs]
        return scored(responses, scores, lm)


def scored(responses: Sequence[Response], scores: Sequence[float | None], lm: LM | None) -> list[Judgment]:
    """Judgments without a text. Their identity is that of ``lm``, the model that is judged."""
    identity = ("", "") if lm is None else (lm.fingerprint, lm.tokenizer.template_hash)
    return [
        Judgment(
            id=response.id,
            prompt_id=response.prompt_id,
            scores=(score,),
            score=score,
            texts=("",),
            fingerprint=identity[0],
            template=identity[1],
        )
        for response, score in zip(responses, scores, strict=True)
    ]


def judge_by(function: Callable[[str, str], float | None]) -> JudgeBy:
    """A judge for Self-Rewarding's ``judging``: `function(prompt, response)` scores a response, higher is better; None
    means that it has no score. A module or a config file has to define the function (or it is a `functools.partial` of
    such a function). The run stores a hash of its source, so it may not change on resume."""
    return JudgeBy(function)


def number(function: Callable[[str, str], float | None], prompt: str, response: str) -> float | None:
    """The user's function of a prompt and a response. Raises: ValueError if the result is neither finite nor None."""
    value = function(prompt, response)
    if value is None:
        return None
    if not isinstance(value, numbers.Real) or not math.isfinite(value):  # NumPy scalars are numbers, too
        raise ValueError(
            f"{getattr(function, '__qualname__', function)} returned {value!r} for the response {response!r:.80} to "
            f"{prompt!r:.80}; it must return a finite number, or None for no score"
        )
    return float(value)


def judgment_statistics(judgments: Sequence[Judgment], rubric: AnyRubric) -> dict[str, object]:
    """The metrics of an iteration's judge (JSON-able; a rate without a denominator is None).

    parse_rate: share of valid scores among all K x N. unscored: responses without a valid score. too_long: responses
    whose judge prompt did not fit. tie_rate: share of prompts whose scored responses (at least two) all have the same
    mean. histogram: share of each score of the rubric among the valid ones (an expected score counts as the nearest).
    entropy: of the histogram, in nats. mean, std: of the mean scores. alarms: those of "one_score", "ties" and
    "parse_rate" that are beyond their thresholds.
    """
    verdicts = [score for judgment in judgments for score in judgment.scores]
    valid = [score for score in verdicts if score is not None]
    means = [judgment.score for judgment in judgments if judgment.score is not None]
    step = rubric.step
    nearest = Counter(math.floor(score / step + 0.5) * step for score in valid)
    bins = [rubric.low + i * step for i in range(round((rubric.high - rubric.low) / step) + 1)]
    histogram = {f"{value:g}": nearest[value] / len(valid) if valid else None for value in bins}
    shares = [count / len(valid) for count in nearest.values()]
    groups = [scores for scores in _scores_by_prompt(judgments).values() if len(scores) >= 2]
    ties = sum(max(scores) == min(scores) for scores in groups)
    parse_rate = len(valid) / len(verdicts) if verdicts else None
    tie_rate = ties / len(groups) if groups else None
    written = any(text for judgment in judgments for text in judgment.texts)
    # The scores of a function or a reward model have a range of their own, which may lie around one of the rubric's.
    equal = max(shares if written else (n / len(valid) for n in Counter(valid).values()), default=0.0)
    alarms = {
        "one_score": equal > ONE_SCORE_ALARM,
        "ties": tie_rate is not None and tie_rate > TIE_ALARM,
        "parse_rate": parse_rate is not None and parse_rate < PARSE_ALARM,
    }
    return {
        "judged": len(judgments),
        "parse_rate": parse_rate,
        "unscored": len(judgments) - len(means),
        "too_long": sum(not judgment.texts for judgment in judgments),
        "tie_rate": tie_rate,
        "histogram": histogram,
        "entropy": sum(share * -math.log(share) for share in shares) if shares else None,
        "mean": float(np.mean(means)) if means else None,
        "std": float(np.std(means)) if means else None,
        "alarms": [name for name, raised in alarms.items() if raised],
    }


def check_judge(statistics: Mapping[str, Any], cfg: JudgeConfig) -> None:
    """Logs the alarms of `judgment_statistics`; raises ValueError if too few judgments have a score."""
    for alarm in statistics["alarms"]:
        _log.warning("alarm: %s", sentence(alarm, statistics))
    rate = statistics["parse_rate"]
    if rate is not None and rate < cfg.min_parse_rate:
        raise ValueError(
            f"{rate:.1%} of the judgments have a score, fewer than judge.min_parse_rate = {cfg.min_parse_rate:.1%}; "
            "start a new run directory with a model that can judge, or set judge.expected"
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Numbers of prompts on which a scores higher than b, lower, or the same, and on which a or b has no score."""

    wins: int
    losses: int
    ties: int
    invalid: int

    @property
    def win_rate(self) -> float | None:
        """(wins + ties / 2) / valid prompts; None if no prompt is valid."""
        valid = self.wins + self.losses + self.ties
        return (self.wins + self.ties / 2) / valid if valid else None


def compare(a: Sequence[Judgment], b: Sequence[Judgment]) -> Comparison:
    """Compares two models' judged responses prompt by prompt, by the mean score of each prompt's scored responses.

    Raises: ValueError if a prompt is on one side only; the message names it.
    """
    only = {judgment.prompt_id for judgment in a} ^ {judgment.prompt_id for judgment in b}
    if only:
        raise ValueError(
            f"{len(only)} prompts are on only one side of the comparison, the first is {min(only)!r}; "
            "judge both models on the same prompts"
        )
    scores_a, scores_b = _scores_by_prompt(a), _scores_by_prompt(b)

    def means(scores: Mapping[str, list[float]]) -> list[float | None]:
        return [float(np.mean(scores[id])) if scores[id] else None for id in scores_a]

    return compare_scores(means(scores_a), means(scores_b))


def compare_scores(a: Sequence[float | None], b: Sequence[float | None]) -> Comparison:
    """Compares two models' scores, one of each for every prompt."""
    valid = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    wins, losses = sum(x > y for x, y in valid), sum(x < y for x, y in valid)
    return Comparison(wins=wins, losses=losses, ties=len(valid) - wins - losses, invalid=len(a) - len(valid))


def _scores_by_prompt(judgments: Sequence[Judgment]) -> dict[str, list[float]]:
    """The mean scores of each prompt's scored responses; a prompt without any has an empty list."""
    groups: dict[str, list[float]] = defaultdict(list)
    for judgment in judgments:
        scored = groups[judgment.prompt_id]
        if judgment.score is not None:
            scored.append(judgment.score)
    return groups
