"""The figures of runs as panels: a plot of each, and the same numbers as a table.

A figure of an evaluation is a number, or a mean with its interval. Which figures there are depends on the evaluation,
so everything that an evaluation says has a place: what is known stands where a reader looks for it, and the rest
follows.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxsi.report import plots
from jaxsi.report.plots import Series
from jaxsi.report.run_files import RunFiles, ScopeFiles, listed, mapping, number, text

Value = tuple[float, float | None, float | None]  # mean, and the ends of its interval


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns and rows of texts; ``numbers``: which columns are aligned as numbers."""

    columns: list[str]
    rows: list[list[str]]
    numbers: list[bool]


@dataclasses.dataclass(frozen=True)
class Panel:
    """A plot (an SVG) with its title, a note on how to read it, and its numbers."""

    title: str
    note: str
    plot: str
    table: Table


@dataclasses.dataclass(frozen=True)
class Figure:
    """A panel of every iteration: ``name`` is the figure, ``second`` another one in the same plot with its own words.
    ``share``: it is between 0 and 1."""

    name: str
    title: str
    second: str | None = None
    note: str = ""
    share: bool = False


# Figures that have a section of their own. Others are "further figures".
QUALITY = (
    Figure("quality", "Quality"),
    Figure("evals.held-out.over_first", "Wins over the first model", note="share of held-out prompts", share=True),
    Figure(
        "evals.held-out.over_previous", "Wins over the previous model", note="share of held-out prompts", share=True
    ),
    Figure("greedy", "Greedy quality"),
    Figure("best_of_samples", "Best of the samples"),
    Figure("first", "First responses, before they are refined"),
    Figure("draft", "Drafts, before they are improved"),
    Figure("reranked.quality", "Best of several drafts, reranked"),
    Figure("win_rate.mean", "Win rate over the best model before", share=True),
)
JUDGE = (
    Figure(
        "judge_agreement", "Agreement with the truth", "judge_agreement_without_ties",
        "hollow: without ties; else they are wrong", True,
    ),
    Figure("judge_tie_share", "Share of ties", share=True),
    Figure("judge_pairs", "Pairs that the agreement rests on"),
    Figure("parse_rate", "Parse rate", note="share of the judge's texts that have a score", share=True),
    Figure(
        "judge_quality.accuracy", "On human rankings: accuracy", "judge_quality.accuracy_without_ties",
        "hollow: without ties", True,
    ),
    Figure("judge_quality.spearman", "On human rankings: Spearman", "judge_quality.kendall", "hollow: Kendall's tau-b"),
    Figure(
        "judge_quality.five_best", "On human rankings: the top score is a best response", "judge_quality.exact_match",
        "hollow: the whole order is right", True,
    ),
    Figure("judge_quality.tie_share", "On human rankings: share of ties", share=True),
    Figure("feedback_rate", "Share of responses with feedback", share=True),
    Figure("consistency", "Consistency of two judges"),
    Figure("no_share", "Share that the reviser leaves as it is", share=True),
)  # fmt: skip
LENGTH = (
    Figure("mean_length", "Mean length", note="tokens of the evaluated responses"),
    Figure("chosen_tokens", "Chosen and rejected responses", "rejected_tokens", "tokens; hollow: rejected"),
    Figure("cut_off", "Share cut off", share=True),
)
PAIRS = (
    Figure("pairs", "Pairs", "ties", "hollow: ties, which make no pair"),
    Figure("gap", "Gap of the scores in a pair"),
    Figure("identical", "Identical texts", note="prompts whose responses are the same text"),
    Figure("unscored", "Without a score"),
)
NAMED = {name for one in (*QUALITY, *JUDGE, *LENGTH, *PAIRS) for name in (one.name, one.second)}
HIDDEN = {"iteration", "fingerprint", "seconds", "by_prompt", "alarms", "examples", "counts", "length_difference"}


