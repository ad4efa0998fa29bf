"""The claims about the methods, checked on made-up tables."""

import pytest

from jaxsi.toyworld.methods_claims import claims


def arm(method: str, name: str, gain: float, width: float = 1.0, quality: float = 80.0, **figures) -> dict:
    interval = {"mean": gain, "ci95": [gain - width, gain + width]}
    lines = [{"quality_of_seeds": [quality, quality]}]
    measured = {"first": [figures, figures], "last": [figures, figures]}
    return {
        "method": method,
        "arm": name,
        "gain": interval,
        "over_drafts": interval,
        "iterations": lines,
        "reviser": [],
    } | measured


def held(rows: list) -> list[bool]:
    return [claim.held for claim in claims(rows)]


@pytest.mark.parametrize(
    ("gain", "width", "control", "expected"),
    [
        (9.0, 1.0, 0.0, [True, True]),
        (7.9, 1.0, 0.0, [False, True]),
        (9.0, 9.5, 0.0, [False, False]),  # the interval reaches below 0, and so below that of the control
        (9.0, 1.0, 2.5, [True, False]),
        (3.5, 1.0, 1.9, [False, False]),
    ],
)
def test_gain_claim_needs_a_gain_and_a_flat_control(gain, width, control, expected):
    assert held([arm("m", "method", gain, width), arm("m", "control", control)]) == expected


def test_single_iteration_makes_no_claim():
    assert claims([arm("m", "method", 9.0) | {"gain": None}]) == []


def test_table_without_the_method_makes_no_claim():
    assert claims([arm("m", "control", 0.0)]) == []


def test_pit_claims_its_inequalities_and_both_rounds():
    orders = {"wl>ww": 0.9, "ll>lw": 0.8, "mean": 0.85}
    row = arm("pit", "method", 9.0, quality=80.0, inequalities=orders)
    alone = [arm("pit", "round 0 only", 1.0, quality=79.0), arm("pit", "round 1 only", 1.0, quality=81.0)]
    assert held([row, *alone]) == [True, True, True, True, False]
    for name, value in (("mean", 0.84), ("ll>lw", 0.74)):
        worse = arm("pit", "method", 9.0, inequalities=orders | {name: value})
        assert held([worse]) == [True, True, False]
    assert held([row | {"over_drafts": {"mean": 1.0, "ci95": [-0.5, 2.0]}}]) == [True, False, True]


def test_seft_claims_that_good_drafts_are_left_alone():
    row = arm("seft", "method", 9.0)
    row["reviser"] = [{"good_drafts": {"gated": 100.0, "always": 92.0, "ci95": [5.0, 10.0]}}]
    assert held([row]) == [True, True]
    row["reviser"].append({"good_drafts": {"gated": 100.0, "always": 99.0, "ci95": [-0.1, 2.0]}})
    assert held([row]) == [True, False]


def test_srt_claims_that_refining_pays():
    figures = {
        "gain_of_refining": {"mean": 2.0, "low": 1.0, "high": 3.0},
        "reranked": {"refined_is_better_by": [2.0, 1.0, 3.0]},
    }
    row = arm("srt", "method", 9.0, **figures)
    assert held([row]) == [True] * 5
    row["last"] = [figures, figures | {"reranked": {"refined_is_better_by": [2.0, -1.0, 3.0]}}]
    assert held([row]) == [True, True, True, True, False]
    assert "+2.0 (-1.0 to +3.0)" in claims([row])[-1].measured
