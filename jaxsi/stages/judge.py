"""The judge: render the rubric, sample judgments, parse the scores; and statistics of judgments.

A judgment that does not parse, or whose judge prompt is too long for the model, stays None everywhere, never a number.
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
from jaxsi.sampling import generate, scoring
from jaxsi.stages.answers import as_records, with_prompts
from jaxsi.stages.prompts import Rubric, force_marker, load_rubric, question_text
from jaxsi.text.chat import render_prompt
from jaxsi.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

# Shares above these (below, for the parse rate) raise an alarm: the judge has collapsed or ignores its rubric.
ONE_SCORE_ALARM = 0.6
TIE_ALARM = 0.6
PARSE_ALARM = 0.5
# Extra tokens that a generated justification may take when its text is encoded again.
_SPARE_TOKENS = 8


@stored_as("feedback.JudgeConfig")
@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How each response is judged: K = `num_samples` justifications with their scores, averaged over the valid ones.

    `expected` takes the expectation over the score strings after each justification in place of the parsed number:
    it is finer (fewer ties), always parses, and works with a model that does not write verdicts. Defaults: K of the
    paper, and the sampling settings of its open re-implementations (the paper states none). `batch_size` judgments are
    sampled at a time. Below `min_parse_rate` a method stops: it would learn from the few judgments that did parse.
    """

    num_samples: int = 3
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256
    expected: bool = False
    batch_size: int = 64
    min_parse_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"num_samples is {self.num_samples} and max_new_tokens {self.max_new_tokens}; both must be at least 1"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature is {self.temperature} (>= 0) and top_p {self.top_p} (in (0, 1])")
        if not 0 <= self.min_parse_rate <= 1:
            raise ValueError(f"min_parse_rate is {self.min_parse_rate}; it must lie in [0, 1]")


@stored_as("feedback.judge")
def judge(
    lm: LM,
    prompts: Sequence[Prompt | str],
    responses: Sequence[Response | str],
    rubric: Rubric | None = None,
    cfg: JudgeConfig = JudgeConfig(),
    key: jax.Array | None = None,
) -> list[Judgment]:
    """Judges each response by itself (pointwise) with `lm` as the judge (Self-Rewarding, arXiv 2401.10020, figure 2).

    Args:
      prompts: at least those that the responses name; or texts, with one response text for each.
      rubric: by default that of the Self-Rewarding paper.
      key: typed key of the stage; a judgment's noise is folded from it, the response's id and the sample number.

    Returns: one Judgment per response, in the order of `responses`. If a judge prompt leaves too little room for
      `cfg.max_new_tokens`, all its scores are None and it has no texts (`judgment_statistics` counts these).

    Raises: ValueError if a response id occurs twice, or if a response's prompt is not among `prompts`.
    """
    prompts, responses = as_records(prompts, responses)
    rubric = load_rubric() if rubric is None else rubric
    key = jax.random.key(0) if key is None else key
    judge_prompts = _judge_prompts(prompts, responses, rubric)
    room = lm.config.max_positions - cfg.max_new_tokens
    if cfg.expected:
        room -= len(lm.tokenizer.encode_text(f"\n{rubric.marker}{rubric.score_strings[-1]}")) + _SPARE_TOKENS
    fitting = [p for p in judge_prompts if len(render_prompt(lm.tokenizer, p.messages)) <= room]
    generated: dict[str, list[Response]] = {p.id: [] for p in fitting}
    if fitting:
        for sample in generate.generate(
            lm,
            fitting,
            num_samples=cfg.num_samples,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            max_new_tokens=cfg.max_new_tokens,
            key=key,
            batch_size=cfg.batch_size,
        ):
            generated[sample.prompt_id].append(sample)
    for id, samples in generated.items():
        samples.sort(key=lambda sample: sample.sample)
        if [sample.sample for sample in samples] != list(range(cfg.num_samples)):
            raise AssertionError(f"the judgments of {id!r} are samples {[s.sample for s in samples]}, not one of each")
    if cfg.expected and fitting:
        scores = _expected_scores(lm, fitting, generated, rubric, cfg)
    else:
        scores = {id: [_parsed(rubric, sample) for sample in samples] for id, samples in generated.items()}
    return [_judgment(lm, response, scores.get(response.id), generated, cfg) for response in responses]


