"""Statistics of scores: a judge's agreement with the truth, rank correlation, calibration, bootstrap intervals, and
text tables.

A figure that is not defined is None, never a number: for example an agreement over no pairs, or a correlation with
constant scores.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_CELLS = 4_000_000  # numbers drawn at a time: bounds the memory of a bootstrap


@dataclass(frozen=True, kw_only=True)
class PairwiseAgreement:
    """How often scores order two responses to a prompt as the truth does. Pairs that the truth ties do not count.

    Attributes:
      count: number of pairs.
      accuracy: share of the pairs in the right order; equal scores count as wrong, so a judge that gives every response
        the same score has 0.
      without_ties: the same share among the pairs with different scores.
      tie_share: share of the pairs with equal scores.
    """

    count: int
    accuracy: float | None
    without_ties: float | None
    tie_share: float | None


def agreement_figures(pairs: PairwiseAgreement) -> dict[str, float | int | None]:
    """The figures of an evaluation. "judge_agreement" is the accuracy with ties counted as wrong; the others stand
    beside it."""
    return {
        "judge_agreement": pairs.accuracy,
        "judge_agreement_without_ties": pairs.without_ties,
        "judge_tie_share": pairs.tie_share,
        "judge_pairs": pairs.count,
    }


def pairwise_agreement(
    scores: Sequence[float | None], truths: Sequence[float], groups: Sequence[Any]
) -> PairwiseAgreement:
    """The agreement over the pairs within each group, without the rows whose score is None.

    Args:
      scores, truths, groups: one entry per response, all of the same length; groups are prompt ids.

    Raises: ValueError if lengths differ, or if a number is not finite.
    """
    _check_lengths(scores=scores, truths=truths, groups=groups)
    rows_of: dict[Any, list[int]] = {}
    for row, (score, group) in enumerate(zip(scores, groups, strict=True)):
        if score is not None:
            rows_of.setdefault(group, []).append(row)
    right = wrong = tied = 0
    for rows in rows_of.values():
        score_N = np.array([scores[row] for row in rows], dtype=np.float64)
        truth_N = np.array([truths[row] for row in rows], dtype=np.float64)
        _check_finite(scores=score_N, truths=truth_N)
        first, second = np.triu_indices(len(rows), k=1)
        product = np.sign(score_N[first] - score_N[second]) * np.sign(truth_N[first] - truth_N[second])
        right += int((product > 0).sum())
        wrong += int((product < 0).sum())
        tied += int(((truth_N[first] != truth_N[second]) & (product == 0)).sum())
    count = right + wrong + tied
    return PairwiseAgreement(
        count=count,
        accuracy=right / count if count else None,
        without_ties=right / (right + wrong) if right + wrong else None,
        tie_share=tied / count if count else None,
    )


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman's rho of two arrays [N], with ties at their mean rank; None if one of the arrays is constant.

    Not `scipy.stats.spearmanr`: its last bit differs from this one, and stored runs and published tables hold these.
    """
    from scipy.stats import rankdata  # takes a second to import

    a, b = _paired(a, b)
    ranks_a, ranks_b = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    norm = math.sqrt(float(ranks_a @ ranks_a) * float(ranks_b @ ranks_b))
    return float(ranks_a @ ranks_b) / norm if norm > 0 else None


def kendall(a: ArrayLike, b: ArrayLike) -> float | None:
    """Kendall's tau-b of two arrays [N] (Kendall 1945, which corrects for ties); None if one of them is constant."""
    from scipy.stats import kendalltau  # takes a second to import

    a, b = _paired(a, b)
    if len(a) < 2 or (a == a[0]).all() or (b == b[0]).all():
        return None
    return float(kendalltau(a, b).statistic)


def dense_ranks(scores: Sequence[float]) -> list[int]:
    """The rank of each score: 0 for the highest, without gaps; equal scores share one."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]


def mean_ci(values: ArrayLike, *, samples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % bootstrap interval over prompts of values [prompts] or [prompts, samples]."""
    values = np.asarray(values, dtype=np.float64)
    _check_finite(values=values)
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(f"values have shape {values.shape}; give [prompts] or [prompts, samples], not empty")
    per_prompt = values if values.ndim == 1 else values.mean(axis=1)
    draws = _draws(np.random.default_rng(seed), len(per_prompt), samples)
    means = np.concatenate([counts @ per_prompt for counts in draws]) / len(per_prompt)
    return float(per_prompt.mean()), *_interval(means)


def share_ci(outcomes: ArrayLike) -> tuple[float, float, float]:
    """(mean, low, high) of outcomes [prompts] in [0, 1], such as wins (1), ties (1/2) and losses (0): Wilson's 95 %
    interval, with the number of trials that their variance is worth. Ties and judgments in between vary less than wins
    and losses do.

    As if a prompt more had been half won and half lost: outcomes that are all equal do not prove that all ever are, as
    a bootstrap of them would. One outcome says nothing: its interval is [0, 1].
    """
    from scipy import stats

    y_N = np.asarray(outcomes, dtype=np.float64)
    _check_finite(outcomes=y_N)
    if y_N.ndim != 1 or y_N.size == 0 or y_N.min() < 0 or y_N.max() > 1:
        raise ValueError(f"outcomes have shape {y_N.shape}; give [prompts] from 0 to 1, not empty")
    n, mean = len(y_N), float(y_N.mean())
    if n == 1:
        return mean, 0.0, 1.0
    variance = (float(((y_N - mean) ** 2).sum()) + 0.25) / n
    worth = max(n * mean * (1 - mean) / variance, 1.0) if 0 < mean < 1 else float(n)
    z = float(stats.t.ppf(0.975, n - 1))
    middle = (mean + z * z / (2 * worth)) / (1 + z * z / worth)
    half = z / (1 + z * z / worth) * math.sqrt(mean * (1 - mean) / worth + z * z / (4 * worth * worth))
    # Rounding may leave a mean of 0 or 1 outside.
    return mean, min(max(middle - half, 0.0), mean), max(min(middle + half, 1.0), mean)


