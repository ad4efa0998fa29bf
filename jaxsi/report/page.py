"""One self-contained HTML page of runs: no file beside it, nothing from a network, readable on paper."""

import base64
import dataclasses
import datetime
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from jaxsi.report import figures, plots, stages
from jaxsi.report.figures import Panel, Table, shown_number
from jaxsi.report.run_files import RunFiles, mapping, number
from jaxsi.report.samples import as_json, examples, samples_of, stage_counts
from jaxsi.report.visible import HIDDEN, json_for_script, plain, shown
from jaxsi.runs.records import write_atomically

HERE = Path(__file__).parent
DAMAGE_SHOWN = 12


def write_page(out: Path, runs: Sequence[RunFiles], *, samples: int = 20_000, refresh: float | None = None) -> int:
    """Writes the page, complete or not at all; returns how many samples it holds. Arguments are those of `page_of`."""
    text, count = page_of(runs, samples=samples, refresh=refresh)
    write_atomically(out, [text.encode("utf-8")])
    return count


def page_of(runs: Sequence[RunFiles], *, samples: int = 20_000, refresh: float | None = None) -> tuple[str, int]:
    """(The page, the number of samples in it).

    Args:
      samples: the most samples that it holds; beyond, every iteration keeps evenly spaced ones.
      refresh: seconds after which the page loads itself again, for a run that goes on.
    """
    kept, left_out = samples_of(runs, samples)
    script, style = (_asset(name) for name in ("page.js", "page.css"))
    data = {"runs": [run.label for run in runs], "samples": as_json(kept), "refresh": refresh, "hidden": HIDDEN}
    template = _environment().get_template("page.html.jinja")
    page = template.render(
        runs=runs,
        title=_title(runs),
        now=datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC"),
        headline=headline(runs[0]) if len(runs) == 1 else None,
        overview=overview(runs),
        sections=sections(runs),
        guards=[(run, found) for run in runs if (found := stages.guards_of(run))],
        damage=[(run, run.damage[:DAMAGE_SHOWN], len(run.damage) - DAMAGE_SHOWN) for run in runs if run.damage],
        stages=[(run, stages.stage_table(run), _work(run)) for run in runs],
        work=stages.WORK,
        differences=stages.config_differences(runs) if len(runs) > 1 else None,
        configs=[(run, stages.config_table(run)) for run in runs],
        sample_groups=stage_counts(kept),
        sample_count=len(kept),
        left_out=left_out,
        examples=examples(kept),
        data=json_for_script(data),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        swatch=lambda style, second=False: Markup(plots.swatch(style, second=second)),
        refresh=refresh,
    )
    return page, len(kept)


