"""The figure of ``jaxsi bench methods``: a panel for each method, a line for each arm, exact quality by iteration.
Below them stands the accuracy of the methods' judges on human rankings, Self-Rewarding's second axis (2401.10020)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsi.toyworld.methods_claims import CONTROL, EXACT, METHOD, PAPER_LOSS

# Okabe and Ito's colours, which colour-blind people can tell apart too; the marks also differ.
STYLES: dict[str, tuple[str, str, Any, str]] = {
    METHOD: ("#0072B2", "o", "-", "the method"),
    EXACT: ("#009E73", "s", "--", "exact grader in the judge's place"),
    CONTROL: ("#D55E00", "^", ":", "control without a signal"),
    PAPER_LOSS: ("#CC79A7", "D", "-.", "the paper's own loss"),
}
TITLES = {
    "self_rewarding": "Self-Rewarding", "srt": "SRT", "seft": "SEFT", "pit": "PIT", "spin": "SPIN", "grpo": "GRPO",
    "online_dpo": "Online DPO", "cream": "CREAM", "temporal": "Temporal SR", "meta_rewarding": "Meta-Rewarding",
}  # fmt: skip
MOST_PANELS = 5  # side by side


class PlotError(RuntimeError):
    """matplotlib is not installed."""


def plot(value: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Draws the table of ``bench_methods`` into each of ``files``; the ending decides the format (.png, .svg).

    Raises: PlotError: if matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install 'jaxsi[plots]'") from error
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for arm in value["arms"]:
        by_method.setdefault(arm["method"], []).append(arm)
    judges = [
        name for name, arms in by_method.items() if any(_judged(line) for arm in arms for line in arm["iterations"])
    ]
    columns = min(MOST_PANELS, len(by_method))
    rows = [*_rows(list(by_method), columns), *_rows(judges, columns)]
    figure, axes = pyplot.subplots(
        len(rows), columns, figsize=(3.1 * columns + 0.4, 3.1 * len(rows) + 0.5), sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    of_quality = len(rows) - len(_rows(judges, columns))
    for number, (names, row) in enumerate(zip(rows, axes, strict=True)):
        quality = number < of_quality
        for axis, name in zip(row, names, strict=False):
            _panel(axis, by_method[name], _quality if quality else _judged)
            axis.set_title(TITLES.get(name, name), fontsize=11)
        for axis in row[len(names) :]:
            axis.set_axis_off()
        row[0].set_ylabel(
            "exact quality of 100,\nheld-out prompts" if quality else "judge's accuracy\non human rankings"
        )
    limits = [row[0].get_ylim() for row in axes[:of_quality]]
    for row in axes[:of_quality]:  # one scale for all methods
        row[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    used = {arm["arm"] for arm in value["arms"]}
    handles = [
        pyplot.Line2D([], [], color=color, marker=marker, linestyle=line, markersize=5, label=label)
        for name, (color, marker, line, label) in STYLES.items()
        if name in used
    ]
    if any(arm["base"] is not None for arm in value["arms"]):
        handles.append(pyplot.Line2D([], [], color="#888888", linewidth=1, label="model as given"))
    labels = min(len(handles), columns)  # a label is no wider than a panel
    figure.legend(handles=handles, loc="outside lower center", ncols=labels, frameon=False, fontsize=9)
    for file in files:
        figure.savefig(file, dpi=160)
    pyplot.close(figure)


def _rows(names: Sequence[str], columns: int) -> list[Sequence[str]]:
    return [names[first : first + columns] for first in range(0, len(names), columns)]


Figure = Callable[[Mapping[str, Any]], tuple[float, float, float] | None]


def _quality(line: Mapping[str, Any]) -> tuple[float, float, float]:
    """An iteration's exact quality and its interval."""
    return line["quality"], *line["ci95"]


def _judged(line: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """The accuracy of an iteration's model as a judge of human rankings, without an interval; None: not measured."""
    judged = line.get("judge_quality")
    return None if judged is None else (judged["accuracy"],) * 3


def _panel(axis: Any, arms: Sequence[Mapping[str, Any]], figure_of: Figure) -> None:
    """A method's lines."""
    shown = [arm for arm in arms if arm["arm"] in STYLES]
    ticks: Sequence[Mapping[str, Any]] = max((arm["iterations"] for arm in shown or arms), key=len)  # some stop early
    for offset, arm in enumerate(shown):
        color, marker, style, _ = STYLES[arm["arm"]]
        measured = [(i, found) for i, line in enumerate(arm["iterations"]) if (found := figure_of(line)) is not None]
        if not measured:
            continue
        x = [i + 0.05 * (offset - (len(shown) - 1) / 2) for i, _ in measured]
        y = [mean for _, (mean, _, _) in measured]
        away = [[mean - low for _, (mean, low, _) in measured], [high - mean for _, (mean, _, high) in measured]]
        axis.errorbar(
            x, y, yerr=away if figure_of is _quality else None, color=color, marker=marker, linestyle=style,
            markersize=5, linewidth=1.6, capsize=2.5, elinewidth=1,
        )  # fmt: skip
    base = next((arm["base"] for arm in shown if arm["base"] is not None), None)
    if base is not None and figure_of is _quality:
        axis.axhline(base, color="#888888", linewidth=1, zorder=0)
    axis.set_xticks(range(len(ticks)), [str(line["iteration"]) for line in ticks])
    axis.set_xlim(-0.35, len(ticks) - 0.65)
    axis.set_xlabel("iteration")
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