def ratio_ci(
    parts: ArrayLike, wholes: ArrayLike, *, samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(sum of parts / sum of wholes, low, high): the 95 % bootstrap interval over prompts of parts, wholes [prompts].
    Every whole is above 0. What belongs to one prompt is drawn together: its parts are not independent."""
    parts, wholes = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    _check_finite(parts=parts, wholes=wholes)
    if parts.ndim != 1 or parts.shape != wholes.shape or parts.size == 0 or not (wholes > 0).all():
        raise ValueError(f"parts have shape {parts.shape}, wholes {wholes.shape}; give [prompts] above 0, not empty")
    draws = _draws(np.random.default_rng(seed), len(parts), samples)
    ratios = np.concatenate([(counts @ parts) / (counts @ wholes) for counts in draws])
    return float(parts.sum() / wholes.sum()), *_interval(ratios)


def paired_bootstrap(a: ArrayLike, b: ArrayLike, *, samples: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """(mean of a - b, low, high): the 95 % bootstrap interval of a, b [seeds, prompts], paired entry by entry.
    [prompts] counts as one seed.

    Run seeds and prompts are drawn with replacement, independently, so the interval covers the choice of both.
    """
    a, b = np.atleast_2d(np.asarray(a, dtype=np.float64)), np.atleast_2d(np.asarray(b, dtype=np.float64))
    _check_finite(a=a, b=b)
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}; give both the same [seeds, prompts], not empty")
    difference = a - b
    seeds, prompts = difference.shape
    rng = np.random.default_rng(seed)
    means = []
    for drawn in _draws(rng, prompts, samples):
        drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(drawn))
        means.append(((drawn @ difference.T) * drawn_seeds).sum(axis=1) / (prompts * seeds))
    return float(difference.mean()), *_interval(np.concatenate(means))


def calibration(probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int = 10) -> dict[str, Any]:
    """How far predicted probabilities [N] are what happens: outcomes [N] in [0, 1], 1 for an event that happened.

    Returns:
      "brier": the mean squared difference (Brier 1950). "ece": the expected calibration error, the mean over
        predictions of |mean probability - mean outcome| in their bin, with `bins` bins of equal width (Guo et al. 2017,
        arXiv 1706.04599, eq. 3, for the probability of the event). "bins": {"count", "probability", "outcome"} of each
        bin that is not empty. Over nothing the first two are None.

    Raises: ValueError if lengths differ, or if a number is not in [0, 1].
    """
    p, y = _paired(probabilities, outcomes)
    for name, array in (("probabilities", p), ("outcomes", y)):
        if ((array < 0) | (array > 1)).any():
            raise ValueError(f"{name} hold {array[(array < 0) | (array > 1)][0]}; give numbers from 0 to 1")
    bin_N = np.minimum((p * bins).astype(int), bins - 1)
    rows = [
        {"count": int(inside.sum()), "probability": float(p[inside].mean()), "outcome": float(y[inside].mean())}
        for inside in (bin_N == number for number in range(bins))
        if inside.any()
    ]
    error = sum(row["count"] * abs(row["probability"] - row["outcome"]) for row in rows)
    return {
        "brier": float(((p - y) ** 2).mean()) if len(p) else None,
        "ece": error / len(p) if len(p) else None,
        "bins": rows,
    }


def macro_scores(truths: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float | None]:
    """The "precision", "recall" and "f1" of each class that occurs in either list, averaged over the classes; a class
    that is never predicted has precision 0. Over nothing they are None.

    Raises: ValueError if lengths differ.
    """
    _check_lengths(truths=truths, predictions=predictions)
    rows = []
    for label in sorted(set(truths) | set(predictions)):
        right = sum(t == p == label for t, p in zip(truths, predictions, strict=True))
        predicted, true = list(predictions).count(label), list(truths).count(label)
        precision, recall = (right / count if count else 0.0 for count in (predicted, true))
        rows.append((precision, recall, 2 * right / (predicted + true)))
    means = [float(np.mean(column)) for column in zip(*rows, strict=True)] if rows else [None] * 3
    return dict(zip(("precision", "recall", "f1"), means, strict=True))


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as an aligned text table: numbers to the right, None as "-". ``columns``: those of all rows, by default."""
    names = list(columns if columns is not None else dict.fromkeys(name for row in rows for name in row))
    if not names:
        return ""
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    is_text = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    lines = [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _draws(rng: np.random.Generator, size: int, samples: int) -> Iterator[np.ndarray]:
    """How often each of `size` things is drawn, as blocks [rows, size] that have `samples` rows together."""
    rows = max(1, _CELLS // size)
    for start in range(0, samples, rows):
        yield rng.multinomial(size, np.full(size, 1 / size), size=min(rows, samples - start)).astype(np.float64)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - 0.95) / 2, (1 + 0.95) / 2])  # not 0.025: its last bit differs
    return float(low), float(high)


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"shapes are {first.shape} and {second.shape}; give two arrays [N] of the same length")
    _check_finite(a=first, b=second)
    return first, second


def _check_lengths(**columns: Sequence[Any]) -> None:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lengths differ: {lengths}; give one entry per response in each")


def _check_finite(**arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            bad = array[~np.isfinite(array)][0]
            raise ValueError(f"{name} hold {bad}; give finite numbers, and None for a score that is absent")


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The fewest insertions, deletions and replacements that turn ``a`` into ``b`` (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
