"""``jaxsi eval compare``: one model against another on the same prompts."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxsi.cli.arguments import RowOptions
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.eval_answers import Answering, name_of, responses_of
from jaxsi.cli.eval_judge import JUDGED, JudgedByRubric, NamedJudge, check_counts
from jaxsi.cli.eval_results import (
    counts_text,
    make_folder,
    plan_of_responses,
    planned,
    spreads,
    spreads_text,
    write_file,
    write_rows,
)
from jaxsi.cli.judges import JUDGES
from jaxsi.cli.tables import figures_table

DESCRIPTION = f"""Compares A with B on the same prompts. A judge sees the two responses to a prompt in both orders:
what wins in both orders wins, and two orders that disagree are a tie. Prints the share of prompts that A wins, and the
share at equal length (controlled), each with its 95 % interval over the prompts and the p-value of no difference.

A and B are models, which respond to --prompts, or files with their outputs: a model_outputs.json (a list of
{{"instruction", "output"}}, plain or .gz), or, with --prompts, responses of `jaxsi generate`. The prompts of both sides
are compared, letter for letter, before anything is judged.

{JUDGED}

DIR gets comparison.json and outcomes.jsonl (for each prompt how much better A's response is, from 0 to 1).

{JUDGES}

Examples:
  jaxsi eval compare runs/mine@3 runs/mine@0 --prompts prompts.jsonl --judge runs/mine@0 -o DIR
  jaxsi eval compare a/model_outputs.json b/model_outputs.json --judge endpoint:gpt-4o-mini -o DIR --dry-run
  jaxsi eval compare a.jsonl b.jsonl --prompts prompts.jsonl --judge reward:runs/reward -o DIR --json
  jaxsi eval compare A B --prompts prompts.jsonl --judge model:JUDGE --expected --judge-seeds 3 -o DIR"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare(RowOptions, Answering, JudgedByRubric):
    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """A folder for all results."""
    prompts: Path | None = None
    """A file of prompts, as in `jaxsi generate`."""
    max_prompts: int | None = None
    """Only the first prompts."""
    temperature: float = 0.7
    """Of the responses. 0 is greedy."""
    rubric: str | None = None
    """The name of a shipped rubric, or a file. Default: pairwise_judge. One that scores each response by itself gives
    wins, losses and ties."""


def compare(argv: list[str]) -> Report:
    """Compares two models."""
    args = parse(Compare, argv, "jaxsi eval compare", DESCRIPTION)
    check_counts(max_prompts=args.max_prompts)
    from jaxsi.evals.answer_cache import EvaluationError
    from jaxsi.evals.paired import paired
    from jaxsi.evals.side_by_side import UNREADABLE, Row
    from jaxsi.stages.prompts.comparison import read_rubric

    rubric = read_rubric(args.rubric or "pairwise_judge")
    args.rubric_config(rubric)  # wrong numbers are found before anything is sampled
    out = make_folder(args.out, "--out")
    named = args.named_judge(None if _is_file(args.a) else args.a, out)
    (a, b), prompts, plans = _sides(args, out)
    rows = {name: Row(prompt, a[name], b[name]) for name, prompt in prompts.items()}
    judge = _judge(args, named, rubric, out)
    if args.dry_run:
        return planned(**plans, judge=judge.plan(rows, args.judge_seeds))
    results, unreadable = [], 0
    outcomes: list[Mapping[str, float]] = []
    for seed in range(args.judge_seeds):
        answered = judge.ask(rows, seed)
        unreadable += list(answered.failures.values()).count(UNREADABLE)
        if len(answered.values) < 2:
            reasons = sorted({reason for reason in answered.failures.values() if reason})
            raise EvaluationError(f"only {len(answered.values)} of {len(rows)} prompts have a verdict: {reasons[:3]}")
        differences = [len(b[name]) - len(a[name]) for name in answered.values]
        results.append(paired(list(answered.values.values()), differences).figures())
        outcomes.append(answered.values)
    value = {"a": name_of(args.a), "b": name_of(args.b), **results[0], "equal": _equal(rows)}
    value |= judge.cache.counts() | {"unreadable": unreadable}
    value["seeds"] = spreads(results, ("win_rate", "controlled"))
    value["warnings"] = _warnings(value, len(rows))
    write_file(out / "comparison.json", [(json.dumps(value, indent=2) + "\n").encode()])
    write_rows(out / "outcomes.jsonl", [{"prompt": name, "outcome": y} for name, y in outcomes[0].items()])
    return Report(value, _text(value))


def _equal(rows: Mapping[str, Any]) -> int:
    return sum(row.first == row.second for row in rows.values())


def _warnings(counts: Mapping[str, Any], prompts: int) -> list[str]:
    failed, unreadable, warnings = counts["failed"], counts["unreadable"], []
    if failed:
        warnings.append(f"{failed} judgments failed and count nowhere ({prompts} prompts); run again to ask them")
    if unreadable:
        warnings.append(
            f"{unreadable} judgments have no verdict and count nowhere ({prompts} prompts); give --expected, more "
            "--judge-tokens or another judge"
        )
    return warnings


def _judge(args: Compare, named: NamedJudge, rubric: Any, out: Path) -> Any:
    from jaxsi.evals.side_by_side import SideBySide

    cache, judge = args.answer_cache(out), args.bound_judge(named, out)
    return SideBySide(cache=cache, judge=judge, rubric=rubric, config=args.rubric_config(rubric))


def _sides(args: Compare, out: Path) -> tuple[list[dict[str, str]], dict[str, Any], dict[str, Any]]:
    """The texts of both sides, and the prompts, by the same names in the same order; and the plans of the responses
    that a dry run does not sample.

    Raises: UsageError, EvaluationError: if they do not belong together.
    """
    from jaxsi.evals.judging import check_aligned
    from jaxsi.stages.user_data import read_prompts

    prompts = None if args.prompts is None else read_prompts(args.prompts, args.max_prompts, **args.reading)
    sides, asked, plans = [], [], {}
    for word, place in ((args.a, "a"), (args.b, "b")):
        if prompts is not None and args.dry_run and not _is_file(word):
            texts, own = _unsampled(args, place, prompts)
            plans[f"responses_{place}"] = plan_of_responses(prompts, args.max_new_tokens)
        else:
            texts, own = _side(args, word, prompts, out / f"responses_{place}")
        sides.append(texts)
        asked.append(own)
    check_aligned(asked[0], args.a, asked[1], args.b)
    if any(asked[0][name].messages != asked[1][name].messages for name in asked[0]):
        raise UsageError(
            f"{args.a} and {args.b} have other prompts under the same names; give outputs for the same ones"
        )
    return [{name: side[name] for name in asked[0]} for side in sides], asked[0], plans


def _is_file(word: str) -> bool:
    """Whether a side is a file of outputs, and not a model."""
    path = Path(word)
    return path.is_file() and path.name.removesuffix(".gz").endswith((".json", ".jsonl"))


def _unsampled(args: Compare, place: str, prompts: Sequence[Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """A side of which no response is there, and all are as long as they may be."""
    from jaxsi.evals.judging import unique, unsampled

    own = unique(((prompt.id, prompt) for prompt in prompts), str(args.prompts))
    return dict.fromkeys(own, unsampled(args.max_new_tokens, f"response-{place}")), own


def _side(
    args: Compare, word: str, prompts: Sequence[Any] | None, folder: Path
) -> tuple[dict[str, str], dict[str, Any]]:
    """The texts and the prompts of one side by name."""
    from jaxsi.evals.alpaca_assets import read_outputs
    from jaxsi.evals.judging import check_aligned, unique
    from jaxsi.runs.records import Prompt, Response, read_jsonl

    path = Path(word)
    if path.is_file() and path.name.removesuffix(".gz").endswith(".json"):
        outputs = unique(((row.instruction, row.output) for row in read_outputs(path)), word)
        if prompts is None:
            names = list(outputs)[: args.max_prompts]
            return {name: outputs[name] for name in names}, {name: Prompt.of(name, name) for name in names}
        by_text = unique(((prompt.text, prompt) for prompt in prompts), str(args.prompts))
        if args.max_prompts is not None:
            outputs = {name: text for name, text in outputs.items() if name in by_text}
        check_aligned(outputs, word, by_text, str(args.prompts))
        return {prompt.id: outputs[text] for text, prompt in by_text.items()}, {p.id: p for p in prompts}
    if prompts is None:
        raise UsageError(f"{word}: give --prompts, the prompts that it responds to")
    own = unique(((prompt.id, prompt) for prompt in prompts), str(args.prompts))
    if path.is_file() and path.name.removesuffix(".gz").endswith(".jsonl"):
        from jaxsi.cli.judge import plain_response

        responses = unique(((r.prompt_id, r.text) for r in read_jsonl(path, Response, fill=plain_response)), word)
        if args.max_prompts is not None:
            responses = {name: text for name, text in responses.items() if name in own}
        check_aligned(responses, word, own, str(args.prompts))
        return responses, own
    texts = responses_of(word, prompts, args, folder, args.temperature)
    return {prompt.id: text for prompt, text in zip(prompts, texts, strict=True)}, own


def _text(value: Mapping[str, Any]) -> str:
    def rate(name: str, interval: str, p_value: str) -> str:
        if value[name] is None:
            return "-"
        low, high = value[interval]
        return f"{value[name]:.1f} % ({low:.1f} to {high:.1f}), p = {value[p_value]:.3g}"

    shown = {
        "A": value["a"],
        "B": value["b"],
        "prompts": value["prompts"],
        "A wins / ties / B wins": f"{value['wins']} / {value['ties']} / {value['losses']}",
        "win rate of A": rate("win_rate", "interval", "p_value"),
        "at equal length": rate("controlled", "controlled_interval", "controlled_p_value"),
        "equal responses": value["equal"],
    }
    parts = [figures_table(shown), counts_text(value), spreads_text(value["seeds"])]
    parts.append("\n".join(f"warning: {warning}" for warning in value["warnings"]))
    return "\n\n".join(part for part in parts if part)
