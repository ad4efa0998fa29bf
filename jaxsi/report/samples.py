"""The samples of runs: each prompt with all that was made of it, from the records of any method.

Records are told apart by their fields, not by the names of their stages, so that a new method's samples show up too. A
sample is a prompt in an iteration. Evaluation prompts are the same in every iteration and every run, so each of them is
one sample, with the responses of all models one below the other.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsi.report.run_files import RunFiles, ScopeFiles, listed, mapping, number, text

LONGEST = 20_000  # characters of a text that are shown
EVALUATION, JUDGE_TEST = "evaluation", "judge test"


@dataclasses.dataclass
class Entry:
    """One text about a prompt. ``run``: the index of its run. ``stage``: the file that has it. ``tags``: "chosen",
    "rejected", "cut off", ... ``notes``: [title, text] of judgments, thoughts and critiques."""

    run: int
    scope: str
    stage: str
    id: str
    text: str
    score: float | None = None
    scores: list[float | None] = dataclasses.field(default_factory=list)
    tokens: int | None = None
    tags: list[str] = dataclasses.field(default_factory=list)
    notes: list[list[str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Sample:
    """A prompt and its entries. ``group``: its iteration, or "evaluation". ``qualities``: [run, scope, quality] of the
    evaluation."""

    id: str
    group: str
    prompt: str = ""
    entries: list[Entry] = dataclasses.field(default_factory=list)
    qualities: list[list[Any]] = dataclasses.field(default_factory=list)

    @property
    def runs(self) -> list[int]:
        return sorted({entry.run for entry in self.entries})

    @property
    def gap(self) -> float | None:
        """How far the best and the worst score are apart."""
        scores = [entry.score for entry in self.entries if entry.score is not None]
        return max(scores) - min(scores) if len(scores) > 1 else None

    @property
    def change(self) -> float | None:
        """The quality of the last model less that of the first, over the runs' mean."""
        by_run: dict[int, list[float]] = {}
        for run, _, value in self.qualities:
            by_run.setdefault(run, []).append(value)
        changes = [values[-1] - values[0] for values in by_run.values() if len(values) > 1]
        return sum(changes) / len(changes) if changes else None


