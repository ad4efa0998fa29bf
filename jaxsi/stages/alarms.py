"""Alarms of a judge: what they say to people, with the cause and what to do."""

from collections.abc import Mapping
from typing import Any

# Shares above these (below, for the parse rate) raise an alarm: the judge has collapsed or ignores its rubric.
ONE_SCORE_ALARM = 0.6
TIE_ALARM = 0.6
PARSE_ALARM = 0.5


def sentence(alarm: str, statistics: Mapping[str, Any]) -> str:
    """What an alarm of `judge.judgment_statistics` means and what to do, in one sentence."""
    histogram = {score: share for score, share in (statistics.get("histogram") or {}).items() if share}
    if alarm == "one_score":
        score, share = max(histogram.items(), key=lambda item: item[1], default=("the same", None))
        return (
            f"the judge gives {_share(share)} of its verdicts the score {score}, so it hardly tells responses apart; "
            "use harder prompts, a finer rubric or another judge (--judging)"
        )
    if alarm == "ties":
        return (
            f"the judge gives all responses the same score on {_share(statistics.get('tie_rate'))} of the prompts, and "
            "these make no pair; sample more responses at a higher temperature, or take the mean of more judgments "
            "(judge.num_samples)"
        )
    if alarm == "parse_rate":
        return (
            f"only {_share(statistics.get('parse_rate'))} of the judge's texts have a score that can be read, so the "
            "model does not follow the rubric; look at the judgments, set judge.expected, or use another judge "
            "(--judging)"
        )
    return f"the judge raises the alarm {alarm!r}; look at its judgments"


def _share(value: Any) -> str:
    return "most" if not isinstance(value, int | float) else f"{100 * value:.0f} %"
