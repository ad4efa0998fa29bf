"""What a run says about its models, in a line each."""

from jaxsi.runs.status import sentence, so_far

LINE = {
    "iteration": 2, "quality": {"mean": 82.376, "ci95": [80.73, 84.01]}, "judge_agreement": 0.8513, "parse_rate": 1.0,
    "pairs": 1490, "ties": 103, "seconds": {"dpo": 40.0, "judgments": 20.2},
}  # fmt: skip
RATES = {"held-out": {"over_first": {"iteration": "1", "mean": 0.62, "ci95": [0.5, 0.7], "prompts": 66}}}


def test_line_of_an_iteration_says_what_was_measured():
    assert sentence(LINE) == (
        "iteration 2: quality 82.4 (80.7 to 84.0), judge agreement 0.851, 1,490 pairs, 103 ties, 60 s"
    )
    given = {"iteration": "base", "quality": None, "parse_rate": 0.5, "evals": RATES, "seconds": {}}
    assert sentence(given) == (
        "the model as given: wins over the first model 0.62 (0.50 to 0.70), parse rate 0.500, 0 s"
    )


def test_so_far_has_the_quality_of_every_model_or_else_its_win_rates():
    base = {"iteration": "base", "quality": {"mean": 60.0, "ci95": [59, 61]}}
    assert so_far({"base": base, "iterations": [LINE]}) == "quality 60.0 → 82.4"
    assert (
        so_far({"iterations": [{"iteration": 1}, {"iteration": 2, "evals": RATES}]}) == "wins over the first model 0.62"
    )
    assert so_far({}) == ""
