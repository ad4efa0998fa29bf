"""How long the stages of a run took, how fast they were, what memory they had; and what its guards noticed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsi.report.figures import Table, shown_number, table_of
from jaxsi.report.run_files import RunFiles, ScopeFiles, flat, listed, mapping, number, text
from jaxsi.runs import memory
from jaxsi.stages import alarms

LONG_VALUE = 160  # characters of a setting that are shown beside those of other runs
TRAINED = ("sft", "dpo", "reward", "rl")  # stages that end in train.jsonl


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run. ``tokens``: the numbers of those that it "sampled" and "scored". ``memory``: what it took at
    most, as `jaxsi.runs.memory.peak` says it; {} if the run does not say it."""

    scope: str
    name: str
    state: str
    seconds: float
    records: int | None
    tokens: dict[str, float]
    steps: int | None
    memory: dict[str, Any]

    @property
    def rate(self) -> str:
        """Its speed in the unit that says most: "7.8 steps/s", "1,234 tokens/s" of responses, "5,678 scored tokens/s"
        of texts that were there, or "56 records/s"."""
        sampled, scored = (self.tokens.get(name) for name in ("sampled", "scored"))
        amounts = ((self.steps, "steps"), (sampled, "tokens"), (scored, "scored tokens"), (self.records, "records"))
        for amount, unit in amounts:
            if amount and self.seconds >= 0.05:
                return f"{shown_number(amount / self.seconds, 3)} {unit}/s"
        return "–"


def stages_of(run: RunFiles) -> list[Stage]:
    """The stages of a run in the order in which they first began."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in run.journal:
        row = rows.setdefault(
            (entry["scope"], entry["stage"]), {"seconds": 0.0, "records": None, "memory": {}, "tokens": {}}
        )
        row["event"] = entry["event"]
        row["seconds"] += entry["seconds"]
        row["records"] = number(entry.get("records")) if number(entry.get("records")) is not None else row["records"]
        for name, count in mapping(entry.get("tokens")).items():
            row["tokens"][name] = row["tokens"].get(name, 0) + (number(count) or 0)
        row["memory"] = _memory(entry.get("memory")) or row["memory"]
    made = []
    for (scope, name), row in rows.items():
        files = run.scopes.get(scope)
        state = "done" if row["event"] != "start" else ("running" if run.live else "stopped")
        made.append(
            Stage(
                scope, name, state, row["seconds"], row["records"] if row["records"] is None else int(row["records"]),
                row["tokens"], _steps(files, name), row["memory"],
            )
        )  # fmt: skip
    return made


def _memory(value: Any) -> dict[str, Any]:
    """What a journal says of memory, without what is no number."""
    known = {of: bytes for of in ("host", "device") if (bytes := number(mapping(value).get(of))) is not None}
    return known and {**known, "at_most": listed(mapping(value).get("at_most"))}


def _steps(files: ScopeFiles | None, name: str) -> int | None:
    return None if files is None or name not in TRAINED or not files.train else int(files.train[-1]["step"])


def stage_table(run: RunFiles) -> Table:
    """The stages that took a tenth of a second or more, or are not done."""
    rows = []
    for stage in stages_of(run):
        if stage.seconds >= 0.1 or stage.state != "done":
            rows.append(
                {
                    "iteration": stage.scope,
                    "stage": stage.name.split("_logps_")[0] + ("_logps" if "_logps_" in stage.name else ""),
                    "state": stage.state,
                    "seconds": f"{stage.seconds:,.1f}",
                    "speed": stage.rate,
                    "host memory": memory.gib(stage.memory, "host") or "–",
                    "device memory": memory.gib(stage.memory, "device") or "–",
                    "records": stage.records,
                }
            )
    empty = [name for name in ("host memory", "device memory") if all(row[name] == "–" for row in rows)]
    empty += ["state"] if all(row["state"] == "done" for row in rows) else []
    table = table_of([{name: value for name, value in row.items() if name not in empty} for row in rows])
    right = {"seconds", "speed", "host memory", "device memory", "records"}
    return dataclasses.replace(table, numbers=[name in right for name in table.columns])


def seconds_by_scope(run: RunFiles) -> dict[str, dict[str, float]]:
    """{scope: {kind of work: seconds}}."""
    found: dict[str, dict[str, float]] = {}
    for stage in stages_of(run):
        if stage.seconds > 0:
            kind = _kind_of_work(stage.name)
            scope = found.setdefault(stage.scope, {})
            scope[kind] = scope.get(kind, 0.0) + stage.seconds
    return found


WORK = ("prompts and sampling", "judging", "training", "evaluation", "other")


def _kind_of_work(name: str) -> str:
    if name.startswith(("eval", "judge_test", "judge_quality", "held_out")) or name == "win_rate":
        return "evaluation"
    if name in TRAINED or name.startswith("ref_logps"):
        return "training"
    judging = ("judgments", "critiques", "checks", "revisions", "rewards", "comparisons", "labels")
    if any(word in name for word in judging):
        return "judging"
    sampling = ("prompts", "candidates", "drafts", "responses", "references", "refined")
    return "prompts and sampling" if any(word in name for word in sampling) else "other"


def clock(seconds: float) -> str:
    """ "45 s", "12 min 5 s", "3 h 20 min" or "2 d 4 h"."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    for size, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // smaller} {smaller_name}"
    return f"{whole} s"


