"""Statistics of scores, in NumPy: a judge's agreement with the truth, rank correlations, bootstrap intervals, tables.

An absent figure is None, never a number: of no pairs, of constant scores, of texts without a verdict.
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
    """How often scores order two responses to a prompt as the truth does, among pairs that the truth does not tie.

    `agreement` counts a pair with equal scores as half right; `strict_agreement` leaves such pairs out.
    """

    agreement: float | None
    count: int
    strict_agreement: float | None
    strict_count: int


def pairwise_agreement(
    scores: Sequence[float | None], truths: Sequence[float], groups: Sequence[Any]
) -> PairwiseAgreement:
    """The agreement over the pairs within each group; rows whose score is None are in no pair.

    Args: scores, truths, groups: one entry per response, all of one length; groups are prompt ids.
    """
    _check_lengths(scores=scores, truths=truths, groups=groups)
    rows_of: dict[Any, list[int]] = {}
    for row, (score, group) in enumerate(zip(scores, groups, strict=True)):
        if score is not None:
            rows_of.setdefault(group, []).append(row)
    right = wrong = tied = 0
    for rows in rows_of.values():
        ours = np.array([scores[row] for row in rows], dtype=np.float64)
        theirs = np.array([truths[row] for row in rows], dtype=np.float64)
        _check_finite(scores=ours, truths=theirs)
        first, second = np.triu_indices(len(rows), k=1)
        product = np.sign(ours[first] - ours[second]) * np.sign(theirs[first] - theirs[second])
        counts = theirs[first] != theirs[second]
        right += int((product > 0).sum())
        wrong += int((product < 0).sum())
        tied += int((counts & (product == 0)).sum())
    count, strict_count = right + wrong + tied, right + wrong
    return PairwiseAgreement(
        agreement=(right + tied / 2) / count if count else None,
        count=count,
        strict_agreement=right / strict_count if strict_count else None,
        strict_count=strict_count,
    )


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman's rho of two arrays [N], ties at their mean rank; None where one of them is constant."""
    a, b = _paired(a, b)
    ranks_a, ranks_b = _ranks(a) - (len(a) + 1) / 2, _ranks(b) - (len(b) + 1) / 2
    norm = math.sqrt(float(ranks_a @ ranks_a) * float(ranks_b @ ranks_b))
    return float(ranks_a @ ranks_b) / norm if norm > 0 else None


def kendall(a: ArrayLike, b: ArrayLike) -> float | None:
    """Kendall's tau-b of two arrays [N]; None where one of them is constant."""
    a, b = _paired(a, b)
    concordance, untied_a, untied_b = 0.0, 0, 0
    for row in range(len(a) - 1):
        sign_a, sign_b = np.sign(a[row + 1 :] - a[row]), np.sign(b[row + 1 :] - b[row])
        concordance += float(sign_a @ sign_b)
        untied_a += np.count_nonzero(sign_a)
        untied_b += np.count_nonzero(sign_b)
    return concordance / math.sqrt(untied_a * untied_b) if untied_a and untied_b else None


def mean_ci(
    values: ArrayLike, *, samples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high): the percentile bootstrap over prompts of values [prompts] or [prompts, samples of each]."""
    values = np.asarray(values, dtype=np.float64)
    _check_finite(values=values)
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(f"values have shape {values.shape}; give [prompts] or [prompts, samples], not empty")
    per_prompt = values if values.ndim == 1 else values.mean(axis=1)
    draws = _draws(np.random.default_rng(seed), len(per_prompt), samples)
    means = np.concatenate([counts @ per_prompt for counts in draws]) / len(per_prompt)
    return float(per_prompt.mean()), *_interval(means, level)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Sequence[Any] | None = None,
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """(mean of a - b, low, high) of a, b [seeds, prompts], paired entry by entry; [prompts] counts as one seed.

    Run seeds and prompts are drawn with replacement, independently: the interval covers both who ran and what was
    asked. `clusters` has a label per prompt; prompts with the same label are drawn together (several answers to one
    prompt, say).
    """
    a, b = np.atleast_2d(np.asarray(a, dtype=np.float64)), np.atleast_2d(np.asarray(b, dtype=np.float64))
    _check_finite(a=a, b=b)
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}; both must be the same [seeds, prompts], not empty")
    difference = a - b
    labels = list(range(a.shape[1])) if clusters is None else list(clusters)
    if len(labels) != a.shape[1]:
        raise ValueError(f"{len(labels)} cluster labels for {a.shape[1]} prompts; give one label per prompt")
    number = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    member = np.zeros((a.shape[1], len(number)))
    member[np.arange(a.shape[1]), [number[label] for label in labels]] = 1
    sums, sizes = difference @ member, member.sum(axis=0)  # [seeds, clusters], [clusters]
    rng = np.random.default_rng(seed)
    means = []
    for drawn in _draws(rng, len(number), samples):
        drawn_seeds = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=len(drawn))
        means.append(((drawn @ sums.T) * drawn_seeds).sum(axis=1) / (drawn @ sizes * len(a)))
    return float(difference.mean()), *_interval(np.concatenate(means), level)


def histogram(scores: Sequence[float | None]) -> dict[str, int]:
    """{score: how many}, ascending, then "invalid" for None; e.g. {"0": 3, "2.5": 1, "invalid": 2}."""
    valid = sorted(score for score in scores if score is not None)
    counts: dict[str, int] = {}
    for score in valid:
        label = f"{score:.6g}"
        counts[label] = counts.get(label, 0) + 1
    invalid = len(scores) - len(valid)
    return counts | ({"invalid": invalid} if invalid else {})


def entropy(scores: Sequence[float | None]) -> float | None:
    """Entropy in nats of the valid scores: 0 where the judge always says the same; None without any."""
    counts = np.array(list(histogram([score for score in scores if score is not None]).values()), dtype=np.float64)
    if counts.size == 0:
        return None
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as an aligned text table, numbers to the right, None as "-"; `columns` are by default those of all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row)) if columns is None else list(columns)
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
    """How often each of `size` things is drawn, [some samples, size] at a time; `samples` rows in all."""
    rows = max(1, _CELLS // size)
    for start in range(0, samples, rows):
        yield rng.multinomial(size, np.full(size, 1 / size), size=min(rows, samples - start)).astype(np.float64)


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"shapes are {first.shape} and {second.shape}; give two arrays [N] of one length")
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
            raise ValueError(f"{name} hold {bad}; every figure must be finite, an absent score is None")


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Insertions, deletions and replacements that make ``b`` of ``a`` (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
