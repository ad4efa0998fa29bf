"""``jaxsi eval compare``: one model against another on the same prompts."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxsi.cli.arguments import RowOptions
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.eval_answers import (
    JUDGED,
    Answering,
    JudgedBy,
    bound_judge,
    check_counts,
    make_folder,
    name_of,
    responses_of,
    spreads,
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
class Compare(RowOptions, Answering, JudgedBy):
    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """A folder for all results."""
    prompts: Path | None = None
    """A file of prompts, as in `jaxsi generate`."""
    max_prompts: int | None = None
    """Only the first prompts."""
    rubric: str = "pairwise_judge"
    """The name of a shipped rubric, or a file. One that scores each response by itself gives wins, losses and ties."""
    expected: bool = False
    """Weigh all possible verdicts by their probabilities, in place of the one that the judge wrote."""
    judgments: int = 1
    """Judgments of each pair, in each order."""
    judge_temperature: float = 0.0
    judge_tokens: int = 256
    """Most new tokens of a judgment."""


def compare(argv: list[str]) -> Report:
    """Compares two models."""
    args = parse(Compare, argv, "jaxsi eval compare", DESCRIPTION)
    check_counts(
        judge_seeds=args.judge_seeds, judge_batch=args.judge_batch, max_prompts=args.max_prompts,
        judgments=args.judgments, judge_tokens=args.judge_tokens,
    )  # fmt: skip
    if args.judge is None:
        raise UsageError("--judge: name who compares the two; see --help for the kinds of judges")
    from jaxsi.evals.answer_cache import EvaluationError
    from jaxsi.evals.paired import paired
    from jaxsi.evals.side_by_side import Row
    from jaxsi.runs.records import write_atomically

    out = make_folder(args.out, "--out")
    (a, b), prompts = _sides(args, out)
    rows = {name: Row(prompt, a[name], b[name]) for name, prompt in prompts.items()}
    judge = _judge(args, out)
    if args.dry_run:
        plan = judge.plan(rows, args.judge_seeds)._asdict()
        return Report(plan, figures_table(plan))
    results, counts = [], {"judged": 0, "reused": 0, "failed": 0, "torn_lines": 0}
    outcomes: list[Mapping[str, float]] = []
    for seed in range(args.judge_seeds):
        answered = judge.ask(rows, seed)
        counts["judged"] += answered.asked
        counts["reused"] += sum(rows[name].first != rows[name].second for name in answered.values) - answered.asked
        counts["failed"] += len(answered.failures)
        counts["torn_lines"] = answered.torn
        if len(answered.values) < 2:
            reasons = sorted({reason for reason in answered.failures.values() if reason})
            raise EvaluationError(f"only {len(answered.values)} of {len(rows)} prompts have a verdict: {reasons[:3]}")
        differences = [len(b[name]) - len(a[name]) for name in answered.values]
        results.append(paired(list(answered.values.values()), differences).figures())
        outcomes.append(answered.values)
    value = {"a": name_of(args.a), "b": name_of(args.b), **results[0], **counts, "equal": _equal(rows)}
    if len(results) > 1:
        value["seeds"] = spreads(results, ("win_rate", "controlled"))
    value["warnings"] = _warnings(counts, len(rows))
    write_atomically(out / "comparison.json", [(json.dumps(value, indent=2) + "\n").encode()])
    lines = (json.dumps({"prompt": name, "outcome": y}) + "\n" for name, y in outcomes[0].items())
    write_atomically(out / "outcomes.jsonl", (line.encode() for line in lines))
    return Report(value, _text(value))


def _equal(rows: Mapping[str, Any]) -> int:
    return sum(row.first == row.second for row in rows.values())


def _warnings(counts: Mapping[str, int], prompts: int) -> list[str]:
    failed = counts["failed"]
    return [f"{failed} judgments failed and count nowhere ({prompts} prompts); run again to ask them"] if failed else []


def _judge(args: Compare, out: Path) -> Any:
    from jaxsi.evals.answer_cache import AnswerCache
    from jaxsi.evals.side_by_side import SideBySide
    from jaxsi.stages.prompts.comparison import read_rubric
    from jaxsi.stages.verdicts import JudgeConfig

    assert args.judge is not None
    rubric = read_rubric(args.rubric)
    try:
        config = JudgeConfig(
            num_samples=args.judgments, temperature=args.judge_temperature, max_new_tokens=args.judge_tokens,
            expected=args.expected, batch_size=args.judge_batch,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error
    cache = AnswerCache(args.cache or out / "judge_answers.jsonl")
    bound = bound_judge(args.judge, args.a, args, out / "endpoint_answers.jsonl")
    return SideBySide(cache=cache, judging=bound.judging, writer=bound.writer, rubric=rubric, config=config)


def _sides(args: Compare, out: Path) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The texts of both sides, and the prompts, by the same names in the same order.

    Raises: UsageError, EvaluationError: if they do not belong together.
    """
    from jaxsi.evals.judging import check_aligned
    from jaxsi.stages.user_data import read_prompts

    prompts = None if args.prompts is None else read_prompts(args.prompts, args.max_prompts, **args.reading)
    sides, asked = [], []
    for word, place in ((args.a, "a"), (args.b, "b")):
        texts, own = _side(args, word, prompts, out / f"responses_{place}")
        sides.append(texts)
        asked.append(own)
    check_aligned(asked[0], args.a, asked[1], args.b)
    if any(asked[0][name].messages != asked[1][name].messages for name in asked[0]):
        raise UsageError(
            f"{args.a} and {args.b} have other prompts under the same names; give outputs for the same ones"
        )
    return [{name: side[name] for name in asked[0]} for side in sides], asked[0]


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
    if args.dry_run:  # as if nothing were sampled yet, and every response another one
        return {name: f"{word} {name}" for name in own}, own
    return {r.prompt_id: r.text for r in responses_of(word, prompts, args, folder)}, own


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
        "judged / reused / failed": f"{value['judged']} / {value['reused']} / {value['failed']}",
    }
    for name, s in value.get("seeds", {}).items():
        shown[f"{name}, all seeds"] = f"{s['mean']:.1f} %, from {s['low']:.1f} to {s['high']:.1f}"
    return "\n".join([figures_table(shown), *(f"warning: {warning}" for warning in value["warnings"])])
