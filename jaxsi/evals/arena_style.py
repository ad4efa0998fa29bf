"""Arena-Hard's style control: scores of models against a baseline, apart from the length and the markdown of answers.

The method is that of arena-hard-auto v2.0 (https://github.com/lmarena/arena-hard-auto, `show_result.py` with
--control-features), after https://lmsys.org/blog/2024-08-28-style-control/ and Li et al. 2024, arXiv 2406.11939. A
Bradley-Terry model of all weighted games of all models, with the baseline's strength 0,

    P(model m wins game i) = sigmoid(theta_m + sum_k beta_k z_ik),

is fitted by maximum likelihood; a tie is half a win. For a model's answer with T tokens and c_k headers, list items and
bold texts outside of code, and the baseline's with T' and c'_k, the features are

    (T - T') / (T + T')    and    (d_k - d'_k) / (d_k + d'_k + 1),    d_k = c_k / (T + 1),

of which z are the standardised ones: minus their mean, over their standard deviation (ddof 1), over all weighted games.
A model's score is sigmoid(theta_m). As z has the mean 0, that is the score at the mean style of all games, and not at
the baseline's style. So one model alone has nearly its plain score. "score_at_equal_style" is at the z of two answers
of the same style.

The original reports the median of its bootstrap and stops its fit after 50 steps in float32; here the fit is exact, in
float64. At its HEAD, control of one feature group cuts off the models' columns; here it controls that group.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.evals.arena_hard import Games, answers_of, counted, points_of
from jaxsi.evals.length_controlled import FitError, Rows, sigmoid
from jaxsi.runs.records import RecordError, shown

Control = Literal["length", "markdown"]
COUNTS = ("header_count", "list_count", "bold_count")  # in the metadata of answers, beside token_len
FEATURES = ("length", "headers", "lists", "bold")
_CODE = re.compile(r"```[^`]*```")
_MARKS = (
    re.compile(r"^#{1,6}\s", re.MULTILINE),
    re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)
_STEPS, _FARTHEST = 100, 20.0  # a coefficient beyond has no optimum: it would take a hundred million games
_TOLERANCE = 1e-12  # of the gradient, relative to the largest that the rows can have


# ---------------------------------------------------------------------------------------------------------- the styles


@dataclasses.dataclass(frozen=True)
class Style:
    """Tokens of an answer, and its headers, list items and bold texts outside of code."""

    tokens: int
    headers: int
    lists: int
    bold: int


def style_of(text: str, tokens: int) -> Style:
    """The style of an answer of so many tokens."""
    # The original deletes a block's text wherever it stands; that differs only if the text stands elsewhere, too.
    prose = _CODE.sub("``````", text)
    return Style(tokens, *(len(pattern.findall(prose)) for pattern in _MARKS))


def read_styles(path: Path | str, count_tokens: Callable[[str], int] | None = None) -> tuple[str, dict[str, Style]]:
    """(the model, the style of its answers by uid) of a file of model_answer. ``count_tokens`` counts the tokens of
    all answers; without it they are taken from the rows' "metadata", as are the other counts.

    Raises: RecordError: if the file cannot be read, or has no metadata and there is no ``count_tokens``.
    """
    model, answers = answers_of(path)
    styles = {}
    for uid, (text, metadata, line) in answers.items():
        if count_tokens is not None:
            styles[uid] = style_of(text, count_tokens(text))
            continue
        names = ("token_len", *COUNTS)
        if not isinstance(metadata, Mapping) or not set(names) <= metadata.keys():
            raise RecordError(
                path,
                line,
                f"an answer without metadata of its style ({', '.join(names)}); give --style-tokenizer MODEL, whose "
                "tokenizer then counts the tokens of all answers, or a file that arena-hard-auto's "
                "add_markdown_info.py wrote",
            )
        styles[uid] = Style(*(_count(metadata[name], path, line) for name in names))
    return model, styles


def _count(value: Any, path: Path | str, line: int) -> int:
    parts = list(value.values()) if isinstance(value, Mapping) else [value]
    if not all(isinstance(part, int) and part >= 0 for part in parts):
        raise RecordError(path, line, f"the metadata hold {shown(value)}; they are counts, or objects with counts")
    return sum(parts)


# ------------------------------------------------------------------------------------------------------------- the fit


def differences(a_N4: Float[np.ndarray, "N 4"], b_N4: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, "N 4"]:
    """The features, not standardised, of answers a against answers b: columns as in `Style`. Two empty answers
    differ by 0."""
    a_tokens, b_tokens = a_N4[:, :1], b_N4[:, :1]
    length = (a_tokens - b_tokens) / np.maximum(a_tokens + b_tokens, 1.0)
    a_density, b_density = a_N4[:, 1:] / (a_tokens + 1), b_N4[:, 1:] / (b_tokens + 1)
    return np.concatenate([length, (a_density - b_density) / (a_density + b_density + 1)], axis=1)


def bradley_terry(rows: Rows, start: Float[np.ndarray, "K"] | None = None) -> Float[np.ndarray, "K"]:
    """The minimum of the sum of weighted crossentropies of labels in [0, 1], by Newton steps with a line search.

    Raises: FitError: if there is none: something separates wins from losses, or columns say the same.
    """
    x, y, w = rows.features_NK, rows.labels_N, rows.weights_N
    if np.linalg.matrix_rank((x * w[:, None]).T @ x, hermitian=True) < x.shape[1]:
        raise FitError(
            "models and style cannot be told apart: a model's answers all have the same style; leave style control out"
        )
    theta = np.zeros(x.shape[1]) if start is None else start
    tolerance = _TOLERANCE * (1.0 + float((w[:, None] * np.abs(x)).sum(axis=0).max(initial=0.0)))
    for _ in range(_STEPS):
        p = sigmoid(x @ theta)
        gradient = x.T @ (w * (p - y))
        if np.abs(gradient).max(initial=0.0) <= tolerance:
            return theta
        hessian = (x * (w * p * (1 - p))[:, None]).T @ x
        step = -np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        now, size = _loss(theta, x, y, w), 1.0
        while (
            size > 1e-12 and _loss(theta + size * step, x, y, w) > now + 1e-4 * size * (gradient @ step) + 1e-13 * now
        ):
            size /= 2
        theta = theta + size * step
        if np.abs(theta).max() > _FARTHEST:
            break
    raise FitError(
        "the fit has no optimum: style and models separate all wins from all losses; "
        "judge more prompts, or leave style control out"
    )


def _loss(theta: np.ndarray, x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    z = x @ theta
    return float(w @ (np.logaddexp(0.0, z) - y * z))


# ------------------------------------------------------------------------------------------------------------- figures


def controlled_scores(
    judgments: Sequence[Games],
    styles: Mapping[str, Mapping[str, Style]],
    baseline: Mapping[str, Style],
    controls: Sequence[Control],
    *,
    samples: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """The style-controlled figures of all models that were judged.

    Args:
      styles: of each model's answers, by uid.
      controls: none is a Bradley-Terry model without style, whose scores are the plain ones.
      samples: of the bootstrap.

    Returns: {"models": {model: figures}, best first, "coefficients": beta of each controlled feature, per standard
      deviation, "without_optimum": bootstrap samples that had none and are left out}. The figures: "score" 0 to 1,
      "interval" its 5 to 95 % bootstrap range over weighted games, as the original's, "interval_by_prompt" over
      prompts, "score_at_equal_style", "games". A model that won or lost all games has the score 1 or 0.

    Raises: EvaluationError: if a model or a prompt has no style, or if the fit has no optimum.
    """
    cells = _Cells.of(counted(judgments), styles, baseline, controls)
    theta = cells.fit(cells.counts_N)
    rng = np.random.default_rng(seed)
    total = int(cells.counts_N.sum())
    by_game = rng.multinomial(total, cells.counts_N / total, size=samples)
    prompts = len(cells.uids)
    draws = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=samples)
    by_prompt = draws[:, cells.prompt_N] * cells.counts_N
    found = [[cells.resampled(weights, theta) for weights in way] for way in (by_game, by_prompt)]
    kept = [[coefficients for coefficients in way if coefficients is not None] for way in found]
    figures: dict[str, dict[str, Any]] = {}
    for m, model in enumerate(cells.models):
        figures[model] = {
            "score": float(sigmoid(theta[m])),
            **{
                name: _range([float(sigmoid(one[m])) for one in way])
                for name, way in zip(("interval", "interval_by_prompt"), kept, strict=True)
            },
            "score_at_equal_style": float(sigmoid(theta[m] + theta[len(cells.models) :] @ cells.equal_K)),
            "games": int(cells.counts_N[cells.model_N == m].sum()),
        }
    names = [FEATURES[k] for k in cells.columns]
    return {
        "models": dict(sorted(figures.items(), key=lambda item: -item[1]["score"])),
        "coefficients": dict(zip(names, map(float, theta[len(cells.models) :]), strict=True)),
        "without_optimum": sum(one is None for way in found for one in way),
    }


def _range(scores: Sequence[float]) -> list[float] | None:
    return [float(q) for q in np.quantile(scores, [0.05, 0.95])] if scores else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cells:
    """Weighted games of the same model, prompt and outcome as one row with their number."""

    models: list[str]
    uids: list[str]
    model_N: np.ndarray
    prompt_N: np.ndarray
    labels_N: Float[np.ndarray, "N"]
    counts_N: Float[np.ndarray, "N"]
    z_NK: Float[np.ndarray, "N K"]
    equal_K: Float[np.ndarray, "K"]
    columns: list[int]

    @staticmethod
    def of(
        games: Sequence[Games],
        styles: Mapping[str, Mapping[str, Style]],
        baseline: Mapping[str, Style],
        controls: Sequence[Control],
    ) -> "_Cells":
        if not games:
            raise EvaluationError("no prompt has two games with a verdict; there is nothing to fit")
        cells = Counter((one.model, one.uid, point) for one in games for point in points_of(one))
        models, uids = sorted({model for model, *_ in cells}), sorted({uid for _, uid, _ in cells})
        counts_N = np.asarray(list(cells.values()), np.float64)
        sides = [
            (_style(styles.get(model, {}), uid, model), _style(baseline, uid, "the baseline"))
            for model, uid, _ in cells
        ]
        raw_N4 = differences(
            *(np.asarray([dataclasses.astuple(side[k]) for side in sides], np.float64) for k in (0, 1))
        )
        mean_4 = counts_N @ raw_N4 / counts_N.sum()
        deviation_4 = np.sqrt(counts_N @ (raw_N4 - mean_4) ** 2 / max(counts_N.sum() - 1, 1))
        wanted = [0] * ("length" in controls) + [1, 2, 3] * ("markdown" in controls)
        columns = [k for k in wanted if deviation_4[k] > 1e-12]  # what never differs explains nothing
        return _Cells(
            models=models,
            uids=uids,
            model_N=np.asarray([models.index(model) for model, *_ in cells]),
            prompt_N=np.searchsorted(uids, [uid for _, uid, _ in cells]),
            labels_N=np.asarray([point for *_, point in cells], np.float64),
            counts_N=counts_N,
            z_NK=((raw_N4 - mean_4) / np.where(deviation_4 > 1e-12, deviation_4, 1.0))[:, columns],
            equal_K=(-mean_4 / np.where(deviation_4 > 1e-12, deviation_4, 1.0))[columns],
            columns=columns,
        )

    def fit(self, weights_N: Float[np.ndarray, "N"], start: np.ndarray | None = None) -> Float[np.ndarray, "K"]:
        """(theta of all models, beta). A model that won or lost everything has theta of +-inf, and then its games say
        nothing about the style; one without games has nan. Raises: FitError."""
        wins_M, games_M = (
            np.bincount(self.model_N, w, len(self.models)) for w in (weights_N * self.labels_N, weights_N)
        )
        theta = np.full(len(self.models) + len(self.columns), 0.0)
        theta[: len(self.models)] = np.select([games_M == 0, wins_M == 0, wins_M == games_M], [np.nan, -np.inf, np.inf])
        open_M = np.flatnonzero(theta[: len(self.models)] == 0)
        if not len(open_M):
            return theta
        which = np.isin(self.model_N, open_M)
        x_NK = np.concatenate([(self.model_N[which, None] == open_M).astype(np.float64), self.z_NK[which]], axis=1)
        free = np.concatenate([open_M, len(self.models) + np.arange(len(self.columns))])
        rows = Rows(features_NK=x_NK, labels_N=self.labels_N[which], weights_N=weights_N[which])
        near = None if start is None or not np.isfinite(start[free]).all() else start[free]
        theta[free] = bradley_terry(rows, near)
        return theta

    def resampled(self, weights_N: np.ndarray, start: np.ndarray) -> np.ndarray | None:
        """The fit to a bootstrap sample; None if it has no optimum."""
        try:
            theta = self.fit(weights_N.astype(np.float64), start)
        except FitError:
            return None
        return None if np.isnan(theta).any() else theta


def _style(styles: Mapping[str, Style], uid: str, whose: str) -> Style:
    if uid not in styles:
        raise EvaluationError(
            f"style control needs the answers of {whose}, and there is none to the prompt {uid}; give the complete "
            "file of model_answer: --baseline FILE for the baseline, --style-answers FILE for a model"
        )
    return styles[uid]