@stored_as("judge_by")
@dataclass(frozen=True)
class JudgeBy:
    """A plain function of texts in place of `judge`: see `judge_by`."""

    function: Callable[[str, str], float | None]

    def __call__(
        self,
        lm: LM,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        rubric: Rubric,
        cfg: JudgeConfig,
        key: jax.Array,
    ) -> list[Judgment]:
        texts = {prompt.id: question_text(prompt.messages) for prompt in prompts}
        scores = [number(self.function, texts[r.prompt_id], r.text) for r in responses]
        return [
            Judgment(
                id=response.id,
                prompt_id=response.prompt_id,
                scores=(score,),
                score=score,
                texts=("",),
                fingerprint=lm.fingerprint,
                template=lm.tokenizer.template_hash,
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


def judgment_statistics(judgments: Sequence[Judgment], *, low: int, high: int) -> dict[str, object]:
    """The metrics of an iteration's judge (JSON-able; a rate without a denominator is None).

    parse_rate: share of valid scores among all K x N. unscored: responses without a valid score. too_long: responses
    whose judge prompt did not fit. tie_rate: share of prompts whose scored responses (at least two) all have the same
    mean. histogram: share of each whole score among the valid ones (an expected score counts as the nearest). entropy:
    of the histogram, in nats. mean, std: of the mean scores. alarms: those of "one_score", "ties" and "parse_rate"
    that are beyond their thresholds.
    """
    verdicts = [score for judgment in judgments for score in judgment.scores]
    valid = [score for score in verdicts if score is not None]
    means = [judgment.score for judgment in judgments if judgment.score is not None]
    nearest = Counter(math.floor(score + 0.5) for score in valid)  # scores of a user's function have their own range
    histogram = {str(value): nearest[value] / len(valid) if valid else None for value in range(low, high + 1)}
    shares = [count / len(valid) for count in nearest.values()]
    groups = [scores for scores in _scores_by_prompt(judgments).values() if len(scores) >= 2]
    ties = sum(max(scores) == min(scores) for scores in groups)
    parse_rate = len(valid) / len(verdicts) if verdicts else None
    tie_rate = ties / len(groups) if groups else None
    alarms = {
        "one_score": bool(shares) and max(shares) > ONE_SCORE_ALARM,
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
        _log.warning("the judge raises the alarm %r: %s", alarm, dict(statistics))
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
    valid = [(np.mean(scores_a[id]), np.mean(scores_b[id])) for id in scores_a if scores_a[id] and scores_b[id]]
    wins = sum(bool(x > y) for x, y in valid)
    losses = sum(bool(x < y) for x, y in valid)
    return Comparison(wins=wins, losses=losses, ties=len(valid) - wins - losses, invalid=len(scores_a) - len(valid))


def _judge_prompts(prompts: Sequence[Prompt], responses: Sequence[Response], rubric: Rubric) -> list[Prompt]:
    """One judge prompt per response, under the response's id."""
    return [
        Prompt.of(response.id, rubric.render(question_text(prompt.messages), response.text))
        for prompt, response in with_prompts(prompts, responses)
    ]


def _parsed(rubric: Rubric, sample: Response) -> float | None:
    score = rubric.parse(sample.text, cut_off=sample.finish_reason != "stop")
    return None if score is None else float(score)


def _expected_scores(
    lm: LM, judge_prompts: Sequence[Prompt], generated: dict[str, list[Response]], rubric: Rubric, cfg: JudgeConfig
) -> dict[str, list[float | None]]:
    """For each response and sampled justification: the mean score under softmax(log p(score string | ...))."""
    prefixes: list[list[int]] = []
    choices: list[list[list[int]]] = []
    for prompt in judge_prompts:
        head = render_prompt(lm.tokenizer, prompt.messages)
        for sample in generated[prompt.id]:
            texts = [force_marker(sample.text, rubric.marker) + score for score in rubric.score_strings]
            prefix, ends = _split_at_score(lm.tokenizer, texts, rubric, cfg.max_new_tokens)
            prefixes.append(head + prefix)
            choices.append(ends)
    values = np.arange(rubric.low, rubric.high + 1)
    logps_NG = np.asarray(scoring.score_choices(lm, prefixes, choices, batch_size=cfg.batch_size), np.float64)
    logps_NKG = logps_NG.reshape(len(judge_prompts), cfg.num_samples, len(values))
    expected: dict[str, list[float | None]] = {}
    for prompt, logps_KG in zip(judge_prompts, logps_NKG, strict=True):
        expected[prompt.id] = [_expectation(logps_G, values) for logps_G in logps_KG]
    return expected


def _expectation(logps_G: np.ndarray, values: np.ndarray) -> float | None:
    """Mean of `values` under softmax(logps); None if a log-prob is NaN or all are -inf."""
    if np.isnan(logps_G).any() or not np.isfinite(logps_G.max()):
        return None
    p = np.exp(logps_G - logps_G.max())
    return float(p @ values / p.sum())


def _split_at_score(
    tokenizer: Tokenizer, texts: Sequence[str], rubric: Rubric, max_tokens: int
) -> tuple[list[int], list[list[int]]]:
    """Texts that differ only in the score at their end -> their shared ids, and the remaining ids of each.

    Justification and score are encoded in one piece, as in the texts that a model was trained on. Scoring starts where
    the ids first differ.
    """
    rows = [tokenizer.encode_text(text) for text in texts]
    forced = [tokenizer.encode_text(f"\n{rubric.marker}{score}") for score in rubric.score_strings]
    if max(map(len, rows)) > max_tokens + max(map(len, forced)) + _SPARE_TOKENS:
        # Encoding random bytes (from random weights) can take many more ids than were sampled. Cut them to fit.
        head = tokenizer.encode_text(texts[0])[:max_tokens]
        rows = [head + row for row in forced]
    shared = 0
    while shared < min(map(len, rows)) and len({row[shared] for row in rows}) == 1:
        shared += 1
    ends = [row[shared:] for row in rows]
    if any(a == b[: len(a)] for i, a in enumerate(ends) for j, b in enumerate(ends) if i != j):
        raise ValueError(
            f"rubric {rubric.name!r}: with this tokenizer one of the score strings {rubric.score_strings} is a "
            "prefix of another, so their probabilities overlap; use scores of one digit, or judge with expected=False"
        )
    return rows[0][:shared], ends


def _judgment(
    lm: LM,
    response: Response,
    scores: Sequence[float | None] | None,
    generated: dict[str, list[Response]],
    cfg: JudgeConfig,
) -> Judgment:
    if scores is None:
        scores = (None,) * cfg.num_samples
    texts = tuple(sample.text for sample in generated.get(response.id, ()))
    valid = [score for score in scores if score is not None]
    return Judgment(
        id=response.id,
        prompt_id=response.prompt_id,
        scores=tuple(scores),
        score=sum(valid) / len(valid) if valid else None,
        texts=texts,
        fingerprint=lm.fingerprint,
        template=lm.tokenizer.template_hash,
    )


def _scores_by_prompt(judgments: Sequence[Judgment]) -> dict[str, list[float]]:
    """The mean scores of each prompt's scored responses; a prompt without any has an empty list."""
    groups: dict[str, list[float]] = defaultdict(list)
    for judgment in judgments:
        scored = groups[judgment.prompt_id]
        if judgment.score is not None:
            scored.append(judgment.score)
    return groups
