"""Plots as SVG: texts stay texts, colours are variables, and any finite number can be drawn."""

import re
import xml.etree.ElementTree

import pytest

from jaxsi.report.plots import Series, bars, lines, swatch

EXTREME = [1e308, -1e308, 5e-324, 0.0, None]


@pytest.mark.parametrize("y", [[1.0, 2.0, 3.0, 2.0, 1.0], [0.0] * 5, EXTREME, [None] * 5])
def test_a_plot_is_xml_with_variables_as_colours(y):
    series = [Series(label="a", style=n, x=[1, 2, 3, 4, 5], y=y, second=n == 9) for n in (0, 1, 9)]
    svg = lines(series, title="a <b> & c", x_label="step", name="x")
    root = xml.etree.ElementTree.fromstring(svg)
    assert (root.get("aria-label") or "").startswith("a <b> & c") and root.get("role") == "img"
    assert "step" in [node.text for node in root.iter() if node.tag.endswith("text")]
    assert not re.search(r"#[0-9a-f]{6}\b", svg) and "var(--series-1)" in svg and "var(--soft)" in svg


def test_intervals_and_ticks_are_drawn():
    one = Series(label="a", style=0, x=[0, 1], y=[1.0, 2.0], low=[0.5, None], high=[1.5, None])
    svg = lines([one], title="t", x_label="iteration", name="x", ticks=[(0, "base"), (1, "$1$")])
    assert 'aria-label="t: a from 1 to 2"' in svg
    assert ">base<" in svg and ">$1$<" in svg  # no formula


def test_plots_of_a_page_share_no_id_and_are_the_same_each_time():
    def drawn(name):
        return lines([Series(label="a", style=0, x=[1], y=[1.0])], title="t", x_label="x", name=name)

    assert drawn("a") == drawn("a")
    assert not set(re.findall(r' id="([^"]+)"', drawn("a"))) & set(re.findall(r' id="([^"]+)"', drawn("b")))


def test_bars_and_swatches_are_xml():
    svg = bars(
        ["1", "2"], [("iteration 2", [10.0, 90.0]), ("iteration 3", [0.0, 100.0])], title="t", x_label="s", name="b"
    )
    xml.etree.ElementTree.fromstring(svg)
    for style in range(9):
        xml.etree.ElementTree.fromstring(swatch(style))


def test_long_lines_are_thinned_and_keep_their_end():
    series = Series(label="a", style=0, x=list(range(5000)), y=[float(n) for n in range(5000)])
    assert len(lines([series], title="t", x_label="x", name="x")) < 60_000


def texts(svg):
    return [node.text for node in xml.etree.ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]


@pytest.mark.parametrize(
    ("y", "low", "high"),
    [([76.58, 76.62], 74, 79), ([5.0, 0.0], 0, 6), ([-0.7, -0.71], -1, 0), ([1.4e-5, 0.0], 0, 2e-5)],
)
def test_what_hardly_changes_is_not_blown_up_and_counts_begin_at_zero(y, low, high):
    svg = lines(
        [Series(label="a", style=0, x=[1, 2], y=y)], title="t", x_label="x", name="x", ticks=[(1, "a"), (2, "b")]
    )
    shown = [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts(svg) if text not in ("a", "b", "x")]
    assert low <= min(shown) < max(shown) <= high and max(shown) - min(shown) > 0.02 * abs(y[0])


def test_parts_of_a_line_have_their_names_where_they_fit():
    one = Series(label="a", style=0, x=[1, 50, 51, 100], y=[1.0, 2.0, 3.0, 4.0])

    def named(*parts):
        return [text for text in texts(lines([one], title="t", x_label="x", name="x", parts=parts)) if "t" in text]

    assert named((1, 50.5, "iter_1"), (50.5, 100, "iter_2")) == ["iter_1", "iter_2"]
    tenths = [(10 * n, 10 * (n + 1), f"t{n}" if n else "long_name_of_it") for n in range(10)]
    assert named(*tenths) == [f"t{n}" for n in range(1, 10)]
