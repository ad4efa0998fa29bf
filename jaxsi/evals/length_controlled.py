"""The length-controlled win rate of AlpacaEval 2.0 (Dubois et al. 2024, arXiv 2404.04475), in float64.

    P(model wins on i) = sigmoid(theta_len * t_i + theta_diff * d_i + theta_m)

t_i is tanh of the standardised difference of lengths (positive if the baseline's response is longer), d_i the
difficulty of the instruction. The fit minimises |theta|_1 + C * sum_i w_i * crossentropy(y_i, P_i). Rows of the
baseline asked to be verbose or concise take part without theta_m and tie theta_len to the baseline's own effect of
length. The win rate is the mean of the P_i with t_i = 0.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from jaxsi.evals.answer_cache import EvaluationError

STRENGTHS = tuple(float(c) for c in np.logspace(-4, 4, 10))  # among which cross-validation chooses C
FOLDS = 5
GAMED_WEIGHT = 0.1  # half of the published lambda: there are two gamed baselines
_TOLERANCE = 1e-9  # of the optimality conditions, relative to the largest gradient that the rows can have
_NEWTON_STEPS, _SWEEPS = 300, 200


class FitError(EvaluationError):
    """The coefficients do not meet the optimality conditions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a fit: features [N, K], labels [N] in [0, 1], weights [N]; all float64 and finite."""

    features_NK: Float[np.ndarray, "N K"]
    labels_N: Float[np.ndarray, "N"]
    weights_N: Float[np.ndarray, "N"]

    def take(self, which: np.ndarray) -> "Rows":
        """The rows that a mask or a list of numbers names."""
        return Rows(features_NK=self.features_NK[which], labels_N=self.labels_N[which], weights_N=self.weights_N[which])


def standardized(differences_N: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Length differences over their standard deviation (ddof 1), not centred. 0 if all are equal, or if there is only
    one."""
    deviation = np.std(differences_N, ddof=1) if len(differences_N) > 1 else 0.0
    return differences_N / deviation if deviation > 0 else np.zeros_like(differences_N)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def fit(rows: Rows, strength: float) -> Float[np.ndarray, "K"]:
    """The exact minimum of |theta|_1 + C * sum of weighted crossentropies, by Newton steps whose quadratic models are
    minimised with the penalty (proximal Newton), and a line search.

    Args:
      strength: C, above 0.

    Raises: FitError: if the result does not meet the optimality conditions.
    """
    if not (strength > 0 and np.isfinite(strength)):
        raise FitError(f"C is {strength}; it must be a number above 0")
    x, y, w = rows.features_NK, rows.labels_N, strength * rows.weights_N
    theta = np.zeros(x.shape[1])
    tolerance = _TOLERANCE * (1.0 + float((w[:, None] * np.abs(x)).sum(axis=0).max(initial=0.0)))
    for _ in range(_NEWTON_STEPS):
        p = sigmoid(x @ theta)
        gradient = x.T @ (w * (p - y))
        if violation(theta, gradient) <= tolerance:
            return theta
        hessian = (x * (w * p * (1 - p))[:, None]).T @ x + 1e-12 * np.eye(len(theta))
        step = _penalized_minimum(theta, gradient, hessian) - theta
        predicted = gradient @ step + np.abs(theta + step).sum() - np.abs(theta).sum()
        now, size = _objective(theta, x, y, w), 1.0
        while size > 1e-12 and _objective(theta + size * step, x, y, w) > now + 1e-4 * size * predicted + 1e-13 * now:
            size /= 2
        theta = theta + size * step
    p = sigmoid(x @ theta)
    missed = violation(theta, x.T @ (w * (p - y)))
    if missed > tolerance:
        raise FitError(f"the fit with C = {strength:g} misses its optimum by {missed:.3g} (limit {tolerance:.3g})")
    return theta


def violation(theta: np.ndarray, gradient: np.ndarray) -> float:
    """How far coefficients are from the optimum: the largest of |gradient + sign(theta)| where theta is not 0, and of
    |gradient| - 1 where it is."""
    missed = np.where(theta != 0, np.abs(gradient + np.sign(theta)), np.maximum(np.abs(gradient) - 1.0, 0.0))
    return float(missed.max(initial=0.0))