def samples_of(runs: Sequence[RunFiles], limit: int) -> tuple[list[Sample], dict[str, int]]:
    """(The samples, {group: number of those left out}). Beyond ``limit`` samples, every group keeps evenly spaced ones.
    Groups stand in the order of the iterations, and the evaluation comes first."""
    found: dict[tuple[str, str, int], Sample] = {}
    for index, run in enumerate(runs):
        texts = prompt_texts(run)
        for scope in run.scopes.values():
            for entry, prompt_id, prompt in _entries(index, scope):
                family = _family(entry.stage)
                place = (family, prompt_id, -1) if family == EVALUATION else (family or scope.name, prompt_id, index)
                sample = found.setdefault(place, Sample(prompt_id, place[0]))
                sample.prompt = sample.prompt or prompt or texts.get(prompt_id, "")
                sample.entries.append(entry)
        for sample, quality in _qualities(index, run, found):
            sample.qualities.append(quality)
    groups: dict[str, list[Sample]] = {}
    for sample in found.values():
        groups.setdefault(sample.group, []).append(sample)
    counts = _shares({name: len(group) for name, group in groups.items()}, limit)
    kept, left_out = [], {}
    for name in sorted(groups, key=_place):
        group, count = groups[name], counts[name]
        kept += [group[i * len(group) // count] for i in range(count)]
        if count < len(group):
            left_out[name] = len(group) - count
    return kept, left_out


def _shares(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many of each group to keep, ``limit`` together: small groups stay whole, the others get the same number."""
    counts, left = {}, limit
    for done, (name, size) in enumerate(sorted(sizes.items(), key=lambda item: item[1])):
        counts[name] = min(size, max(left // (len(sizes) - done), 1))
        left -= counts[name]
    return counts


def _place(group: str) -> tuple[bool, bool, bool, tuple[str, float]]:
    head, _, tail = group.rpartition("_")
    number_last = (head, float(tail)) if tail.isdecimal() else (group, 0.0)
    return group != EVALUATION, head != "iter", group == JUDGE_TEST, number_last


def as_json(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The samples for the page's script; fields that are empty are left out."""
    rows = []
    for sample in samples:
        row = {
            "i": sample.id, "g": sample.group, "p": cut(sample.prompt), "r": sample.runs, "gap": sample.gap,
            "ch": sample.change, "q": sample.qualities, "e": [_entry_json(entry) for entry in sample.entries],
        }  # fmt: skip
        rows.append({name: value for name, value in row.items() if value not in (None, [], "")})
    return rows


def _entry_json(entry: Entry) -> dict[str, Any]:
    notes: dict[tuple[str, str], int] = {}
    for title, note in entry.notes:
        notes[title, note] = notes.get((title, note), 0) + 1
    row = {
        "r": entry.run, "s": entry.scope, "f": entry.stage, "i": entry.id, "t": cut(entry.text), "sc": entry.score,
        "v": entry.scores, "k": entry.tokens, "tags": entry.tags,
        "n": [[title, cut(note), *([times] if times > 1 else [])] for (title, note), times in notes.items()],
    }  # fmt: skip
    return {name: value for name, value in row.items() if value not in (None, [], "") or name == "t"}


def cut(value: str) -> str:
    """The beginning of a text that is longer than a page shows."""
    more = len(value) - LONGEST
    return value if more <= 0 else f"{value[:LONGEST]} … ({more:,} more characters are in the file)"


def examples(samples: Sequence[Sample], count: int = 3) -> list[Sample]:
    """A few samples for paper: those that improved most and least, and the pairs with the largest gap."""
    changed = sorted((s for s in samples if s.change is not None), key=lambda s: -(s.change or 0.0))
    picked = [*changed[:count], *(s for s in changed[-1:] if (s.change or 0.0) < 0)]
    paired = [s for s in samples if any("chosen" in entry.tags for entry in s.entries)]
    last = paired[-1].group if paired else ""
    picked += sorted((s for s in paired if s.group == last), key=lambda s: -(s.gap or 0.0))[:count]
    return picked or list(samples[:count])


def prompt_texts(run: RunFiles) -> dict[str, str]:
    """The text of every prompt that has one in the run, by its id; also of the embedded world's evaluation."""
    texts: dict[str, str] = {}
    for scope in run.scopes.values():
        for rows in scope.records.values():
            for row in rows:
                if "messages" in row:
                    texts.setdefault(text(row.get("id")), _conversation(row["messages"]))
    used = {text(row.get("prompt_id")) for s in run.scopes.values() for rows in s.records.values() for row in rows}
    if used - texts.keys():  # prompts of evaluations, which come with this package
        everyday = Path(__file__).parents[1] / "evals" / "everyday.jsonl"
        for row in map(json.loads, everyday.read_text("utf-8").splitlines() if everyday.exists() else []):
            texts.setdefault(row["id"], _conversation(row["messages"]))
    if any(name.startswith("toy-") and name not in texts for name in used):
        from jaxsi.toyworld import world

        for prompt in world.evaluation_prompts(len(used)):
            texts.setdefault(prompt.id, prompt.text)
    return texts


# ---- from records to entries -----------------------------------------------------------------------------------------


def _entries(index: int, scope: ScopeFiles) -> Iterator[tuple[Entry, str, str]]:
    """(Entry, id of its prompt, its prompt's text if the record has it) of a scope; judgments stand at responses."""
    ids = {text(row["prompt_id"]) for rows in scope.records.values() for row in rows if "prompt_id" in row}
    made: dict[str, dict[str, Entry]] = {}
    order: list[tuple[Entry, str, str]] = []

    def add(entry: Entry, prompt_id: str, prompt: str) -> None:
        made.setdefault(entry.stage, {}).setdefault(entry.id, entry)
        bare = re.sub(r"#\d+$", "", prompt_id)  # an example or a pair may have the id of a response: "17#2"
        order.append((entry, bare if bare in ids else prompt_id, prompt))

    names = sorted(scope.records, key=lambda name: (_rank(scope.records[name]), name == "checks", name))
    for name in names:
        for row in scope.records[name]:
            for entry, prompt_id, prompt in _MAKERS.get(_kind(row), _nothing)(index, scope.name, name, row):
                add(entry, prompt_id, prompt)
    for name in names:
        places = _judged_stages(list(made), name)
        for row in scope.records[name]:
            kind = _kind(row)
            if kind in ("judgment", "critique"):
                if text(row.get("id")).endswith("#before"):  # of the model before; the comparison stands at "now"
                    continue
                id = re.sub(r"#now$", "#0", text(row.get("id")))
                found = next((made[place][id] for place in places if id in made[place]), None)
                entry = found or Entry(index, scope.name, name, id, "")
                if found is None:
                    add(entry, text(row.get("prompt_id")), "")
                _add_judgment(entry, kind, name, row)
                if kind == "critique" and name != "checks" and row.get("improved"):
                    refined = Entry(
                        index, scope.name, f"{name}, refined", entry.id, text(row["improved"]), tags=["refined"]
                    )
                    add(refined, text(row.get("prompt_id")), "")
            elif kind == "pair":
                for entry, prompt_id, prompt in _paired(index, scope.name, name, row, made):
                    add(entry, prompt_id, prompt)
    yield from order


def _judged_stages(made: Sequence[str], stage: str) -> list[str]:
    """The stages in which to look for what a stage of judgments is about, the likeliest first: SRT's checks judge the
    refined responses; NAME_judgments judge NAME, or NAME_responses."""
    if stage == "checks" and "critiques, refined" in made:
        return ["critiques, refined"]
    prefix = stage.rpartition("_")[0]
    own = [name for name in made if _family(name) == _family(stage) and not name.endswith("refined")]
    return sorted(own, key=lambda name: (name != prefix, not name.startswith(prefix), "greedy" in name, len(name)))


def _kind(row: Mapping[str, Any]) -> str:
    """What a record is, by its fields."""
    if "chosen" in row and "rejected" in row:
        return "pair"
    if "scores" in row and "texts" in row:
        return "judgment"
    if "weaknesses" in row or "suggestions" in row:
        return "critique"
    if "outcome" in row:
        return "improvement"
    if "label" in row and isinstance(row.get("response"), dict):
        return "revision"
    if "target" in row:
        return "target"
    if "responses" in row and "ranks" in row:
        return "ranking"
    if "prompt_id" in row and "text" in row:
        return "response"
    if "messages" in row and "response" in row:
        return "example"
    return "prompt" if "messages" in row else "other"


def _rank(rows: Sequence[Mapping[str, Any]]) -> int:
    """The order in which kinds of records are made of each other."""
    kinds = (
        "prompt",
        "response",
        "ranking",
        "example",
        "judgment",
        "critique",
        "revision",
        "improvement",
        "target",
        "pair",
        "other",
    )
    return kinds.index(_kind(rows[0])) if rows else len(kinds)


def _response(index: int, scope: str, stage: str, row: dict[str, Any]) -> list[tuple[Entry, str, str]]:
    entry = Entry(index, scope, stage, text(row.get("id")), text(row.get("text")))
    _add_response(entry, row)
    return [(entry, text(row.get("prompt_id")), "")]


def _add_response(entry: Entry, row: Mapping[str, Any]) -> None:
    tokens = number(row.get("tokens"))
    entry.tokens = int(tokens) if tokens else None
    if row.get("finish_reason") == "length":
        entry.tags.append("cut off")
    if row.get("reasoning"):
        entry.notes.append(["thought", text(row["reasoning"])])


def _revision(index: int, scope: str, stage: str, row: dict[str, Any]) -> list[tuple[Entry, str, str]]:
    inner = mapping(row.get("response"))
    entry = Entry(index, scope, stage, text(row.get("id")), text(inner.get("text")))
    _add_response(entry, inner)
    if row.get("label") is not None:
        entry.tags.append(f"label {text(row['label'])}")
    return [(entry, text(row.get("prompt_id")), "")]


def _improvement(index: int, scope: str, stage: str, row: dict[str, Any]) -> list[tuple[Entry, str, str]]:
    [(entry, prompt_id, prompt)] = _revision(index, scope, stage, {**row, "label": None})
    entry.score = number(row.get("score"))
    entry.tags.append(text(row.get("outcome")))
    if row.get("feedback"):
        entry.notes.append(["feedback", text(row["feedback"])])
    return [(entry, prompt_id, prompt)]


def _target(index: int, scope: str, stage: str, row: dict[str, Any]) -> list[tuple[Entry, str, str]]:
    id, tags = text(row.get("id")), [f"label {text(row['label'])}"] if row.get("label") is not None else []
    first = Entry(index, scope, stage, id, text(row.get("response")), tags=["response"])
    second = Entry(index, scope, stage, f"{id} target", text(row.get("target")), tags=["target", *tags])
    return [(entry, id, _conversation(row.get("messages"))) for entry in (first, second)]


def _ranking(index: int, scope: str, stage: str, row: dict[str, Any]) -> list[tuple[Entry, str, str]]:
    id, ranks = text(row.get("id")), listed(row.get("ranks"))
    made = []
    for n, response in enumerate(listed(row.get("responses"))):
        tags = [f"rank {text(ranks[n])}"] if n < len(ranks) else []
        made.append(
            (Entry(index, scope, stage, f"{id}#{n}", text(response), tags=tags), id, _conversation(row.get("messages")))
        )
    return made


def _example(index: int, scope: str, stage: str, row: dict[str, Any]) -> list[tuple[Entry, str, str]]:
    id = text(row.get("id"))
    entry = Entry(index, scope, stage, id, text(row.get("response")), tags=["to imitate"])
    return [(entry, id, _conversation(row.get("messages")))]


def _nothing(index: int, scope: str, stage: str, row: dict[str, Any]) -> list[tuple[Entry, str, str]]:
    return []


_MAKERS = {
    "response": _response, "revision": _revision, "improvement": _improvement, "target": _target, "ranking": _ranking,
    "example": _example,
}  # fmt: skip


def _add_judgment(entry: Entry, kind: str, stage: str, row: Mapping[str, Any]) -> None:
    score = number(row.get("score"))
    if kind == "critique":
        entry.notes.append([f"{stage}{'' if score is None else f', score {score:g}'}", text(row.get("text"))])
    else:
        texts, scores = listed(row.get("texts")), listed(row.get("scores"))
        for n, written in enumerate(texts):
            verdict = number(scores[n]) if n < len(scores) else None
            if text(written):
                entry.notes.append(
                    [f"{stage}{', no score' if verdict is None else f', score {verdict:g}'}", text(written)]
                )
        if not entry.scores:
            entry.scores = [number(one) for one in scores]
    if entry.score is None:
        entry.score = score
        if score is None and "no score" not in entry.tags:
            entry.tags.append("no score")


def _paired(
    index: int, scope: str, stage: str, row: Mapping[str, Any], made: Mapping[str, Mapping[str, Entry]]
) -> list[tuple[Entry, str, str]]:
    """Tags the two responses of a pair; returns those that no other record of the scope has."""
    new = []
    for side in ("chosen", "rejected"):
        response, score = mapping(row.get(side)), number(row.get(f"{side}_score"))
        id, written = text(response.get("id")), text(response.get("text"))
        known = [entries[id] for name, entries in made.items() if id in entries and _family(name) == _family(stage)]
        # SRT trains on the refined text with its marker after it.
        known = [entry for entry in known if written == entry.text or (entry.text and written.startswith(entry.text))]
        entry = max(known, key=lambda one: len(one.text), default=None)
        if entry is None:
            entry = Entry(index, scope, stage, id, written)
            _add_response(entry, response)
            prompt_id = text(response.get("prompt_id")) or text(row.get("id"))
            new.append((entry, prompt_id, _conversation(row.get("messages"))))
        if side not in entry.tags:
            entry.tags.append(side)
        if entry.score is None and score is not None:
            entry.score, entry.tags = score, [tag for tag in entry.tags if tag != "no score"]
    return new


def _qualities(
    index: int, run: RunFiles, found: Mapping[tuple[str, str, int], Sample]
) -> Iterator[tuple[Sample, list[Any]]]:
    """The quality of each evaluation prompt in each iteration, if the evaluation lists it in their order."""
    for scope in run.scopes.values():
        by_prompt = listed(mapping(scope.values.get("evaluation")).get("by_prompt"))
        of_evaluation = [rows for name, rows in scope.records.items() if _family(name) == EVALUATION]
        orders = [list(dict.fromkeys(text(r["prompt_id"]) for r in rows if "prompt_id" in r)) for rows in of_evaluation]
        ids = next((ids for ids in orders if len(ids) == len(by_prompt)), [])
        for id, value in zip(ids, by_prompt, strict=True) if ids else []:
            if (EVALUATION, id, -1) in found and number(value) is not None:
                yield found[EVALUATION, id, -1], [index, scope.name, round(value, 4)]


def _family(stage: str) -> str:
    """What a stage belongs to, if not to the training of its iteration."""
    if stage.startswith(("eval_", "held_out")):
        return EVALUATION
    return JUDGE_TEST if stage.startswith("judge_test") else ""


def _conversation(messages: Any) -> str:
    """A conversation as one text: of a single turn its content, of several each with its role."""
    turns = [(text(m.get("role")), text(m.get("content"))) for m in listed(messages) if isinstance(m, dict)]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {content}" for role, content in turns)


def stage_counts(samples: Iterable[Sample]) -> dict[str, int]:
    """Number of samples in each group."""
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample.group] = counts.get(sample.group, 0) + 1
    return counts