def values_of(entry: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """{dotted name: Value} of all figures in an entry of a summary or an evaluation."""
    found: dict[str, Value] = {}
    for key, item in entry.items():
        name = f"{prefix}{key}"
        if not prefix and key in HIDDEN:
            continue
        plain = number(item)
        if plain is not None:
            found[name] = (plain, None, None)
        elif isinstance(item, dict):
            mean = number(item.get("mean"))
            ends = [number(end) for end in listed(item.get("ci95")) or [item.get("low"), item.get("high")]]
            if mean is not None and len(ends) == 2 and None not in ends:
                found[name] = (mean, ends[0], ends[1])
                item = {k: v for k, v in item.items() if k not in ("mean", "ci95", "low", "high")}
            found |= values_of(item, f"{name}.")
        elif isinstance(item, list) and len(item) == 3 and all(number(one) is not None for one in item):
            mean, low, high = item
            found |= {name: (mean, low, high)} if low <= mean <= high else {}
    return found


def by_iteration(runs: Sequence[RunFiles]) -> list[dict[str, dict[str, Value]]]:
    """For each run {iteration: figures}, with the counts of the pairs of that iteration."""
    measured = []
    for run in runs:
        found: dict[str, dict[str, Value]] = {}
        for entry in run.iterations:
            scope = run.scopes.get("base" if entry["iteration"] == "base" else f"iter_{entry['iteration']}")
            counts = mapping(scope.values.get("pairs_counts")) if scope else {}
            own = {name: value for name, value in counts.items() if name in NAMED}
            found[str(entry["iteration"])] = values_of({**own, **entry})
        measured.append(found)
    return measured


def places(measured: Iterable[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """(Place, label) of all iterations on an axis; "base" stands before the first one."""
    names = {name for found in measured for name in found}
    numbered = sorted(float(name) for name in names if name != "base")
    ticks = [(place, f"{place:g}") for place in numbered]
    return [((numbered[0] if numbered else 1.0) - 1, "base"), *ticks] if "base" in names else ticks


def iteration_panels(runs: Sequence[RunFiles], wanted: Sequence[Figure] | None) -> tuple[list[Panel], Table]:
    """(A panel of each figure that any run has, a table of those without a plot: a run has them in one iteration, or
    they are the same number everywhere). With None of all figures that no section names."""
    measured = by_iteration(runs)
    present = dict.fromkeys(name for found in measured for figures in found.values() for name in figures)
    others = [Figure(name, words(name.removeprefix("evals."))) for name in present if name not in NAMED]
    evals = [
        one for one in others if one.name.startswith("evals.") and not one.name.endswith((".iteration", ".prompts"))
    ]
    if wanted is None:
        wanted = [one for one in others if one not in evals]
    elif wanted is QUALITY:
        wanted = [*wanted[:3], *evals, *wanted[3:]]
    panels, rows = [], []
    for figure in wanted:
        if figure.name not in present:
            continue
        names = [name for name in (figure.name, figure.second) if name is not None]
        found = [
            (run.label, name, t, figures[name])
            for run, by_t in zip(runs, measured, strict=True)
            for name in names
            for t, figures in by_t.items()
            if name in figures
        ]
        places = [(label, name) for label, name, _, _ in found]
        if len(found) > 1 and len({value for *_, (value, _, _) in found}) == 1:
            rows.append([figure.title, "all", "all", shown_number(found[0][3][0]), _interval(found[0][3])])
        elif len(set(places)) == len(places):
            for label, name, t, value in found:
                title = figure.title if name == figure.name else words(name)
                rows.append([title, label, t, shown_number(value[0]), _interval(value)])
        else:
            panels.append(_iteration_panel(runs, measured, figure))
    columns = ["figure", "run", "iteration", "value", "95 % interval"]
    kept = [0, *([1] if len(runs) > 1 else []), 2, 3, *([4] if any(row[4] for row in rows) else [])]
    return panels, Table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], [i > 1 for i in kept])


def words(name: str) -> str:
    """The name of a figure for people: "judge quality, best" for "judge_quality.best"."""
    return name.replace("_", " ").replace(".", ", ")


def _interval(value: Value) -> str:
    _, low, high = value
    return "" if low is None or high is None else f"{shown_number(low)} to {shown_number(high)}"


def _iteration_panel(
    runs: Sequence[RunFiles], measured: Sequence[Mapping[str, Mapping[str, Value]]], figure: Figure
) -> Panel:
    series, rows, any_interval = [], [], False
    names = [name for name in (figure.name, figure.second) if name is not None]
    ticks = places([{t: 0 for t, figures in found.items() if set(names) & set(figures)} for found in measured])
    where = {label: place for place, label in ticks}
    for style, (run, found) in enumerate(zip(runs, measured, strict=True)):
        for name in names:
            points = [(t, figures[name]) for t, figures in found.items() if name in figures]
            if not points:
                continue
            intervals = any(low is not None for _, (_, low, _) in points)
            any_interval |= intervals
            series.append(
                Series(
                    label=run.label, style=style, x=[where[t] for t, _ in points], y=[value[0] for _, value in points],
                    low=[value[1] for _, value in points] if intervals else None,
                    high=[value[2] for _, value in points] if intervals else None, second=name != figure.name,
                )
            )  # fmt: skip
            for t, value in points:
                rows.append([run.label, words(name.rpartition(".")[2]), t, shown_number(value[0]), _interval(value)])
    kept = [*([0] if len(runs) > 1 else []), *([1] if figure.second else []), 2, 3, *([4] if any_interval else [])]
    columns = ["run", "figure", "iteration", "value", "95 % interval"]
    table = Table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], [i > 1 for i in kept])
    inside = all(0 <= value <= 1 for one in series for value in one.y if value is not None)
    plot = plots.lines(
        series, title=figure.title, x_label="iteration", ticks=ticks, name=f"iteration {figure.name}",
        share=figure.share and inside,
    )  # fmt: skip
    note = "; ".join(part for part in (figure.note, "bars: 95 % interval" if any_interval else "") if part)
    return Panel(figure.title, note, plot, table)


