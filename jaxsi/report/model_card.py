"""The model card of an export: what made the model, from what, how well it does, and under which licence."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsi.report import figures, stages
from jaxsi.report.run_files import RunFiles, listed, mapping, number, read_run, text
from jaxsi.report.visible import plain
from jaxsi.runs import provenance


@dataclasses.dataclass(frozen=True)
class Method:
    """``tag`` for the hub, the name, the paper, and one sentence."""

    tag: str
    name: str
    paper: str
    says: str


OWN_PAIRS = "It wrote several responses to each prompt, and was trained by DPO on pairs of them that"
METHODS = {
    "self_rewarding": Method(
        "self-rewarding", "Self-Rewarding", "arXiv 2401.10020", f"{OWN_PAIRS} it had judged itself."
    ),
    "meta_rewarding": Method(
        "meta-rewarding", "Meta-Rewarding", "arXiv 2407.19594", f"{OWN_PAIRS} it had judged, and on pairs of judgments."
    ),
    "cream": Method("cream", "CREAM", "arXiv 2410.12735", f"{OWN_PAIRS} count less where two models disagree."),
    "temporal": Method(
        "temporal-self-rewarding", "Temporal Self-Rewarding", "arXiv 2508.06026",
        f"{OWN_PAIRS} past and future models keep apart.",
    ),
    "srt": Method("srt", "SRT", "arXiv 2406.07168", "It criticises its responses in words, and refines them."),
    "seft": Method("seft", "SEFT", "arXiv 2406.10813", "It was trained on its revised responses."),
    "pit": Method("pit", "PIT", "arXiv 2310.00898", "It improves responses; a reward model of gaps trained it."),
    "spin": Method("spin", "SPIN", "arXiv 2401.01335", "It was trained to prefer human responses to its own."),
    "grpo": Method("grpo", "GRPO", "arXiv 2402.03300", "It was reinforced by the scores of a judge."),
    "online_dpo": Method("online-dpo", "Online DPO", "arXiv 2402.04792", "A judge labelled its newest samples."),
}  # fmt: skip
LICENCES = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"\bMIT License\b",
    "gpl-3.0": r"GNU GENERAL PUBLIC LICENSE\s+Version 3",
    "llama3.1": r"LLAMA 3\.1 COMMUNITY LICENSE",
    "llama3": r"META LLAMA 3 COMMUNITY LICENSE",
    "llama2": r"LLAMA 2 COMMUNITY LICENSE",
}


def model_card(name: str, *, model: str, checkpoint: Path, facts: Mapping[str, Any], scalar_head: bool = False) -> str:
    """The README.md of an export.

    Args:
      name: of the exported model.
      model: what the user gave, such as RUN_DIR@2.
      checkpoint: the folder that it stands for; if that is in a run directory, the card tells of the run.
      facts: further rows of the table, such as {"parameters": "1,000"}.
    """
    run = run_around(checkpoint)
    source = model if run is None else text(run.config.get("model"))
    method = None if run is None else METHODS.get(run.method)
    if run is not None and method is None:
        method = Method(_word(run.method) or "self-improvement", cell(run.method.replace("_", " ")), "", "")
    iteration = checkpoint.parent.name.removeprefix("iter_")
    planned = None if run is None else number(run.config.get("iterations"))
    columns, rows, evaluation = ([], [], "") if run is None else _evaluation(run)
    told = {} if run is None else _run_facts(run)
    guards = [] if run is None else stages.guards_of(run)
    card = _environment().get_template("model_card.md.jinja").render(
        name=name, base=_base(source), licence=licence_of(source, checkpoint if run is None else None), method=method,
        scalar_head=scalar_head, columns=columns, rows=rows, evaluation=evaluation,
        iteration=iteration if run is not None and iteration.isdecimal() else "",
        planned=None if planned is None else f"{planned:g}",
        facts=[(key, value) for key, value in {**told, **{k: cell(v) for k, v in facts.items()}}.items() if value],
        alarms=[f"{guard.scope}: {guard.sentence}" for guard in guards if guard.kind == "alarm"],
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", card)


def run_around(checkpoint: Path) -> RunFiles | None:
    """The run that a checkpoint is in, RUN/SCOPE/checkpoint, without its records; None if it is in none."""
    for folder in list(checkpoint.resolve().parents)[:2]:
        if (folder / "config.json").is_file() and (folder / "journal.jsonl").is_file():
            return read_run(folder, records=False)
    return None


def licence_of(base: str, folder: Path | None = None) -> str | None:
    """The licence of a base model as its own files name it: the head of its README.md, or a text that is known. Looks
    into local folders and the local cache of the hub; asks no hub."""
    for file in _files_of(base, folder):
        try:
            content = file.read_text("utf-8", errors="replace")[:5000]
        except OSError:
            continue
        head = re.match(r"---\s*\n(.*?)\n---", content, re.S) if file.name == "README.md" else None
        if head and (found := re.search(r"^license:\s*[\"']?([A-Za-z0-9._+-]+)[\"']?\s*$", head[1], re.M)):
            return found[1]
        if file.name != "README.md":
            for name, pattern in LICENCES.items():
                if re.search(pattern, content):
                    return name
    return None


def _files_of(base: str, folder: Path | None) -> list[Path]:
    folders = [one for one in (folder, Path(base)) if one is not None and one.is_dir()]
    files = [one / name for one in folders for name in ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md")]
    if not folders and re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        from huggingface_hub import try_to_load_from_cache

        cached = [try_to_load_from_cache(base, name) for name in ("README.md", "LICENSE")]
        files += [Path(path) for path in cached if isinstance(path, str)]
    return files


def _base(path: str) -> dict[str, Any]:
    """The base model as the card names it. Of a local path only the last part: a card is published."""
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).exists()
    if hub:
        return {"name": path, "hub": True, "link": f"[{path}](https://huggingface.co/{path})"}
    return {"name": _local(path), "hub": False, "link": code(_local(path))}


def _run_facts(run: RunFiles) -> dict[str, Any]:
    """What the run says of itself: data, command, code and devices."""
    scope, planned = run.scopes.get("iter_0"), number(run.config.get("iterations"))
    given = mapping(scope.values.get("model")) if scope else {}
    entries = provenance.read(run.path)
    first, last = (entries[0], entries[-1]) if entries else ({}, {})
    packages = ", ".join(f"{name} {text(found)}" for name, found in mapping(last.get("packages")).items())
    done = sum(entry["iteration"] != "base" for entry in run.iterations)
    return {
        "base model": code(_local(text(run.config.get("model")))),
        "its weights": code(given.get("fingerprint")),
        "method": cell(run.method),
        "iterations": f"{done}" if planned is None else f"{done} of {planned:g}",
        "state of the run": run.status,
        **_data(run.config),
        "command": code(_without_folders(text(last.get("command")))),
        "commit of jaxsi": code(last.get("commit") or run.summary.get("commit")),
        "versions": cell(f"Python {text(last.get('python'))}, {packages}") if last else "",
        "devices": cell(last.get("devices")),
        "begun": cell(first.get("time")),
        "time": stages.clock(sum(entry["seconds"] for entry in run.journal)),
    }


def _data(config: Mapping[str, Any]) -> dict[str, str]:
    """Where the prompts and the other data came from."""
    found: dict[str, str] = {}
    for name in ("prompts", "demonstrations", "preferences", "rankings"):
        value = config.get(name)
        if isinstance(value, dict) and value.get("path"):
            found[name] = code(_local(text(value["path"])))
        elif isinstance(value, dict) and "num_prompts" in value:
            found[name] = f"invented by a model, {text(value['num_prompts'])} in an iteration"
        elif isinstance(value, dict) and value.get("__type__"):
            found[name] = code(text(value["__type__"]))
        elif isinstance(value, str):
            found[name] = code(value.split("#")[0])
    seed = {
        name: text(value).split("#")[0]
        for name, value in mapping(config.get("seed_data")).items()
        if isinstance(value, str)
    }
    if used := [
        f"{name}: `{cell(value)}`" for name, value in seed.items() if name in ("ift", "rankings", "judge_test")
    ]:
        found["human data"] = ", ".join(used)
    judge = config.get("judging")
    if judge is not None:
        found["judge"] = code(text(judge.get("__type__") if isinstance(judge, dict) else judge).split("#")[0])
    return found


def _evaluation(run: RunFiles) -> tuple[list[str], list[list[str]], str]:
    """(Columns, rows, a note) of the table of iterations."""
    measured = figures.by_iteration([run])[0]
    names = dict.fromkeys(name for found in measured.values() for name in found)
    known = [one.name for one in (*figures.QUALITY, *figures.JUDGE[:3], figures.LENGTH[0]) if one.name in names]
    evals = [name for name in names if name.startswith("evals.") and _has_interval(measured, name)]
    wanted = [*known[:1], *evals, *known[1:]] if "quality" in known else [*evals, *known]
    if not wanted:
        return [], [], ""
    rows = []
    for t, found in measured.items():
        cells = [t]
        for name in wanted:
            mean, low, high = found.get(name, (None, None, None))
            ends = None if low is None or high is None else (figures.shown_number(low), figures.shown_number(high))
            cells.append(figures.shown_number(mean) + ("" if ends is None else f" ({ends[0]} to {ends[1]})"))
        rows.append([cell(one) for one in cells])
    evaluate = run.config.get("evaluate")
    parts = listed(mapping(evaluate).get("parts")) or ([] if evaluate is None else [evaluate])
    by = [text(part.get("__type__") if isinstance(part, dict) else part).split("#")[0] for part in parts]
    note = f"Measured by {' and '.join(map(code, by))}." if by else ""
    if any(one.startswith("evals.toy") for one in by):
        note += " Quality is the exact grade, from 0 to 100, of responses to tasks of jaxsi's embedded world."
    return ["iteration", *(cell(name.removeprefix("evals.").replace("_", " ")) for name in wanted)], rows, note


def _has_interval(measured: Mapping[str, Mapping[str, figures.Value]], name: str) -> bool:
    return any(name in found and found[name][1] is not None for found in measured.values())


def cell(value: Any) -> str:
    """A text as one cell of a Markdown table: one line, no markup of tables or code, no hidden characters."""
    return plain(" ".join(text(value).split())).replace("|", "\\|").replace("`", "'")


def code(value: Any) -> str:
    """The same, set as code; "" for nothing."""
    return f"`{cell(value)}`" if text(value) else ""


def _local(path: str) -> str:
    """The last part of an absolute path; anything else as it is."""
    return Path(path).name if path.startswith(("/", "~")) else path


def _without_folders(command: str) -> str:
    """A command with the last parts of its absolute paths: where its user keeps things is nobody's business."""
    return re.sub(r"(?<![\w.])~?/(?:[^\s'\"=]*/)?([^\s'\"/]+)", r"\1", command)


def _word(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _line(value: Any) -> str:
    return plain(" ".join(text(value).split()))


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["line"] = _line
    return environment