def sections(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """The sections with plots: id, title, an introduction, panels, a table of what has none, and what to say if there
    is nothing."""
    made = [
        _section(
            "quality", "Quality", "What the evaluation measured after each iteration.",
            figures.iteration_panels(runs, figures.QUALITY),
            "No quality was measured. Name an evaluation in the config (evaluate), or wait for the first iteration.",
        ),
        _section(
            "judge", "The judge", "How well it judges, and which scores it gives.",
            figures.iteration_panels(runs, figures.JUDGE), "No judge has given a score in these runs.",
            figures.histogram_panels(runs),
        ),
        _section(
            "pairs", "Pairs and ties", "What came out of the judgments.", figures.iteration_panels(runs, figures.PAIRS),
            "There are no pairs: this method makes none, or the run has not come so far.",
        ),
        _section(
            "lengths", "Lengths", "Responses that grow without getting better are the usual sign of a fooled judge.",
            figures.iteration_panels(runs, figures.LENGTH), "No lengths were measured.",
        ),
        _section(
            "training", "Training", "By optimizer step. Trainings stand one after the other, with a gap between.",
            figures.training_panels(runs), "No training has begun.",
        ),
        _section(
            "further", "Further figures", "Whatever else the evaluations say.", figures.iteration_panels(runs, None), ""
        ),
    ]  # fmt: skip
    return [section for section in made if section["panels"] or section["rest"].rows or section["empty"]]


def _section(
    name: str, title: str, text: str, figures: tuple[list[Panel], Table], empty: str, further: Sequence[Panel] = ()
) -> dict[str, Any]:
    panels, rest = figures
    return {
        "id": name, "title": title, "text": text, "panels": [*panels, *further], "rest": rest, "empty": empty,
    }  # fmt: skip


def overview(runs: Sequence[RunFiles]) -> Table:
    """A row for each run."""
    rows = []
    for run in runs:
        first, last = _ends(run)
        judged = [value for entry in run.iterations if (value := number(entry.get("judge_agreement"))) is not None]
        planned = number(run.config.get("iterations"))
        newest = max((entry["iteration"] for entry in run.iterations if entry["iteration"] != "base"), default=0)
        rows.append(
            {
                "run": run.label,
                "method": run.method,
                "state": run.status,
                "iterations": f"{newest:g}{'' if planned is None else f' of {planned:g}'}",
                "quality, first": _with_interval(first),
                "quality, last": _with_interval(last),
                "wins over the first": _share(run, "evals.held-out.over_first"),
                "change": "–" if first is None or last is None else signed(last[0] - first[0]),
                "judge agreement": f"{judged[-1]:.3f}" if judged else "–",
                "alarms": str(sum(guard.kind == "alarm" for guard in stages.guards_of(run))),
                "time": stages.clock(sum(entry["seconds"] for entry in run.journal)),
                "peak memory": stages.peak_memory(run),
            }
        )
    # What no run has been measured for is left out, but for the quality of a run that has just begun.
    unknown = [name for name in rows[0] if all(row[name] == "–" for row in rows)]
    unknown = [name for name in unknown if name != "quality, last" or "wins over the first" not in unknown]
    rows = [{name: value for name, value in row.items() if name not in unknown} for row in rows]
    table = figures.table_of(rows)
    left = {"run", "method", "state"}
    return dataclasses.replace(table, numbers=[name not in left for name in table.columns])


# Evaluations that a headline is made of if there is no quality: the figure, and what its share says.
EVALUATED = {
    "evals.held-out.over_first": "wins over the first one on {share} of the held-out prompts",
    "evals.ifeval.prompt_strict": "follows all instructions of {share} of IFEval's prompts",
}


def headline(run: RunFiles) -> str:
    """What came out of a run, in one sentence; with the intervals, which say how sure it is."""
    first, last = _ends(run)
    if first is None or last is None:
        for figure, says in EVALUATED.items():
            if (share := _share(run, figure)) != "–":
                return f"The newest model {says.format(share=share)}."
        where = f", now at {run.journal[-1]['scope']}/{run.journal[-1]['stage']}" if run.journal and run.live else ""
        return f"No quality was measured yet{where}."
    if first == last:
        return f"The first model has a quality of {first[0]:.1f}."
    change = last[0] - first[0]
    overlap = None not in (*first, *last) and (first[1] or 0) <= (last[2] or 0) and (last[1] or 0) <= (first[2] or 0)
    verb = "rose" if change > 0 else "fell"
    return (
        f"Quality {verb} from {first[0]:.1f} to {last[0]:.1f}, by {abs(change):.1f}"
        f"{'; the two intervals overlap' if overlap else ''}."
    )


def _share(run: RunFiles, figure: str) -> str:
    """A share of the newest model that has it: "75 % (42 to 100 %)"."""
    for line in reversed(run.iterations):
        value = figures.values_of({"evals": line.get("evals")}).get(figure)
        if value is not None:
            mean, low, high = value
            ends = "" if low is None or high is None else f" ({100 * low:.0f} to {100 * high:.0f} %)"
            return f"{100 * mean:.0f} %{ends}"
    return "–"


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{value:+.1f}".replace("-", "−")


def _ends(run: RunFiles) -> tuple[figures.Value | None, figures.Value | None]:
    values = [figures.values_of({"quality": entry.get("quality")}).get("quality") for entry in run.iterations]
    known = [value for value in values if value is not None]
    return (known[0], known[-1]) if known else (None, None)


def _with_interval(value: figures.Value | None) -> str:
    if value is None:
        return "–"
    mean, low, high = value
    return f"{mean:.1f}" if low is None or high is None else f"{mean:.1f} ± {(high - low) / 2:.1f}"


def _work(run: RunFiles) -> list[dict[str, Any]]:
    """The time of each scope by kind of work, as shares of the longest scope."""
    by_scope = stages.seconds_by_scope(run)
    longest = max((sum(kinds.values()) for kinds in by_scope.values()), default=1.0)
    return [
        {
            "scope": scope,
            "total": stages.clock(sum(kinds.values())),
            "parts": [
                (stages.WORK.index(kind), kind, 100 * kinds[kind] / longest, stages.clock(kinds[kind]))
                for kind in stages.WORK
                if kind in kinds
            ],
        }
        for scope, kinds in by_scope.items()
        if sum(kinds.values()) >= 0.05
    ]


def _title(runs: Sequence[RunFiles]) -> str:
    return f"{runs[0].label} · jaxsi" if len(runs) == 1 else f"{len(runs)} runs · jaxsi"


@functools.cache
def _asset(name: str) -> str:
    return (HERE / name).read_text("utf-8")


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"shown": shown, "plain": plain, "number": shown_number, "mapping": mapping}
    return environment
