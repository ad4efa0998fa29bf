"""AlpacaEval 2.0 (Dubois et al. 2024, arXiv 2404.04475): the raw and the length-controlled win rate of annotations.

An annotation compares ``output_1``, the baseline's, with ``output_2``, the model's: its preference lies between 1 (the
baseline wins) and 2 (the model wins). 0 is an old code for a tie. Anything else is a row that was not annotated.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxsi.evals.alpaca_assets import BASELINE, JUDGE, Assets, read_list
from jaxsi.evals.answer_cache import EvaluationError
from jaxsi.evals.judging import unique
from jaxsi.evals.length_controlled import LengthControlled, is_extreme, length_controlled
from jaxsi.runs.records import shown

UNKNOWN = "unknown"  # in place of a name that the annotations do not have
Compat = Literal["alpaca_eval-0.6.6"]
COLUMNS = (
    "win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate", "mode",
    "avg_length", "length_controlled_winrate", "lc_standard_error",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotation:
    """A judge's preference between the baseline's output_1 and the model's output_2; None if there is none."""

    instruction: str
    output_1: str
    output_2: str
    preference: float | None
    generator_1: str | None = None
    generator_2: str | None = None
    annotator: str | None = None
    dataset: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WinRate:
    """In percent. ``standard_error`` is None for one row. Draws are preferences of exactly 1.5."""

    win_rate: float
    standard_error: float | None
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    discrete_win_rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """The figures of one model. ``predictions``: for each instruction the probability that the model wins at equal
    length; None without a fit. ``warnings`` say what limits the figures."""

    model: str
    baseline: str
    annotator: str
    raw: WinRate
    avg_length: int
    not_annotated: int
    controlled: LengthControlled | None
    predictions: Mapping[str, float] | None
    warnings: Sequence[str]

    def figures(self) -> dict[str, Any]:
        """JSON-able, by the official names and some more."""
        fit = self.controlled
        return {
            "model": self.model,
            "baseline": self.baseline,
            "annotator": self.annotator,
            **dataclasses.asdict(self.raw),
            "avg_length": self.avg_length,
            "n_not_annotated": self.not_annotated,
            "length_controlled_winrate": None if fit is None else fit.win_rate,
            "lc_standard_error": None if fit is None else fit.standard_error,
            "c": None if fit is None else fit.strength,
            "coefficients": None
            if fit is None
            else {"length": fit.length, "difficulty": fit.difficulty, "model": fit.model},
            "warnings": list(self.warnings),
        }


def read_annotations(path: Path) -> list[Annotation]:
    """An annotations.json or .json.gz of any judge, in the official format.

    Raises: EvaluationError: if a row is not an annotation, or an instruction occurs twice; it names the row.
    """
    read = read_list(path)
    rows = [_annotation(row, number, path) for number, row in enumerate(read)]
    if not rows:
        raise EvaluationError(f"{path} has no annotation")
    if not any("preference" in row for row in read):
        raise EvaluationError(f"{path}: row 0 has no preference; this is a file of outputs, not of annotations")
    unique(((row.instruction, row) for row in rows), str(path))
    return rows


def _annotation(row: Any, number: int, path: Path) -> Annotation:
    if not isinstance(row, dict):
        raise EvaluationError(f"{path}: row {number} is {shown(row)}, not an object")
    for name in ("instruction", "output_1", "output_2"):
        if not isinstance(row.get(name), str):
            raise EvaluationError(f"{path}: row {number} has no text {name!r}: {shown(row.get(name))}")
    for name in ("generator_1", "generator_2", "annotator"):
        if not isinstance(row.get(name), str | None):
            raise EvaluationError(f"{path}: row {number}: {name} is {shown(row[name])}; it must be a text, or null")
    return Annotation(
        instruction=row["instruction"],
        output_1=row["output_1"],
        output_2=row["output_2"],
        preference=preference_of(row.get("preference"), f"{path}: row {number}"),
        generator_1=row.get("generator_1"),
        generator_2=row.get("generator_2"),
        annotator=row.get("annotator"),
        dataset=str(row.get("dataset") or ""),
    )