# ---- the judge's scores ----------------------------------------------------------------------------------------------


def histogram_panels(runs: Sequence[RunFiles]) -> list[Panel]:
    """For each run the distribution of the judge's scores, a series for each iteration that has some."""
    panels = []
    for index, run in enumerate(runs):
        shares = {}
        for scope in run.scopes.values():
            found = _histogram(scope)
            if found:
                shares[scope.name.removeprefix("iter_")] = found
        if not shares:
            continue
        bins = sorted({one for found in shares.values() for one in found})
        heights = [(f"iteration {t}", [100 * found.get(one, 0.0) for one in bins]) for t, found in shares.items()]
        labels = [f"{one:g}" for one in bins]
        title = "Scores of the judge, %" if len(runs) == 1 else f"Scores of the judge, %: {run.label}"
        plot = plots.bars(labels, heights, title=title, x_label="score", name=f"histogram {index}", style=index)
        rows = [[name, *(f"{value:.1f}" for value in values)] for name, values in heights]
        table = Table(["scores of", *labels], rows, [False, *(True for _ in labels)])
        order = "; ".join(name for name, _ in heights)
        panels.append(
            Panel(title, f"from left to right at each score: {order}" if len(heights) > 1 else order, plot, table)
        )
    return panels


def _histogram(scope: ScopeFiles) -> dict[float, float]:
    """The share of each score: as the run counted it, or else of the judgments in the scope."""
    counted = mapping(mapping(mapping(scope.values.get("pairs_counts")).get("judge")).get("histogram"))
    shares = {}
    for name, share in counted.items():
        try:
            shares[float(name)] = number(share) or 0.0
        except ValueError:
            return {}
    if shares:
        return shares
    scores = [score for score in _scores(scope) if score is not None]
    whole = len(set(scores)) <= 12
    found: dict[float, float] = {}
    if not scores:
        return found
    low, high = min(scores), max(scores)
    for score in scores:
        place = score if whole else low + (int((score - low) / (high - low) * 9.999)) * (high - low) / 10
        found[round(place, 3)] = found.get(round(place, 3), 0.0) + 1 / len(scores)
    return found


