"""``jaxsi eval alpaca-eval``: AlpacaEval 2.0, from a model to its row of the leaderboard."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

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

DESCRIPTION = f"""AlpacaEval 2.0: 805 instructions, whose responses a judge compares with those of
gpt4_1106_preview. Prints the win rate, and the win rate at equal length (length_controlled_winrate).

It scores an annotations.json (--annotations), judges a model_outputs.json (--outputs), or begins with a MODEL. By
default the judge answers m or M, weighted by their probabilities; with --rubric it compares or scores in another way.
The length-controlled figure is calibrated for one judge and one baseline; with others it is printed with a warning.

The official files come from the hub, with their hash checked, or from a folder (--assets). {JUDGED}

DIR gets model_outputs.json, annotations.json (annotations_1.json, ... of further judge seeds), leaderboard.csv and
predictions.jsonl (for each instruction the probability of a win at equal length).

{JUDGES}

Examples:
  jaxsi eval alpaca-eval --annotations annotations.json --json
  jaxsi eval alpaca-eval --annotations annotations.json.gz --assets FOLDER --c 2.782559402 --compat alpaca_eval-0.6.6
  jaxsi eval alpaca-eval Qwen/Qwen3-0.6B --judge endpoint:gpt-4-1106-preview -o DIR --dry-run
  jaxsi eval alpaca-eval --outputs model_outputs.json --judge model:runs/judge --judge-seeds 3 -o DIR
  jaxsi eval alpaca-eval runs/mine --judge self --rubric pairwise_judge --max-prompts 64 -o DIR"""

OptionalModel = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alpaca(Answering, JudgedBy):
    model: OptionalModel = None
    outputs: Path | None = None
    """A model_outputs.json, or .json.gz, in place of MODEL."""
    annotations: Path | None = None
    """An annotations.json, or .json.gz, to score: nothing is sampled or judged."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """A folder for all results."""
    name: str | None = None
    """The model's name in the results. Default: the one in the file, or the end of MODEL."""
    assets: Path | None = None
    """A folder with the official files. Default: the hub."""
    offline: bool = False
    """Take the official files from the hub's local cache, without the network."""
    baseline: Path | None = None
    """Outputs of another baseline, in the format of model_outputs.json."""
    max_prompts: int | None = None
    """Only the first instructions."""
    c: float | None = None
    """C of the length-controlled fit. Default: chosen by five-fold cross-validation among ten values."""
    compat: Literal["alpaca_eval-0.6.6"] | None = None
    """Give row i the difficulty of instruction i, as that version of the official package does even if rows are
    missing. By default each row has the difficulty of its own instruction."""
    template: Path | None = None
    """The judge's template, in the official format. Default: the official one if the folder of --assets has it, else
    ours."""
    rubric: str | None = None
    """In place of the weighted m or M: the name of a shipped rubric, or a file. Judges that write no text (reward:,
    function:, verifier:) score each response by itself."""
    judge_tokens: int = 256
    """Most new tokens of a judgment under --rubric."""


def alpaca(argv: list[str]) -> Report:
    """Scores, judges or samples, and scores."""
    args = parse(Alpaca, argv, "jaxsi eval alpaca-eval", DESCRIPTION)
    given = [name for name in ("model", "outputs", "annotations") if getattr(args, name) is not None]
    if len(given) != 1:
        raise UsageError(
            f"{' and '.join(given) or 'nothing'} given; give one of MODEL, --outputs FILE and --annotations FILE"
        )
    check_counts(judge_seeds=args.judge_seeds, judge_batch=args.judge_batch, max_prompts=args.max_prompts)
    if args.c is not None and not 0 < args.c < float("inf"):
        raise UsageError(f"--c is {args.c}; it must be a number above 0")
    from jaxsi.evals.alpaca_assets import read_assets
    from jaxsi.evals.alpaca_eval import read_annotations

    if args.annotations is not None:
        rows = read_annotations(args.annotations)[: args.max_prompts]
        return _scored(args, [rows], read_assets(args.assets, offline=args.offline), {})
    assets = read_assets(args.assets, offline=args.offline)
    return _sampled(args, assets) if args.judge is None else _judged(args, assets)


def _sampled(args: Alpaca, assets: Any) -> Report:
    """Only the outputs."""
    if args.model is None:
        raise UsageError("--outputs needs --judge: who compares them with the baseline's?")
    out = make_folder(args.out, "MODEL")
    outputs = _outputs(args, assets, out)
    value = {"model": outputs[0].generator, "outputs": len(outputs), "file": str(out / "model_outputs.json")}
    return Report(value, figures_table(value))


def _baseline(args: Alpaca, assets: Any) -> Any:
    from jaxsi.evals.alpaca_assets import read_outputs

    outputs = assets.baseline if args.baseline is None else read_outputs(args.baseline)
    return outputs[: args.max_prompts]


def _outputs(args: Alpaca, assets: Any, out: Path) -> list[Any]:
    """The model's outputs, sampled if they are not there yet."""
    from jaxsi.evals.alpaca_assets import Output, as_json
    from jaxsi.runs.records import Prompt, write_atomically

    assert args.model is not None
    asked = _baseline(args, assets)
    prompts = [Prompt.of(str(i), row.instruction) for i, row in enumerate(asked)]
    responses = responses_of(args.model, prompts, args, out / "responses")
    name = name_of(args.model, args.name)
    outputs = [
        Output(instruction=row.instruction, output=response.text, generator=name, dataset=row.dataset)
        for row, response in zip(asked, responses, strict=True)
    ]
    write_atomically(out / "model_outputs.json", [as_json(outputs)])
    return outputs


