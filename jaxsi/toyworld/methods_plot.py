"""The figure of ``jaxsi bench methods``: a panel for each method, a line for each arm, exact quality by iteration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsi.toyworld.methods_claims import CONTROL, EXACT, METHOD

# Okabe and Ito's colours, which colour-blind people can tell apart too; the marks also differ.
STYLES: dict[str, tuple[str, str, Any, str]] = {
    METHOD: ("#0072B2", "o", "-", "the method"),
    EXACT: ("#009E73", "s", "--", "exact grader in the judge's place"),
    CONTROL: ("#D55E00", "^", ":", "control without a signal"),
}
TITLES = {
    "self_rewarding": "Self-Rewarding", "srt": "SRT", "seft": "SEFT", "pit": "PIT", "spin": "SPIN", "grpo": "GRPO",
    "online_dpo": "Online DPO", "cream": "CREAM", "temporal": "Temporal SR", "meta_rewarding": "Meta-Rewarding",
}  # fmt: skip


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
    methods = list(dict.fromkeys(arm["method"] for arm in value["arms"]))
    figure, axes = pyplot.subplots(
        1, len(methods), figsize=(3.1 * len(methods) + 0.4, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, method in zip(axes[0], methods, strict=True):
        of_method = [arm for arm in value["arms"] if arm["method"] == method]
        arms = [arm for arm in of_method if arm["arm"] in STYLES]
        for offset, arm in enumerate(arms):
            color, marker, line, _ = STYLES[arm["arm"]]
            lines = arm["iterations"]
            x = [i + 0.05 * (offset - (len(arms) - 1) / 2) for i in range(len(lines))]
            y = [entry["quality"] for entry in lines]
            below = [entry["quality"] - entry["ci95"][0] for entry in lines]
            above = [entry["ci95"][1] - entry["quality"] for entry in lines]
            axis.errorbar(
                x, y, yerr=[below, above], color=color, marker=marker, linestyle=line, markersize=5, linewidth=1.6,
                capsize=2.5, elinewidth=1,
            )  # fmt: skip
        base = next((arm["base"] for arm in arms if arm["base"] is not None), None)
        if base is not None:
            axis.axhline(base, color="#888888", linewidth=1, zorder=0)
        ticks = max([arm["iterations"] for arm in of_method], key=lambda lines: len(lines))  # an arm may stop early
        axis.set_xticks(range(len(ticks)), [str(entry["iteration"]) for entry in ticks])
        axis.set_xlim(-0.35, len(ticks) - 0.65)
        axis.set_title(TITLES.get(method, method), fontsize=11)
        axis.set_xlabel("iteration")
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("exact quality of 100, held-out prompts")
    handles = [
        pyplot.Line2D([], [], color=color, marker=marker, linestyle=line, markersize=5, label=label)
        for name, (color, marker, line, label) in STYLES.items()
        if any(arm["arm"] == name for arm in value["arms"])
    ]
    if any(arm["base"] is not None for arm in value["arms"]):
        handles.append(pyplot.Line2D([], [], color="#888888", linewidth=1, label="model as given"))
    columns = min(len(handles), len(methods))  # a label is no wider than a panel
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    for file in files:
        figure.savefig(file, dpi=160)
    pyplot.close(figure)
