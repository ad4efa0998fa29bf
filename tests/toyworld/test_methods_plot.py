"""The figure of `jaxsi bench methods`."""

import sys

import pytest

from jaxsi.toyworld.methods_plot import CONTROL, EXACT, METHOD, PAPER_LOSS, PlotError, plot


def arm(method: str, name: str, qualities: list[float], base: float | None) -> dict:
    lines = [{"iteration": i, "quality": q, "ci95": [q - 2, q + 1]} for i, q in enumerate(qualities)]
    return {"method": method, "arm": name, "base": base, "iterations": lines}


VALUE = {
    "arms": [
        arm("self_rewarding", METHOD, [50.0, 60.0, 70.0], 40.0),
        arm("self_rewarding", CONTROL, [50.0, 51.0, 49.0], 40.0),
        arm("pit", METHOD, [60.0, 80.0], None),
        arm("pit", EXACT, [60.0, 90.0], None),
        arm("unheard_of", METHOD, [10.0], None),
    ]
}


def test_file_ending_decides_the_format_and_panels_name_the_methods(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'jaxsi[plots]'")
    files = [tmp_path / "methods.png", tmp_path / "methods.svg"]
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        plot(VALUE, files)
    assert files[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and files[0].stat().st_size > 10_000
    svg = files[1].read_text()
    for words in ("Self-Rewarding", "PIT", "unheard_of", "the method", "control without a signal", "model as given",
                  "exact grader", "#0072B2".lower(), "iteration"):  # fmt: skip
        assert words in svg, words
    assert "SPIN" not in svg


def test_legend_shows_only_present_arms(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'jaxsi[plots]'")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot({"arms": [arm("spin", METHOD, [10.0, 20.0], None)]}, [tmp_path / "spin.svg"])
    svg = (tmp_path / "spin.svg").read_text()
    assert "SPIN" in svg and "the method" in svg
    assert "control" not in svg and "exact grader" not in svg and "model as given" not in svg


def test_methods_stand_in_rows_of_five_and_their_judges_below(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="plots need matplotlib: pip install 'jaxsi[plots]'")
    arms = [arm(f"method {i}", name, [50.0, 60.0], None) for i in range(7) for name in (METHOD, PAPER_LOSS)]
    for line, accuracy in zip(arms[4]["iterations"], (0.8, 0.7), strict=True):
        line["judge_quality"] = {"accuracy": accuracy}
    drawn = []
    close = pyplot.close
    pyplot.close = drawn.append
    try:
        plot({"arms": arms}, [tmp_path / "methods.png"])
    finally:
        pyplot.close = close
    [figure] = drawn
    shown = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in shown] == [*(f"method {i}" for i in range(7)), "method 2"]
    assert len(figure.axes) == 15, "three rows of five"
    assert shown[0].get_ylim() == shown[5].get_ylim() != shown[-1].get_ylim(), "one scale for the quality of all"
    [(line, *_)] = shown[-1].containers
    assert line.get_ydata().tolist() == [0.8, 0.7], "of the method alone: the other arm has no figure"
    assert len(shown[0].containers) == 2 and "human rankings" in figure.axes[10].get_ylabel()
    close(figure)


def test_method_with_only_ablations_has_an_empty_panel(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'jaxsi[plots]'")
    plot({"arms": [arm("srt", "no score", [10.0], None), VALUE["arms"][0]]}, [tmp_path / "methods.svg"])
    assert (tmp_path / "methods.svg").stat().st_size > 1000


def test_figure_is_not_cut_off_at_the_sides(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="plots need matplotlib: pip install 'jaxsi[plots]'")
    pit = [arm("pit", name, [10.0, 20.0, 30.0], 9.0) for name in (METHOD, CONTROL, EXACT)]
    for arms in (pit, [*pit, arm("srt", METHOD, [10.0, 20.0], None)], VALUE["arms"]):
        plot({"arms": arms}, [tmp_path / "methods.png"])
        pixels = pyplot.imread(tmp_path / "methods.png")[..., :3]
        assert (pixels[:, [0, -1]] == 1).all() and not (pixels == 1).all()


def test_missing_matplotlib_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"pip install 'jaxsi\[plots\]'"):
        plot(VALUE, [tmp_path / "methods.png"])