def _judged(args: Alpaca, assets: Any) -> Report:
    from jaxsi.evals.alpaca_assets import Output, official_template, read_outputs
    from jaxsi.evals.alpaca_judging import annotations_json, annotations_of, matched, read_template
    from jaxsi.runs.records import write_atomically

    out = make_folder(args.out, "--judge")
    template = read_template(args.template or official_template(args.assets))
    baseline = _baseline(args, assets)
    if args.outputs is not None:  # before a token is spent
        there = str(args.outputs)
        outputs = read_outputs(args.outputs)
        if args.max_prompts is not None:
            wanted = {row.instruction for row in baseline}
            outputs = [row for row in outputs if row.instruction in wanted]
    elif args.dry_run:
        there, name = "MODEL", name_of(str(args.model), args.name)
        outputs = [Output(instruction=row.instruction, output="", generator=name) for row in baseline]
    else:
        there, outputs = str(out / "model_outputs.json"), _outputs(args, assets, out)
    matches = matched(outputs, there, baseline, str(args.baseline or "the official instructions"))
    judge = _judge(args, template, out)
    if args.dry_run:
        plan = judge.plan(matches, args.judge_seeds)._asdict()
        if args.model is not None:  # responses that are not there yet may be as long as they can be
            plan["sampled_tokens"] = args.max_new_tokens * len(matches)
            plan["prompt_tokens"] += args.max_new_tokens * plan["questions"]
        return Report(plan, figures_table(plan))
    sets, counts, reasons = [], {"judged": 0, "reused": 0, "failed": 0, "torn_lines": 0}, set[str]()
    for seed in range(args.judge_seeds):
        answered = judge.preferences(matches, seed)
        counts["judged"] += answered.asked
        counts["reused"] += len(answered.values) - answered.asked
        counts["failed"] += len(answered.failures)
        counts["torn_lines"] = answered.torn
        reasons |= {reason for reason in answered.failures.values() if reason}
        annotations = annotations_of(matches, answered, _annotator(args, judge))
        file = out / ("annotations.json" if seed == 0 else f"annotations_{seed}.json")
        write_atomically(file, [annotations_json(annotations)])
        sets.append(annotations)
    return _scored(args, sets, assets, counts | ({"failures": sorted(reasons)[:5]} if reasons else {}))


def _judge(args: Alpaca, template: Any, out: Path) -> Any:
    """A WeightedJudge, or a ComparingJudge if the user names a rubric or a judge that writes no text."""
    from jaxsi.evals.alpaca_judging import ComparingJudge, WeightedJudge
    from jaxsi.evals.answer_cache import AnswerCache
    from jaxsi.evals.side_by_side import SideBySide
    from jaxsi.stages.prompts import load_rubric
    from jaxsi.stages.prompts.comparison import read_rubric
    from jaxsi.stages.verdicts import JudgeConfig

    assert args.judge is not None
    rubric = None if args.rubric is None else read_rubric(args.rubric)
    cache = AnswerCache(args.cache or out / "judge_answers.jsonl")
    bound = bound_judge(args.judge, args.model, args, out / "endpoint_answers.jsonl")
    config = JudgeConfig(num_samples=1, batch_size=args.judge_batch, max_new_tokens=args.judge_tokens)
    if rubric is None and bound.writer is not None:
        return WeightedJudge(cache=cache, writer=bound.writer, template=template, config=config)
    sides = SideBySide(
        cache=cache, judging=bound.judging, writer=bound.writer, rubric=rubric or load_rubric(), config=config
    )
    return ComparingJudge(judge=sides)


def _annotator(args: Alpaca, judge: Any) -> str:
    """The judge's name in annotations: the official one only for the official model with the official template."""
    from jaxsi.evals.alpaca_judging import WeightedJudge, is_official

    if isinstance(judge, WeightedJudge) and is_official(judge):
        from jaxsi.evals.alpaca_assets import JUDGE

        return JUDGE
    return str(args.judge).partition(",")[0]


def _scored(args: Alpaca, sets: Sequence[Any], assets: Any, counts: dict[str, Any]) -> Report:
    """The figures of the first judge seed, and how far those of all seeds lie apart."""
    from jaxsi.evals.alpaca_eval import leaderboard, score
    from jaxsi.runs.records import write_atomically

    scores = [score(rows, assets, strength=args.c, compat=args.compat, name=args.name) for rows in sets]
    first, figures = scores[0], [one.figures() for one in scores]
    value = figures[0] | counts
    if len(scores) > 1:
        value["seeds"] = spreads(figures, ("win_rate", "length_controlled_winrate", "discrete_win_rate"))
    if args.out is not None:
        out = make_folder(args.out, "")
        write_atomically(out / "leaderboard.csv", [leaderboard([first]).encode()])
        rows = [
            {"instruction": row.instruction, "preference": row.preference, "length_controlled": p}
            for row, p in zip(sets[0], (first.predictions or {}).values(), strict=False)
        ]
        write_atomically(out / "predictions.jsonl", ((json.dumps(row) + "\n").encode() for row in rows))
    return Report(value, _text(value))


def _text(value: dict[str, Any]) -> str:
    shown = {name: figure for name, figure in value.items() if name not in ("warnings", "coefficients", "seeds")}
    lines = [figures_table(shown)]
    lines += [
        f"{name} over the judge's seeds: {s['mean']:.2f}, from {s['low']:.2f} to {s['high']:.2f} (sd {s['sd']:.2f})"
        for name, s in value.get("seeds", {}).items()
    ]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in value["warnings"])])
