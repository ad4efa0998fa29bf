"""The claims about each method on the embedded world, and whether the measured table supports them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

METHOD, CONTROL, EXACT, PAPER_LOSS = "method", "control", "exact", "paper loss"
LEAST_GAIN, MOST_OF_CONTROL = 8.0, 3.0  # points of 100
LEAST_MEAN, LEAST_EACH = 0.85, 0.75  # of the gap reward model's inequalities

Row = Mapping[str, Any]  # an arm of the table


class Claim(NamedTuple):
    """A claim about a method, the measurement, and whether the claim held."""

    method: str
    claim: str
    measured: str
    held: bool


def claims(rows: Sequence[Row]) -> list[Claim]:
    """All claims that can be checked on the given arms."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        arms = {row["arm"]: row for row in rows if row["method"] == method}
        if METHOD in arms:
            for check in (_gains, *OF_METHOD.get(method, ())):
                found += [Claim(method, *claim) for claim in check(arms)]
    return found


Found = Iterator[tuple[str, str, bool]]


def _gains(arms: Mapping[str, Row]) -> Found:
    """The method gains; its control, which has no signal, does not."""
    own = arms[METHOD]["gain"]
    if own is None:
        return
    held = own["mean"] >= LEAST_GAIN and own["ci95"][0] > 0
    yield f"gains at least {LEAST_GAIN:g}, interval above 0", gain_text(own), held
    control = arms[CONTROL]["gain"] if CONTROL in arms else None
    if control is not None:
        high = control["ci95"][1]
        claim = f"control's upper end below {MOST_OF_CONTROL:g} and below the method's lower end"
        yield claim, gain_text(control), high < MOST_OF_CONTROL and high < own["ci95"][0]


def _orders(arms: Mapping[str, Row]) -> Found:
    """PIT: the gap reward model orders held-out pairs."""
    by_seed = [figures["inequalities"] for figures in arms[METHOD]["last"]]
    means = [shares["mean"] for shares in by_seed]
    least = min(share for shares in by_seed for share in shares.values())
    claim = f"gap reward keeps the inequalities in {LEAST_MEAN:.0%} of held-out pairs on average, {LEAST_EACH:.0%} each"
    measured = f"{sum(means) / len(means):.1%} on average, the least {least:.1%}"
    yield claim, measured, min(means) >= LEAST_MEAN and least >= LEAST_EACH


def _over_drafts(arms: Mapping[str, Row]) -> Found:
    """PIT: the improved responses are better than the policy's own."""
    gain = arms[METHOD]["over_drafts"]
    yield "improved responses beat the policy's own", gain_text(gain), gain["ci95"][0] > 0


def _both_rounds(arms: Mapping[str, Row]) -> Found:
    """PIT: the whole curriculum beats each round alone, on the seed that they share."""
    for name in ("round 0 only", "round 1 only"):
        if name in arms:
            both, one = (arms[arm]["iterations"][-1]["quality_of_seeds"][0] for arm in (METHOD, name))
            yield f"both rounds beat {name} at equal steps (one seed)", f"{both:.1f} against {one:.1f}", both > one


def _gated(arms: Mapping[str, Row]) -> Found:
    """SEFT: a draft without a fault is better left alone."""
    good = [reviser["good_drafts"] for reviser in arms[METHOD]["reviser"]]
    measured = "; ".join(f"{of['gated']:.1f} against {of['always']:.1f}" for of in good)
    yield "gated revision beats always-revise on good drafts", measured, all(of["ci95"][0] > 0 for of in good)


def _refined(arms: Mapping[str, Row]) -> Found:
    """SRT: refining is worth its tokens."""
    for place, name in (("first", "M_self"), ("last", "the result")):
        figures = arms[METHOD][place]
        gains = [figure["gain_of_refining"] for figure in figures]
        measured = "; ".join(f"{of['mean']:+.1f} ({of['low']:+.1f} to {of['high']:+.1f})" for of in gains)
        yield f"{name}: refined answers beat first answers", measured, all(of["low"] > 0 for of in gains)
        better = [figure["reranked"]["refined_is_better_by"] for figure in figures]
        measured = "; ".join(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})" for mean, low, high in better)
        claim = f"{name}: refining once beats re-ranking as many samples as cost the same tokens"
        yield claim, measured, all(low > 0 for _, low, _ in better)


def gain_text(gain: Mapping[str, Any]) -> str:
    """A gain with its interval, e.g. `+16.5 (+13.7 to +19.6)`."""
    low, high = gain["ci95"]
    return f"{gain['mean']:+.1f} ({low:+.1f} to {high:+.1f})"


OF_METHOD: dict[str, tuple[Callable[[Mapping[str, Row]], Found], ...]] = {
    "srt": (_refined,),
    "seft": (_gated,),
    "pit": (_over_drafts, _orders, _both_rounds),
}
