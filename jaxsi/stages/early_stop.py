"""Early stopping: a judge compares a model's responses to held-out prompts with those of an earlier model.

Self-Rewarding (arXiv 2401.10020) compares each checkpoint with the one before on 253 prompts and stops when it is no
longer better; there Claude 2 compares the responses in pairs. A judge asks about each pair in both orders; if the two
answers disagree, it is a tie.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxsi.lm import LM
from jaxsi.runs import metrics
from jaxsi.runs.config_snapshot import stored_as
from jaxsi.runs.named_keys import fold
from jaxsi.runs.records import Judgment, Prompt
from jaxsi.sampling.generate import SamplingConfig, generate
from jaxsi.stages import judge as judges
from jaxsi.stages.judges import side_by_side
from jaxsi.stages.prompts.comparison import AnyRubric, read_rubric
from jaxsi.stages.verdicts import JudgeConfig

_log = logging.getLogger(__name__)


class WinRate(NamedTuple):
    """The share of ``prompts`` on which a model wins, ties counting half, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    prompts: int


@stored_as("early_stop.loses")
def loses(rate: WinRate) -> bool:
    """Stops on evidence alone: the whole interval lies below one half. Ties are no evidence."""
    return rate.high < 0.5


@stored_as("early_stop.does_not_win")
def does_not_win(rate: WinRate) -> bool:
    """Stops as soon as the win rate is not above one half, as the paper words it. All ties stop, too."""
    return rate.mean <= 0.5


@stored_as("methods.self_rewarding.EarlyStop")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """When to stop. ``prompts`` gives the held-out prompts, ``rule`` decides on a win rate.

    ``judging`` compares both models' responses by ``rubric`` with the settings ``judge`` (None: those of the run). The
    judge of the default is the model that the iteration began with; ``stages.judges`` has others. A rubric that grades
    gives each response a score of its own.

    ``checkpoints``: compare each checkpoint of a training with the one before, every ``checkpoint_every`` steps, and go
    back to that one if the rule says so. ``iterations``: compare the model of each iteration with the best one so far,
    and end the run if the rule says so. The best iteration is then the run's result.
    """

    prompts: Callable[[], list[Prompt]]
    judging: Callable[..., list[Judgment]] = judges.judge
    rubric: AnyRubric = read_rubric("pairwise_judge")
    judge: JudgeConfig | None = None
    rule: Callable[[WinRate], bool] = loses
    checkpoints: bool = True
    iterations: bool = True


def win_rate(
    stop: EarlyStop,
    judge_model: LM,
    now: LM,
    before: LM,
    sampling: SamplingConfig,
    judge: JudgeConfig,
    key: jax.Array,
) -> WinRate | None:
    """The win rate of ``now`` over ``before``, each with one response to a prompt and the same noise. None, and a
    warning, if not a single comparison has a verdict."""
    prompts, settings = stop.prompts(), sampling.settings | {"num_samples": 1}
    new, old = ([r.text for r in generate(lm, prompts, key=key, **settings)] for lm in (now, before))
    verdicts = side_by_side(
        stop.judging, judge_model, prompts, new, old, stop.rubric, stop.judge or judge, fold(key, "judge")
    )
    rate = win_rate_of(*verdicts)
    if rate is None:
        _log.warning("early stopping: no comparison of %d prompts has a verdict, so nothing stops", len(prompts))
    return rate


def win_rate_of(new: list[float | None], old: list[float | None]) -> WinRate | None:
    """The win rate by two scores of each prompt; prompts without both are left out."""
    outcomes = outcomes_of(new, old)
    return WinRate(*metrics.mean_ci(outcomes, seed=0), len(outcomes)) if outcomes else None


def outcomes_of(new: list[float | None], old: list[float | None]) -> list[float]:
    """1 for a win, 1/2 for a tie, 0 for a loss, by two scores of each prompt; prompts without both are left out."""
    both = [(a, b) for a, b in zip(new, old, strict=True) if a is not None and b is not None]
    return [(a > b) + 0.5 * (a == b) for a, b in both]


def is_better(
    stop: EarlyStop,
    judge_model: LM,
    sampling: SamplingConfig,
    judge: JudgeConfig,
    key: jax.Array,
    now: LM,
    before: LM,
) -> bool:
    """Whether a training goes on after its newest checkpoint: ``rule`` does not stop it, or nothing could be judged."""
    rate = win_rate(stop, judge_model, now, before, sampling, judge, key)
    if rate is None:
        return True
    _log.info("early stopping: win rate %.3f (%.3f to %.3f)", *rate[:3])
    return not stop.rule(rate)