def preference_of(value: Any, where: str) -> float | None:
    """A preference from 1 to 2; None if there is none. Raises: EvaluationError: if it is not a number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise EvaluationError(f"{where}: the preference is {shown(value)}; it must be a number from 1 to 2, or null")
    if value == 0:
        return 1.5
    return float(value) if 1 <= value <= 2 else None


def win_rate(preferences: Sequence[float | None]) -> WinRate:
    """The raw figures. Raises: EvaluationError: if no row is annotated."""
    y = np.asarray([value - 1 for value in preferences if value is not None], np.float64)
    if not len(y):
        raise EvaluationError(f"none of the {len(preferences)} rows has a preference from 1 to 2; was anything judged?")
    wins, losses, draws = int((y > 0.5).sum()), int((y < 0.5).sum()), int((y == 0.5).sum())
    return WinRate(
        win_rate=float(100 * y.mean()),
        standard_error=float(100 * y.std(ddof=1) / math.sqrt(len(y))) if len(y) > 1 else None,
        n_wins=wins,
        n_wins_base=losses,
        n_draws=draws,
        n_total=len(y),
        discrete_win_rate=100 * (wins + draws / 2) / len(y),
    )


def score(
    annotations: Sequence[Annotation],
    assets: Assets | None,
    *,
    strength: float | None = None,
    compat: Compat | None = None,
    name: str | None = None,
) -> Score:
    """The figures of one model.

    Args:
      assets: None leaves the length-controlled win rate out.
      strength: C of its fit; by default chosen by cross-validation.
      compat: "alpaca_eval-0.6.6" gives row i the difficulty of instruction i, as that version of the official package
        does, even if an earlier row is missing. By default a row has the difficulty of its own instruction.
      name: of the model, for people; by default that of the annotations.

    Raises: EvaluationError: if nothing is annotated, or if there are more than one model or baseline.
    """
    warnings: list[str] = []
    model = _only([row.generator_2 for row in annotations], "generator_2", "model")
    baseline = _only([row.generator_1 for row in annotations], "generator_1", "baseline")
    annotator = ", ".join(sorted({row.annotator or UNKNOWN for row in annotations}))
    raw = win_rate([row.preference for row in annotations])
    not_annotated = len(annotations) - raw.n_total
    if not_annotated:
        warnings.append(f"{not_annotated} of {len(annotations)} rows are not annotated; they count in no raw figure")
    controlled = None
    if assets is not None:
        warnings += _limits(annotations, assets, baseline, annotator, chooses=strength is None)
        itself = model is not None and model == baseline
        controlled = _controlled(annotations, assets, strength, compat, warnings, is_baseline=itself)
    if controlled is not None and is_extreme(raw.win_rate, controlled.win_rate):
        warnings.append(
            f"the length-controlled win rate, {controlled.win_rate:.1f} %, is far from the raw one, "
            f"{raw.win_rate:.1f} %; the fit may have failed, or the judge can be gamed"
        )
    return Score(
        model=name or model or UNKNOWN,
        baseline=baseline or UNKNOWN,
        annotator=annotator,
        raw=raw,
        avg_length=int(np.mean([len(row.output_2) for row in annotations])),
        not_annotated=not_annotated,
        controlled=controlled,
        predictions=None
        if controlled is None
        else {row.instruction: float(p) for row, p in zip(annotations, controlled.predictions_N, strict=True)},
        warnings=warnings,
    )


def _only(names: Sequence[str | None], column: str, what: str) -> str | None:
    """The name in a column; None if no row has one. A row without a name says nothing against the others."""
    found = {name for name in names if name}
    if len(found) > 1:
        raise EvaluationError(
            f"the annotations have more than one {what} in {column}: {', '.join(sorted(found)[:4])}; give one at a time"
        )
    return found.pop() if found else None


def _limits(
    annotations: Sequence[Annotation], assets: Assets, baseline: str | None, annotator: str, *, chooses: bool
) -> list[str]:
    """Why a length-controlled win rate may not be what the official one is."""
    found = []
    if annotator != JUDGE:
        found.append(f"the judge is {annotator}; the length-controlled fit is calibrated for {JUDGE} alone")
    by_instruction = {output.instruction: output.output for output in assets.baseline}
    other = sum(by_instruction.get(row.instruction, row.output_1) != row.output_1 for row in annotations)
    if baseline != BASELINE or other:
        named = f"the baseline is {baseline or UNKNOWN}"
        told = f"{other} of its outputs are other texts" if baseline == BASELINE else named
        found.append(f"{told}; the length-controlled fit is calibrated for the outputs of {BASELINE} alone")
    if not assets.official:
        found.append(
            "the rows of the length-controlled fit are not the official file"
            + ("; C by cross-validation may differ, which costs up to 0.16 points" if chooses else "")
        )
    missing = len(assets.baseline) - sum(row.instruction in assets.index for row in annotations)
    if missing > 0:
        found.append(f"{missing} of the {len(assets.baseline)} instructions have no row")
    return found


def _controlled(
    annotations: Sequence[Annotation],
    assets: Assets,
    strength: float | None,
    compat: Compat | None,
    warnings: list[str],
    *,
    is_baseline: bool,
) -> LengthControlled | None:
    """The fit, or None with a warning if the instructions have no difficulty."""
    strangers = [row.instruction for row in annotations if row.instruction not in assets.index]
    if compat is not None and len(annotations) > len(assets.difficulty_I):
        raise EvaluationError(
            f"{len(annotations)} rows, but only {len(assets.difficulty_I)} instructions have a difficulty; {compat} "
            "fails on such a file, too; leave --compat out"
        )
    if compat is None and strangers:
        warnings.append(
            f"{len(strangers)} instructions are not among the official ones, the first is {strangers[0]!r:.60}: they "
            "have no difficulty, so there is no length-controlled win rate (jaxsi eval compare has one for any prompts)"
        )
        return None
    if is_baseline:  # by definition
        if other := sum(row.output_1 != row.output_2 for row in annotations):
            warnings.append(
                f"generator_1 and generator_2 are the same, so the length-controlled win rate is 50 by definition, but "
                f"{other} of the model's outputs are other texts; give the model a name of its own"
            )
        return LengthControlled(
            strength=None, length=0.0, difficulty=0.0, model=0.0,
            predictions_N=np.full(len(annotations), 0.5),
        )  # fmt: skip
    places = range(len(annotations)) if compat is not None else [assets.index[row.instruction] for row in annotations]
    misplaced = sum(assets.index.get(row.instruction) != i for i, row in enumerate(annotations)) if compat else 0
    if misplaced:
        warnings.append(
            f"as {compat} does, {misplaced} rows are given the difficulty of another instruction; without --compat "
            "each has its own"
        )
    return length_controlled(
        np.asarray([math.nan if row.preference is None else row.preference - 1 for row in annotations], np.float64),
        np.asarray([len(row.output_1) - len(row.output_2) for row in annotations], np.float64),
        assets.difficulty_I[list(places)],
        assets.gamed,
        strength,
    )


def leaderboard(scores: Sequence[Score], mode: str = "community") -> str:
    """The official leaderboard's rows as CSV, the best first; an empty cell is a figure that there is not."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["", *COLUMNS])
    order = sorted(scores, key=lambda s: -(s.controlled.win_rate if s.controlled else s.raw.win_rate))
    for one in order:
        figures = one.figures() | {"mode": mode}
        writer.writerow([one.model, *("" if figures[name] is None else figures[name] for name in COLUMNS)])
    return table.getvalue()
