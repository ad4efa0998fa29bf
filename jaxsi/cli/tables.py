"""The short tables that commands print at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsi.runs.metrics import table
from jaxsi.runs.status import held_out_rates, instructions_followed


def iterations_table(summary: Mapping[str, Any]) -> str:
    """One line per iteration of a run's summary. A figure that was not measured is "-", or its column is left out."""
    rows = []
    for entry in summary.get("iterations", []):
        quality = entry.get("quality") or {}
        low, high = quality.get("ci95") or (None, None)
        rows.append(
            {
                "iteration": entry["iteration"],
                "quality": _rounded(quality.get("mean")),
                "±": None if low is None else _rounded((high - low) / 2),
                "greedy": _rounded(entry.get("greedy")),
                "judge agreement": _rounded(entry.get("judge_agreement"), 3),
                **win_rates(entry),
                "IFEval": _rate_text(followed) if (followed := instructions_followed(entry)) is not None else None,
                "on human rankings": _rounded((entry.get("judge_quality") or {}).get("accuracy"), 3),
                "parse rate": _rounded(entry.get("parse_rate"), 3),
                "pairs": entry.get("pairs"),
                "ties": entry.get("ties"),
                "length": _rounded(entry.get("mean_length"), 1),
                "seconds": _rounded(sum(entry["seconds"].values()), 1),
            }
        )
    if not rows:
        return "no iteration is complete yet"
    measured = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return table(rows, measured)


def win_rates(entry: Mapping[str, Any]) -> dict[str, str | None]:
    """The win rates of `HeldOutWinRate` in a line of summary.json, e.g. "0.58 (0.51 to 0.64)"."""
    rates = held_out_rates(entry)
    return {
        f"wins over {name}": _rate_text(rates[key]) if key in rates else None
        for name, key in (("first", "over_first"), ("previous", "over_previous"))
    }


def _rate_text(rate: Mapping[str, Any]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(rate["mean"], *rate["ci95"])


def rounds_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    """One line per round of `jaxsi improve`, with a column for each outcome and figure that any round has."""
    outcomes = list(dict.fromkeys(name for entry in rounds for name in entry["outcomes"]))
    rows = []
    for entry in rounds:
        quality = entry["quality"] or {"mean": None, "ci95": [None, None]}
        low, high = quality["ci95"]
        rows.append(
            {
                "round": entry["iteration"],
                **{name: entry["outcomes"].get(name, 0) for name in outcomes},
                "score": _rounded(entry["mean_score"], 3),
                "quality": _rounded(quality["mean"]),
                "±": None if low is None else _rounded((high - low) / 2),
                "length": _rounded(entry["mean_length"], 1),
                "tokens": entry["tokens"],
                "seconds": _rounded(sum(entry["seconds"].values()), 1),
            }
        )
    return table(rows, [name for name in rows[0] if any(row[name] is not None for row in rows)])


def figures_table(figures: Mapping[str, Any]) -> str:
    """Names and figures, one per line."""
    width = max(len(name) for name in figures)
    return "\n".join(f"{name.ljust(width)}  {_cell(value)}" for name, value in figures.items())


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
