"""Two models on the same prompts: the win rate of one over the other, raw and at equal length, with 95 % intervals over
the prompts and a test of the difference. All in float64.

The length-controlled win rate is that of `length_controlled` for any prompts: the same features and the same loss,

    P(A wins on i) = sigmoid(theta_len * t_i + theta),   t_i = tanh(standardised difference of lengths),

and the win rate at t = 0. Without published difficulties and rows that tie theta_len to a baseline, nothing needs the
penalty |theta|_1. It would pull the figure to 50 and its interval off the truth. Jeffreys' prior (Firth 1993) takes its
place: it keeps the fit finite if one side wins everything.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import optimize, stats

from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.evals.length_controlled import sigmoid, standardized
from jaxsi.runs.metrics import share_ci

LEVEL = 0.95
LEAST = 10  # prompts that a fit of lengths needs
_STEPS, _RESAMPLES = 1_000, 9_999
_PRIOR_ROWS = 4.0  # wins and losses that few rows are filled up with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired:
    """A against B, all rates in percent with 95 % intervals; p-values are two-sided, of no difference.

    wins, losses, ties: prompts on which A's outcome is above, below, or exactly 1/2. p_value: an exact sign test if
    all outcomes are wins, losses and ties, else a test by random signs. controlled: the win rate at equal length, None
    for fewer than ``LEAST`` prompts; length_effect: theta_len, negative if longer responses win.
    """

    prompts: int
    wins: int
    losses: int
    ties: int
    win_rate: float
    interval: tuple[float, float]
    p_value: float
    controlled: float | None
    controlled_interval: tuple[float, float] | None
    controlled_p_value: float | None
    length_effect: float | None

    def figures(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self) | {
            "interval": list(self.interval),
            "controlled_interval": self.controlled_interval and list(self.controlled_interval),
        }


def paired(outcomes: Sequence[float], differences: Sequence[float], *, seed: int = 0) -> Paired:
    """Compares A with B.

    Args:
      outcomes: for each prompt how much better A's response is, from 0 to 1; 1/2 is a tie.
      differences: for each prompt the characters of B's response minus those of A's.
      seed: of the random signs of the test.

    Raises: EvaluationError: if there are fewer than two prompts.
    """
    y_N, difference_N = np.asarray(outcomes, np.float64), np.asarray(differences, np.float64)
    if len(y_N) < 2:
        raise EvaluationError(f"{len(y_N)} prompts were judged; a comparison needs at least 2, and hundreds to be sure")
    low, high = share_ci(y_N)[1:]
    fit = EqualLength(y_N, np.tanh(standardized(difference_N))) if len(y_N) >= LEAST else None
    return Paired(
        prompts=len(y_N),
        wins=int((y_N > 0.5).sum()),
        losses=int((y_N < 0.5).sum()),
        ties=int((y_N == 0.5).sum()),
        win_rate=float(100 * y_N.mean()),
        interval=(100 * low, 100 * high),
        p_value=sign_test(y_N - 0.5, seed),
        controlled=None if fit is None else _percent(fit.logit),
        controlled_interval=None if fit is None else (_percent(fit.interval[0]), _percent(fit.interval[1])),
        controlled_p_value=None if fit is None else fit.p_value(),
        length_effect=None if fit is None else fit.length_effect,
    )


def _percent(logit: float) -> float:
    return float(100 * sigmoid(np.asarray(logit)))


class EqualLength:
    """The fit of outcomes [N] in [0, 1] to lengths [N] in [-1, 1], both float64: ``logit`` is theta, ``length_effect``
    theta_len (0 if all lengths differ by the same).

    The interval of theta comes from the profile of the penalised likelihood. Unlike one of equal width on both sides,
    it holds if one side wins nearly always. Outcomes between 0 and 1 vary less than wins and losses do, so the
    likelihood is divided by their dispersion.
    """

    def __init__(self, y_N: Float[np.ndarray, "N"], t_N: Float[np.ndarray, "N"]):
        self._y_N = y_N
        self._x_NK = np.stack([np.ones_like(t_N), t_N], axis=1) if np.ptp(t_N) > 0 else np.ones((len(t_N), 1))
        self._theta = _fit(y_N, self._x_NK, np.zeros(self._x_NK.shape[1]), free=slice(None))
        self._top = _penalized(self._theta, y_N, self._x_NK)
        p_N = sigmoid(self._x_NK @ self._theta)
        largest = float((p_N * (1 - p_N)).sum()) + _PRIOR_ROWS / 4  # the variance of wins and losses alone
        self._dispersion = min(max(1 - float((y_N * (1 - y_N)).sum()) / largest, 0.01), 1.0)
        self._degrees = max(len(y_N) - self._x_NK.shape[1], 1)
        self.logit = float(self._theta[0])
        self.length_effect = float(self._theta[1]) if len(self._theta) > 1 else 0.0

    def t_squared(self, value: float) -> float:
        """How much less likely theta = value is, as the square of a t statistic."""
        start = self._theta.copy()
        start[0] = value
        there = _penalized(_fit(self._y_N, self._x_NK, start, free=slice(1, None)), self._y_N, self._x_NK)
        return max(2 * (self._top - there) / self._dispersion, 0.0)

    def p_value(self) -> float:
        """Two-sided, of theta = 0."""
        return float(2 * stats.t.sf(np.sqrt(self.t_squared(0.0)), self._degrees))

    @property
    def limit(self) -> float:
        """The largest ``t_squared`` of a value in the interval."""
        return float(stats.t.ppf((1 + LEVEL) / 2, self._degrees)) ** 2

    @functools.cached_property
    def interval(self) -> tuple[float, float]:
        """Of theta."""
        return _end(self.t_squared, self.logit, self.limit, -1.0), _end(self.t_squared, self.logit, self.limit, 1.0)


def _end(drop: Callable[[float], float], start: float, limit: float, side: float) -> float:
    width = 0.5
    while drop(start + side * width) < limit:
        width *= 2
        if width > 16:  # a probability of 1e-7 or less: an interval without an end
            return side * np.inf
    root: Any = optimize.brentq(lambda value: drop(value) - limit, start, start + side * width, xtol=1e-6)
    return float(root)


def _fit(y_N: np.ndarray, x_NK: np.ndarray, theta: np.ndarray, free: slice) -> np.ndarray:
    """The maximum of the penalised likelihood over the coefficients that are ``free``."""
    if x_NK[:, free].shape[1] == 0:
        return theta
    for _ in range(_STEPS):
        p_N, leverage_N, information = _curvature(theta, x_NK)
        score = (x_NK.T @ (y_N - p_N + leverage_N * (0.5 - p_N)))[free]
        # The prior is worth `leverage` rows of half a win. Steps by the information without them would jump to and fro
        # for ever if a row alone decides a coefficient.
        prior = (x_NK * (leverage_N * p_N * (1 - p_N))[:, None]).T @ x_NK
        step = np.linalg.solve((information + prior)[free, free], score)
        theta = theta.copy()
        theta[free] += step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
        if float(np.abs(step).max()) < 1e-9:
            break
    return theta


def _penalized(theta: np.ndarray, y_N: np.ndarray, x_NK: np.ndarray) -> float:
    z_N = x_NK @ theta
    return float((y_N * z_N - np.logaddexp(0.0, z_N)).sum() + np.linalg.slogdet(_curvature(theta, x_NK)[2])[1] / 2)


def _curvature(theta: np.ndarray, x_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, leverages, and the information."""
    p_N = sigmoid(x_NK @ theta)
    w_N = p_N * (1 - p_N)
    information = (x_NK * w_N[:, None]).T @ x_NK + 1e-12 * np.eye(x_NK.shape[1])
    leverage_N = w_N * (x_NK @ np.linalg.inv(information) * x_NK).sum(axis=1)
    return p_N, leverage_N, information


def sign_test(gains_N: Float[np.ndarray, "N"], seed: int = 0) -> float:
    """The two-sided p-value of gains that are as likely up as down. Gains of 0 say nothing."""
    moved = gains_N[gains_N != 0]
    if not len(moved):
        return 1.0
    if len(np.unique(np.abs(moved))) == 1:
        return float(stats.binomtest(int((moved > 0).sum()), len(moved)).pvalue)
    result = stats.permutation_test(
        (moved,), lambda x, axis: np.mean(x, axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=_RESAMPLES, batch=1000, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)