def _scores(scope: ScopeFiles) -> list[float | None]:
    """The scores of the judgments and critiques that the training of a scope rests on."""
    scores: list[float | None] = []
    for name, rows in scope.records.items():
        if name.startswith(("eval_", "judge_test", "eft_", "held_out", "comparisons")):
            continue
        for row in rows:
            if isinstance(row.get("scores"), list):
                scores += [number(one) for one in row["scores"]]
            elif "weaknesses" in row:
                scores.append(number(row.get("score")))
    return scores


# ---- training --------------------------------------------------------------------------------------------------------

TRAINING = (
    Figure("loss", "Loss"),
    Figure("preference_loss", "Preference loss", note="without the likelihood term; ln 2 = 0.693 at the start of DPO"),
    Figure("margin", "Margin", note="log-probability, chosen less rejected, since the start"),
    Figure("accuracy", "Accuracy", note="share of pairs that the model orders as the judge did", share=True),
    Figure("chosen_logps", "Log-probabilities", "rejected_logps", "of the chosen responses; hollow: rejected"),
    Figure("chosen_shift", "Shift of the chosen responses", note="log-probability; below 0 they became less likely"),
    Figure("nll", "Likelihood term", note="mean negative log-probability of the chosen responses' tokens"),
    Figure(
        "w>l", "Reward model: accuracy", note="share of pairs whose chosen response has the larger reward", share=True
    ),
    Figure("reward_mean", "Reward model: mean reward"),
    *(
        Figure(
            f"{a}>{b}", f"Gap model: {a} > {b}", note="share; w: better response, l: worse one; their gap", share=True
        )
        for a, b in (("wl", "ww"), ("wl", "ll"), ("wl", "lw"), ("ww", "lw"), ("ll", "lw"))
    ),
    Figure("reward", "Reward", note="mean of a step's responses"),
    Figure("reward_std", "Spread of the rewards", note="standard deviation in a step"),
    Figure("no_reward", "Responses without a reward"),
    Figure(
        "even_groups",
        "Groups with equal rewards",
        note="share of the prompts of a step; they teach nothing",
        share=True,
    ),
    Figure("ties", "Prompts without a pair", note="their best and worst response have the same reward"),
    Figure("kl", "KL to the reference", note="nats a response"),
    Figure("kl_k3", "KL to the reference, k3", note="nats a token; never negative"),
    Figure("loss_kl", "KL term of the loss"),
    Figure("entropy", "Entropy", note="nats a token"),
    Figure("ratio", "Probability ratio", note="of the model to the one that sampled; 1 at first"),
    Figure("clipped", "Clipped tokens", note="share whose ratio is out of range", share=True),
    Figure("sampler_gap", "Sampler against trainer", note="largest difference of a token's log-probability"),
    Figure("length", "Length", note="tokens a response"),
    Figure("cut_off", "Cut off", note="share of the responses", share=True),
    Figure("gained", "Better than the reference response", note="share", share=True),
    Figure("gap_of_references", "Gap of the reference responses", note="subtracted from the reward"),
    Figure("copied", "Copies of the reference response", note="share", share=True),
    Figure("edit_distance", "Edit distance to the reference response", note="words"),
    Figure("length_gap", "Longer than the reference response", note="characters"),
    Figure("grad_norm", "Gradient norm", note="before clipping"),
    Figure("learning_rate", "Learning rate"),
)


