"""Small plots as SVG for a page: matplotlib draws them, and the page's style sheet gives them their colours.

The texts stay texts, so that they are read, searched and printed in the page's own font. A colour is a CSS variable,
so that a plot is as readable on a dark page as on paper. A series has a colour, a mark and a dash of its own, and none
of the three is needed to follow it.
"""

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import escape

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SOLID: tuple[float, ...] = ()
DASHES = (SOLID, (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (3, 1, 1, 1), (8, 3))
COLOURS = 6  # --series-0 ... in page.css
WIDTH, HEIGHT = 360, 225  # CSS pixels; a panel is about as wide on a phone as in the columns of a wide page
MOST_POINTS = 240  # of a line
LARGEST = 1e150  # a number that is drawn: matplotlib computes with the squares of ranges

# matplotlib writes hexadecimal colours; these stand for variables of the style sheet.
_INK, _SOFT, _LINE = "#0001f0", "#0001f1", "#0001f2"
_VARIABLES = {_INK: "var(--ink)", _SOFT: "var(--soft)", _LINE: "var(--line)"}
_SERIES = "#0002{:02x}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A line. ``style``: which colour, mark and dash it has. ``second``: the other line of a pair in one style.
    ``low`` and ``high``: the ends of the intervals, None where there is none."""

    label: str
    style: int
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    second: bool = False


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    name: str,
    ticks: Sequence[tuple[float, str]] = (),
    parts: Sequence[tuple[float, float, str]] = (),
    share: bool = False,
) -> str:
    """An SVG of lines. ``title``: what a screen reader says first. ``name``: unique in the page. ``ticks``: (place,
    label) of the x axis. ``parts``: (beginning, end, name) of parts of it. ``share``: the y axis goes from 0 to 1."""
    figure, axis = _figure()
    for offset, one in enumerate(series):
        shift = 0.05 * (offset - (len(series) - 1) / 2) if ticks and one.low else 0.0
        color, few = _SERIES.format(one.style % COLOURS), len(one.x) <= 12
        dash = _dash(one.style, one.second)
        x = [place + shift for place in one.x]
        y: list[Any] = [float("nan") if value is None or abs(value) > LARGEST else value for value in one.y]
        x, y = _thinned(x), _thinned(y)
        axis.plot(
            x, y, color=color, linewidth=1.7, linestyle=(0, dash) if dash else "-", clip_on=False, zorder=3,
            marker=MARKERS[one.style % len(MARKERS)], markersize=5 if few else 4,
            markevery=1 if few else max(len(x) // 6, 1), markerfacecolor="none" if one.second else color,
        )  # fmt: skip
        for place, low, high in zip(x, one.low or [], one.high or [], strict=False):
            if low is not None and high is not None and max(abs(low), abs(high)) <= LARGEST:
                axis.plot([place, place], [low, high], color=color, linewidth=1.1, zorder=2, marker="_", markersize=5)
    _show_parts(axis, parts)
    if ticks:
        axis.set_xticks([place for place, _ in ticks], [label for _, label in ticks], parse_math=False)
        axis.set_xlim(ticks[0][0] - 0.3, ticks[-1][0] + 0.3)
    else:
        axis.xaxis.get_major_locator().set_params(integer=True)
    low, high = (0, 1) if share else _y_range(series)
    axis.set_ylim(low, high)
    if not 1e-3 < max(abs(low), abs(high)) < 1e6:  # else: a factor such as 1e-5 would stand alone above the axis
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}".replace("-", "\N{MINUS SIGN}"))
    axis.set_xlabel(x_label)
    return _svg(figure, _told(title, series), name)


def _told(title: str, series: Sequence[Series]) -> str:
    """What a screen reader says of lines: where each begins and ends. All numbers are in the table below the plot."""
    ends = []
    for one in series:
        known = [value for value in one.y if value is not None]
        if known:
            ends.append(f"{one.label}{', hollow' if one.second else ''} from {known[0]:.4g} to {known[-1]:.4g}")
    return ": ".join([title, "; ".join(ends[:8])]) if ends else title


def _y_range(series: Sequence[Series]) -> tuple[float, float]:
    """The ends of the y axis. They are a twentieth of the largest number apart at least, so that what hardly changes
    looks like it, and below zero only if a number is."""
    values = [
        value
        for one in series
        for row in (one.y, one.low or (), one.high or ())
        for value in row
        if value is not None and abs(value) <= LARGEST
    ]
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = max(high - low, 0.05 * max(abs(low), abs(high))) or 1.0
    middle, half = (low + high) / 2, 0.62 * span
    return (max(middle - half, 0.0) if low >= 0 else middle - half), middle + half


def _show_parts(axis: Any, parts: Sequence[tuple[float, float, str]]) -> None:
    """Thin lines between the parts of the x axis, and the names of the parts above them, where they fit."""
    if not parts:
        return
    pixels = 0.85 * WIDTH / (parts[-1][1] - parts[0][0])  # of one unit of the x axis, about
    short = [name.removeprefix("iter_") for _, _, name in parts]
    fit = all(6 * len(name) < (end - start) * pixels for start, end, name in parts)
    for (start, end, name), brief in zip(parts, short, strict=True):
        if start > parts[0][0]:
            axis.axvline(start, color=_LINE, linewidth=1, zorder=1)
        label = name if fit else brief
        if 6 * len(label) < (end - start) * pixels:
            axis.text(
                (start + end) / 2, 1.04, label, transform=axis.get_xaxis_transform(), color=_SOFT, fontsize=9.5,
                ha="center", va="bottom", parse_math=False,
            )  # fmt: skip


def bars(
    labels: Sequence[str],
    heights: Sequence[tuple[str, Sequence[float]]],
    *,
    title: str,
    x_label: str,
    name: str,
    style: int = 0,
) -> str:
    """An SVG of groups of bars: for each label one of each series (its name, heights), from the palest to the full
    colour of ``style``."""
    figure, axis = _figure()
    width = 0.8 / max(len(heights), 1)
    color = _SERIES.format(style % COLOURS)
    for number, (_, values) in enumerate(heights):
        x = [i - 0.4 + width * (number + 0.5) for i in range(len(labels))]
        pale = 0.25 + 0.75 * (number + 1) / len(heights) if len(heights) > 1 else 1.0
        axis.bar(x, values, width=width * 0.9, facecolor=(color, pale), edgecolor=color, linewidth=0.8, zorder=2)
    axis.set_xticks(range(len(labels)), labels, parse_math=False)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(x_label)
    return _svg(figure, title, name)


def swatch(style: int, *, second: bool = False) -> str:
    """A piece of a line in a style, for a legend."""
    lengths = " ".join(f"{1.7 * part:g}" for part in _dash(style, second))
    colour = f"var(--series-{style % COLOURS})"
    mark = _MARKS[style % len(_MARKS)].format(fill="var(--paper)" if second else colour, stroke=colour)
    line = f'<line x1="1" x2="33" y1="6" y2="6" stroke="{colour}" stroke-width="2" stroke-dasharray="{lengths}"/>'
    return f'<svg class="swatch" width="34" height="12" viewBox="0 0 34 12" aria-hidden="true">{line}{mark}</svg>'


def _dash(style: int, second: bool) -> tuple[float, ...]:
    return DASHES[2] if second else DASHES[style % len(DASHES)]


_POLYGON = '<polygon points="{points}" fill="{{fill}}" stroke="{{stroke}}"/>'
_MARKS = (
    '<circle cx="17" cy="6" r="3.6" fill="{fill}" stroke="{stroke}"/>',
    *(
        _POLYGON.format(points=points)
        for points in (
            "13.4,2.4 20.6,2.4 20.6,9.6 13.4,9.6", "17,1.6 21,9.6 13,9.6", "17,1 22,6 17,11 12,6",
            "13,2.4 21,2.4 17,10.4",
            "15.7,2 18.3,2 18.3,4.7 21,4.7 21,7.3 18.3,7.3 18.3,10 15.7,10 15.7,7.3 13,7.3 13,4.7 15.7,4.7",
            "14,1.5 17,4.5 20,1.5 21.5,3 18.5,6 21.5,9 20,10.5 17,7.5 14,10.5 12.5,9 15.5,6 12.5,3",
            "17,1 18.3,4.6 22,4.6 19,6.9 20.2,10.6 17,8.3 13.8,10.6 15,6.9 12,4.6 15.7,4.6",
        )
    ),
)  # fmt: skip


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, layout="constrained")
    axis = figure.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    for spine in axis.spines.values():
        spine.set_color(_LINE)
    axis.tick_params(colors=_SOFT, labelsize=11, length=0, pad=6)
    axis.xaxis.label.set(color=_SOFT, fontsize=11)
    axis.grid(axis="y", color=_LINE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.03, y=0.12)
    return figure, axis


def _svg(figure: Any, title: str, name: str) -> str:
    """The figure as an <svg> that scales with its column. ``name`` keeps the ids of one page's plots apart."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "axes.unicode_minus": True}):
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=none)
    text = out.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", body, flags=re.S)
    body = re.sub(r' id="(figure|axes|matplotlib|text|line2d|patch|xtick|ytick)[^"]*"', "", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    body = re.sub(r"#0002([0-9a-f]{2})", lambda found: f"var(--series-{int(found[1], 16)})", body)
    body = re.sub(r" font-family: [^;]*;", "", re.sub(r"font: [^;\"]*;?", _font, body))
    body = re.sub(r' transform="rotate\(-?0 [^"]*"', "", body)
    body = re.sub(r">\s+<", "><", body.replace("xlink:href", "href"))
    label = escape(title)
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>'


def _font(found: re.Match[str]) -> str:
    size = re.search(r"([\d.]+)px", found[0])
    return f"font-size: {size[1] if size else 11}px;"


def _thinned(values: list[Any]) -> list[Any]:
    """At most MOST_POINTS values, the last one among them."""
    if len(values) <= MOST_POINTS:
        return values
    return [values[round(i * (len(values) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