def _objective(theta: np.ndarray, x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    z = x @ theta
    return float(np.abs(theta).sum() + w @ (np.logaddexp(0.0, z) - y * z))


def _penalized_minimum(theta: np.ndarray, gradient: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """argmin over v of gradient.(v - theta) + (v - theta).hessian.(v - theta) / 2 + |v|_1, coordinate by coordinate."""
    v, slope = theta.copy(), gradient.copy()  # slope: of the quadratic part at v
    for _ in range(_SWEEPS):
        largest = 0.0
        for k in range(len(v)):
            curvature = hessian[k, k]
            free = curvature * v[k] - slope[k]
            new = np.sign(free) * max(abs(free) - 1.0, 0.0) / curvature
            if change := new - v[k]:
                slope += hessian[:, k] * change
                v[k] = new
                largest = max(largest, abs(change))
        if largest <= 1e-14 * (1.0 + np.abs(v).max()):
            break
    return v


def chosen_strength(rows: Rows) -> float:
    """C by five-fold cross-validation over the rows: of the ten values the one with the best mean over the folds of
    the mean of weight * log-likelihood of the rows left out. Row i is in fold (last row - i) mod 5, so rows of one kind
    that follow each other are spread over all folds. Of equal values the smallest."""
    n = len(rows.labels_N)
    folds = (n - 1 - np.arange(n)) % FOLDS
    if n < FOLDS:
        raise FitError(f"{n} rows are too few for {FOLDS}-fold cross-validation; give C")
    scores = []
    for strength in STRENGTHS:
        held = [_log_likelihood(fit(rows.take(folds != k), strength), rows.take(folds == k)) for k in range(FOLDS)]
        scores.append(np.mean(held))
    return STRENGTHS[int(np.argmax(scores))]


def _log_likelihood(theta: np.ndarray, rows: Rows) -> float:
    z = rows.features_NK @ theta
    return float(np.mean(rows.weights_N * (rows.labels_N * z - np.logaddexp(0.0, z))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthControlled:
    """The fit of one model: C (None if nothing was fitted), the coefficients of length, difficulty and model, and for
    each row, annotated or not, the probability [N] float64 that the model wins at equal length."""

    strength: float | None
    length: float
    difficulty: float
    model: float
    predictions_N: Float[np.ndarray, "N"]

    @property
    def win_rate(self) -> float:
        """In percent."""
        return float(100 * self.predictions_N.mean())

    @property
    def standard_error(self) -> float | None:
        """In percent, of the mean of the predictions: it leaves out that the coefficients are uncertain. None for one
        row."""
        n = len(self.predictions_N)
        return float(100 * self.predictions_N.std(ddof=1) / np.sqrt(n)) if n > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gamed:
    """Rows [G] of the baseline asked to be verbose and concise: their standardised length differences, difficulties,
    and labels in [0, 1]; all float64."""

    differences_G: Float[np.ndarray, "G"]
    difficulty_G: Float[np.ndarray, "G"]
    labels_G: Float[np.ndarray, "G"]


def length_controlled(
    labels_N: Float[np.ndarray, "N"],
    differences_N: Float[np.ndarray, "N"],
    difficulty_N: Float[np.ndarray, "N"],
    gamed: Gamed,
    strength: float | None = None,
) -> LengthControlled:
    """Fits a model against its baseline.

    Args:
      labels_N: float64 in [0, 1], 1 if the model wins; NaN for a row that is not annotated. Such a row takes no part in
        the fit, but in the standard deviation of the lengths and in the mean.
      differences_N: float64, characters of the baseline's response minus those of the model's.
      difficulty_N: float64, of each row's instruction.
      strength: C; by default ``chosen_strength``.

    Raises: FitError: if no row is annotated, or if the fit fails.
    """
    there = np.isfinite(labels_N)
    if not there.any():
        raise FitError("no row is annotated, so there is nothing to fit; look at the annotations' preferences")
    t_N = np.tanh(standardized(differences_N))
    gamed_GK = np.stack([np.tanh(gamed.differences_G), gamed.difficulty_G, np.zeros_like(gamed.labels_G)], axis=1)
    model_NK = np.stack([t_N, difficulty_N, np.ones_like(t_N)], axis=1)[there]
    rows = Rows(
        features_NK=np.concatenate([gamed_GK, model_NK]),
        labels_N=np.concatenate([gamed.labels_G, labels_N[there]]),
        weights_N=np.concatenate([np.full(len(gamed_GK), GAMED_WEIGHT), np.ones(len(model_NK))]),
    )
    strength = chosen_strength(rows) if strength is None else strength
    theta = fit(rows, strength)
    return LengthControlled(
        strength=strength,
        length=float(theta[0]),
        difficulty=float(theta[1]),
        model=float(theta[2]),
        predictions_N=sigmoid(theta[1] * difficulty_N + theta[2]),
    )


def is_extreme(win_rate: float, controlled: float) -> bool:
    """Whether the length-controlled win rate is so far from the raw one that the fit may have failed; in percent."""
    too_low = controlled < min(win_rate - win_rate / 4, win_rate - 10)
    return too_low or controlled > max(win_rate + (100 - win_rate) / 4, win_rate + 10)