def peak_memory(run: RunFiles) -> str:
    """The most memory that a stage of a run took: of a device if it is known, else of the host."""
    taken = [stage.memory for stage in stages_of(run)]
    for of in ("device", "host"):
        if known := [found[of] for found in taken if of in found]:
            return f"{memory.gib({of: max(known)}, of)} {of}"
    return "–"


# ---- guards ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Guard:
    """Something that a reader of a run has to know. ``kind``: "alarm" or "note"."""

    kind: str
    scope: str
    sentence: str


def guards_of(run: RunFiles) -> list[Guard]:
    """What the guards of a run noticed, the alarms first."""
    found = [*_judge_alarms(run), *_training_guards(run), *_data_guards(run)]
    if run.summary.get("stopped_early") is True:
        best = text(run.summary.get("best"))
        sentence = f"the newest model lost against the best one before, so the run ended; the best one is {best}"
        found.append(Guard("note", "", sentence))
    began = [entry for entry in run.journal if entry.get("event") == "start"]  # to read a finished run is no restart
    processes = list(dict.fromkeys(text(entry.get("process")) for entry in began))
    if len(processes) > 1:
        times = "once" if len(processes) == 2 else f"{len(processes) - 1} times"
        found.append(Guard("note", "", f"the run was stopped and taken up again {times}"))
    return sorted(found, key=lambda guard: guard.kind != "alarm")


def _judge_alarms(run: RunFiles) -> list[Guard]:
    found = []
    for scope in run.scopes.values():
        statistics = mapping(mapping(scope.values.get("pairs_counts")).get("judge"))
        for alarm in listed(statistics.get("alarms")):
            found.append(Guard("alarm", scope.name, alarms.sentence(text(alarm), _numbers(statistics))))
    told = {guard.scope for guard in found}
    for entry in run.iterations:
        if f"iter_{entry['iteration']}" not in told:
            for alarm in listed(entry.get("alarms")):
                found.append(Guard("alarm", f"iter_{entry['iteration']}", alarms.sentence(text(alarm), {})))
    return found


def _numbers(statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of a judge without what is not a number."""
    histogram = {k: v for k, v in mapping(statistics.get("histogram")).items() if number(v) is not None}
    return {k: number(v) for k, v in statistics.items()} | {"histogram": histogram}


def _training_guards(run: RunFiles) -> list[Guard]:
    found = []
    for scope in run.scopes.values():
        if worst := max((number(row.get("skipped")) or 0 for row in scope.train), default=0):
            sentence = (
                f"up to {worst:g} updates in a row had gradients that are not finite and were skipped; lower the "
                "learning rate, or look at the data of these steps"
            )
            found.append(Guard("alarm", scope.name, sentence))
        shifts = [number(row.get("chosen_shift")) for row in scope.train]
        known = [shift for shift in shifts if shift is not None]
        if known and known[-1] < -10:
            sentence = (
                f"the chosen responses became less likely, by {-known[-1]:.1f} in log-probability, although training "
                "prefers them; add a likelihood term (dpo.nll_coef), or lower the learning rate"
            )
            found.append(Guard("alarm", scope.name, sentence))
    return found


def _data_guards(run: RunFiles) -> list[Guard]:
    found = []
    for scope in run.scopes.values():
        for name, value in scope.values.items():
            dropped = number(mapping(value).get("dropped_too_long"))
            if name.endswith("_data") and dropped:
                kept = next((number(v) for k, v in mapping(value).items() if k != "dropped_too_long"), None)
                sentence = (
                    f"{dropped:g} examples were longer than max_length and left out; {shown_number(kept)} were used"
                )
                found.append(Guard("note", scope.name, sentence))
        counts = mapping(scope.values.get("pairs_counts"))
        lost, pairs = number(counts.get("unscored")), number(counts.get("prompts"))
        if lost and pairs and lost > 0.1 * pairs:
            found.append(Guard("note", scope.name, f"{lost:g} of {pairs:g} prompts have no response with a score"))
    return found


# ---- config ----------------------------------------------------------------------------------------------------------


def config_differences(runs: Sequence[RunFiles]) -> Table:
    """The fields in which the configs of runs differ; of long values the beginning."""
    flats = [flat(run.config) for run in runs]
    names = dict.fromkeys(name for one in flats for name in one)
    rows = []
    for name in names:
        values = [_setting(one[name]) if name in one else "–" for one in flats]
        if len(set(values)) > 1:
            rows.append([name or "config", *(v if len(v) <= LONG_VALUE else f"{v[:LONG_VALUE]} …" for v in values)])
    return Table(["field", *(run.label for run in runs)], rows, [False] * (len(runs) + 1))


def config_table(run: RunFiles) -> Table:
    """All fields of a run's config."""
    rows = [[name or "config", _setting(value)] for name, value in flat(run.config).items()]
    return Table(["field", "value"], rows, [False, False])


def _setting(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return ", ".join(_setting(item) for item in value) or "()"
    if isinstance(value, float):
        return f"{value:.12g}"  # 6e-05, not 5.9999999999999995e-05
    return text(value) if isinstance(value, str | dict) else f"{value}"
