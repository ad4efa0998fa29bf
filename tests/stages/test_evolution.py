"""When evolution stops, and which round was best."""

from jaxsi.stages.evolution import best_round, change, stops

PROMPTS = 600


def round_of(share: float, *, moved: int = 0, prompts: int = PROMPTS) -> dict[str, bool]:
    """A round that keeps this share of its responses. ``moved`` of them are kept in other rounds and not here, and as
    many the other way round: chance alone."""
    count = round(share * prompts)
    kept = [i < count for i in range(prompts)]
    kept[:moved] = [False] * moved
    kept[count : count + moved] = [True] * moved
    return {f"p{i}": bool(value) for i, value in enumerate(kept)}


def history(*shares: float, moved: int = 60) -> list[dict[str, bool]]:
    """Rounds with these shares; every second one differs by chance, too."""
    return [round_of(share, moved=moved * (t % 2)) for t, share in enumerate(shares)]


def test_change_that_may_be_chance_does_not_stop():
    """A share of 0.412, then 0.410, with a standard error of two points: the rule before stopped here."""
    rounds = history(0.412, 0.410)
    low, high = change(*rounds)
    assert low < 0 < high and high - low > 0.05
    assert not stops(rounds, first=1, patience=2)
    assert best_round(rounds) == 0


def test_share_that_has_fallen_below_the_best_stops():
    assert stops(history(0.3, 0.5, 0.4), first=1, patience=9)
    assert not stops(history(0.3, 0.5, 0.49), first=1, patience=9)
    assert stops(history(0.3, 0.7, 0.69, 0.5), first=1, patience=9), "compared with the best, not with the one before"
    assert best_round(history(0.3, 0.7, 0.69, 0.5)) == 1


def test_rounds_without_evidence_of_a_rise_stop_after_patience():
    flat = history(0.3, 0.5, 0.505, 0.5)
    assert [stops(flat[: t + 1], first=1, patience=2) for t in range(4)] == [False, False, False, True]
    assert stops(flat[:3], first=1, patience=1) and not stops(history(0.3, 0.5, 0.7), first=1, patience=1)
    # Small steps, none of which is evidence, add up within the window.
    steps = history(0.30, 0.33, 0.36, 0.39)
    assert stops(steps[:3], first=1, patience=1) and not stops(steps, first=1, patience=3)


def test_rounds_before_the_first_judged_one_never_stop_but_are_compared_with():
    fallen = history(0.6, 0.5, 0.3)
    assert [stops(fallen[: t + 1], first=3, patience=1) for t in range(3)] == [False] * 3
    assert stops(history(0.3, 0.9, 0.5), first=2, patience=9), "an external round that falls below an internal one"
    # The window of rounds that may be at fault begins with the first judged one.
    assert not stops(history(0.5, 0.5, 0.5), first=2, patience=2)
    assert stops(history(0.5, 0.5, 0.5, 0.5), first=2, patience=2)


def test_only_prompts_that_both_rounds_labelled_are_compared():
    before, after = round_of(0.5), round_of(0.5)
    few = {id: kept for id, kept in after.items() if id < "p3"}
    assert change(before, few) == (0.0, 0.0)
    assert change(before, {}) == (float("-inf"), float("inf"))
    assert not stops([before, {}], first=1, patience=9) and best_round([{}, before]) == 1
