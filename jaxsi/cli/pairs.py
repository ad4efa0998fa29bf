"""``jaxsi pairs``: makes preference pairs of responses and their judgments. It needs no model and no JAX."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxsi.cli.arguments import Out, PromptOptions
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.judge import plain_response
from jaxsi.cli.output_file import check_out
from jaxsi.cli.tables import figures_table

DESCRIPTION = """Makes preference pairs of responses (of `jaxsi generate`) and judgments of them (of `jaxsi judge`): for
each prompt the response with the highest score, and the one with the lowest. OUT has one JSON object per line with
prompt, chosen and rejected as messages, and both scores: `jaxsi dpo`, `jaxsi reward`, `datasets` and TRL read it.
Responses without a score, and empty ones, are in no pair; thoughts are left out.

Examples:
  jaxsi pairs --responses responses.jsonl --judgments judgments.jsonl --prompts prompts.jsonl -o pairs.jsonl
  jaxsi pairs --responses R.jsonl --judgments J.jsonl --prompts P.jsonl -o pairs.jsonl --min-gap 1"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(PromptOptions):
    responses: Path
    """Responses in the format of `jaxsi generate`, or rows with "prompt_id" and "text"."""
    judgments: Path
    """Judgments in the format of `jaxsi judge`, or rows with the "id" of a response, its "prompt_id", and "score"."""
    out: Out
    """The pairs, one JSON object per line."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    min_gap: float = 0.0
    """The least difference between the two scores of a pair."""
    length_control: float = 0.0
    """Among responses within this share of the gap from the best score the shortest is chosen, and within the same
    distance from the worst the longest is rejected (Meta-Rewarding); 0 is off, and it must be less than 0.5."""
    cut_off: Literal["never", "rejected", "both"] = "never"
    """Where a response that the token limit cut off may stand. Trained on as a text, it ends as if it were complete."""


def pairs(argv: list[str]) -> Report:
    """Makes preference pairs."""
    args = parse(Pairs, argv, "jaxsi pairs", DESCRIPTION)
    check_out(args.out, args.prompts, args.responses, args.judgments, overwrite=args.overwrite)
    from jaxsi.runs.records import Judgment, RecordError, Response, read_jsonl, write_jsonl
    from jaxsi.stages.pairs import pairs_of_texts

    prompts = args.read()
    responses = read_jsonl(args.responses, Response, fill=plain_response)
    judgments = read_jsonl(args.judgments, Judgment, fill=plain_judgment)
    for path, records, command in ((args.responses, responses, "generate"), (args.judgments, judgments, "judge")):
        if not records:
            raise RecordError(path, None, f"no lines in this file; jaxsi {command} writes them")
    try:
        found, figures = pairs_of_texts(
            responses,
            judgments,
            prompts,
            length_control=args.length_control,
            min_gap=args.min_gap,
            reject_cut_off=args.cut_off != "never",
            choose_cut_off=args.cut_off == "both",
        )
    except ValueError as error:
        raise UsageError(f"{args.responses}, {args.judgments}, {args.prompts}: {error}") from error
    if not found:
        reasons = ", ".join(f"{name} {count}" for name, count in figures.items() if isinstance(count, int))
        raise UsageError(
            f"{args.judgments} gives no pair ({reasons}); judge more responses to each prompt, or finer ones"
        )
    write_jsonl(args.out, found)
    value = {"out": str(args.out), **figures}
    return Report(value, figures_table(value))


def plain_judgment(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a score that jaxsi did not give: {"prompt_id", "score"}, and the "id" or "sample" of its response."""
    if "prompt_id" not in row or "score" not in row or "scores" in row:
        return row
    id, score = row.get("id", f"{row['prompt_id']}#{row.get('sample', 0)}"), row["score"]
    kept = {name: item for name, item in row.items() if name != "sample"}
    return {"id": id, "score": score, "scores": [score], "texts": [""], "fingerprint": "", "template": ""} | kept