def training_panels(runs: Sequence[RunFiles]) -> tuple[list[Panel], Table]:
    """(A panel of each figure of the trainings, a table of those that never change). The trainings of a run stand one
    after the other, in the order in which they were done."""
    logs = [trainings(run) for run in runs]
    found: dict[str, list[float]] = {}
    for row in (row for log in logs for _, lines in log for row in lines):
        for name, value in row.items():
            if name not in ("step", "of", "skipped") and number(value) is not None:
                found.setdefault(name, []).append(value)
    known = {name for one in TRAINING for name in (one.name, one.second)}
    wanted = [one for one in TRAINING if one.name in found]
    wanted += [Figure(name, words(name)) for name in found if name not in known]
    constant = [one for one in wanted if one.second is None and len(found[one.name]) > 1 == len(set(found[one.name]))]
    rows = [[one.title, shown_number(found[one.name][0])] for one in constant]
    panels = [_training_panel(runs, logs, one) for one in wanted if one not in constant]
    return panels, Table(["figure", "value"], rows, [False, True])


def trainings(run: RunFiles) -> list[tuple[str, list[dict[str, Any]]]]:
    """(Scope, lines of train.jsonl) of the trainings of a run, in the order of the journal."""
    order = {entry["scope"]: place for place, entry in reversed(list(enumerate(run.journal)))}
    scopes = sorted(run.scopes.values(), key=lambda scope: order.get(scope.name, len(order)))
    return [(scope.name, scope.train) for scope in scopes if scope.train]


Log = Sequence[tuple[str, list[dict[str, Any]]]]  # of a run: (scope, lines) of each training


def _training_panel(runs: Sequence[RunFiles], logs: Sequence[Log], figure: Figure) -> Panel:
    series, rows, parts = [], [], []
    names = [name for name in (figure.name, figure.second) if name is not None]
    for style, (run, log) in enumerate(zip(runs, logs, strict=True)):
        for name in names:
            x, y, before = [], [], 0.0
            for scope, lines in log:
                points = [(number(row.get("step")) or 0.0, number(row.get(name))) for row in lines]
                known = [value for _, value in points if value is not None]
                if not known:
                    continue
                if x:
                    x.append(before)
                    y.append(None)  # a gap between two trainings
                last = before + max(step for step, _ in points)
                x += [before + step for step, _ in points]
                y += [value for _, value in points]
                if len(runs) == 1 and len(log) > 1 and name == figure.name:
                    parts.append((before + points[0][0] - 0.5, last + 0.5, scope))
                before = last
                steps = shown_number(points[-1][0])
                rows.append([run.label, scope, words(name), steps, shown_number(known[0]), shown_number(known[-1])])
            if x:
                series.append(Series(label=run.label, style=style, x=x, y=y, second=name == figure.second))
    kept = [*([0] if len(runs) > 1 else []), 1, *([2] if figure.second else []), 3, 4, 5]
    columns = ["run", "training", "figure", "steps", "first", "last"]
    table = Table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], [i > 2 for i in kept])
    inside = all(0 <= value <= 1 for one in series for value in one.y if value is not None)
    plot = plots.lines(
        series, title=figure.title, x_label="optimizer step", name=f"training {figure.name}", parts=parts,
        share=figure.share and inside,
    )  # fmt: skip
    return Panel(figure.title, figure.note, plot, table)


# ---- texts -----------------------------------------------------------------------------------------------------------


def shown_number(value: float | None, digits: int = 4) -> str:
    """A number for a table: up to four digits, "–" for None."""
    if value is None:
        return "–"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}".replace("-", "−")
    return f"{value:,.{digits}g}".replace("-", "−") if abs(value) < 10**digits else f"{value:,.0f}".replace("-", "−")


def table_of(rows: Sequence[Mapping[str, Any]], *, formats: Mapping[str, Callable[[Any], str]] | None = None) -> Table:
    """A table of rows with the same keys; a column is of numbers if any of its values is."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    is_number = [any(number(row.get(name)) is not None for row in rows) for name in columns]

    def cell(name: str, value: Any) -> str:
        if formats is not None and name in formats and value is not None:
            return formats[name](value)
        return shown_number(value) if number(value) is not None else ("–" if value is None else text(value))

    return Table(columns, [[cell(name, row.get(name)) for name in columns] for row in rows], is_number)
