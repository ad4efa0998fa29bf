"""``jaxsi eval alpaca-eval``: AlpacaEval 2.0, from a model to its row of the leaderboard."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

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
class Alpaca(Answering, JudgedByRubric):
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
    temperature: float = 0.7
    """Of the responses. 0 is greedy."""
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
    function:, verifier:) score each response by itself. --judge-temperature, --judge-tokens, --judge-samples and
    --expected belong to a rubric."""


def alpaca(argv: list[str]) -> Report:
    """Scores, judges or samples, and scores."""
    args = parse(Alpaca, argv, "jaxsi eval alpaca-eval", DESCRIPTION)
    given = [name for name in ("model", "outputs", "annotations") if getattr(args, name) is not None]
    if len(given) != 1:
        raise UsageError(
            f"{' and '.join(given) or 'nothing'} given; give one of MODEL, --outputs FILE and --annotations FILE"
        )
    check_counts(max_prompts=args.max_prompts)
    if args.judge is not None:
        args.judge_config()  # wrong numbers are found before anything is read
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
    asked = _baseline(args, assets)
    if args.dry_run:
        return planned(responses=plan_of_responses(_prompts(asked), args.max_new_tokens))
    outputs = _outputs(args, asked, out)
    value = {"model": outputs[0].generator, "outputs": len(outputs), "file": str(out / "model_outputs.json")}
    return Report(value, figures_table(value))


def _baseline(args: Alpaca, assets: Any) -> Any:
    from jaxsi.evals.alpaca_assets import read_outputs

    outputs = assets.baseline if args.baseline is None else read_outputs(args.baseline)
    return outputs[: args.max_prompts]


def _prompts(asked: Sequence[Any]) -> list[Any]:
    from jaxsi.runs.records import Prompt

    return [Prompt.of(str(i), row.instruction) for i, row in enumerate(asked)]


def _outputs(args: Alpaca, asked: Sequence[Any], out: Path) -> list[Any]:
    """The model's outputs, sampled if they are not there yet."""
    from jaxsi.evals.alpaca_assets import Output, as_json

    assert args.model is not None
    responses = responses_of(args.model, _prompts(asked), args, out / "responses", args.temperature)
    name = name_of(args.model, args.name)
    outputs = [
        Output(instruction=row.instruction, output=response, generator=name, dataset=row.dataset)
        for row, response in zip(asked, responses, strict=True)
    ]
    write_file(out / "model_outputs.json", [as_json(outputs)])
    return outputs


def _judged(args: Alpaca, assets: Any) -> Report:
    from jaxsi.evals.alpaca_assets import Output, official_template, read_outputs
    from jaxsi.evals.alpaca_judging import annotations_json, annotations_of, matched, read_template
    from jaxsi.evals.judging import unsampled
    from jaxsi.evals.side_by_side import UNREADABLE

    out = make_folder(args.out, "--judge")
    named = args.named_judge(args.model, out)
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
        text = unsampled(args.max_new_tokens)
        outputs = [Output(instruction=row.instruction, output=text, generator=name) for row in baseline]
    else:
        there, outputs = str(out / "model_outputs.json"), _outputs(args, baseline, out)
    matches = matched(outputs, there, baseline, str(args.baseline or "the official instructions"))
    judge = _judge(args, named, template, out)
    if args.dry_run:
        responses = (
            {} if args.model is None else {"responses": plan_of_responses(_prompts(baseline), args.max_new_tokens)}
        )
        return planned(**responses, judge=judge.plan(matches, args.judge_seeds))
    sets, unreadable = [], 0
    for seed in range(args.judge_seeds):
        answered = judge.preferences(matches, seed)
        unreadable += list(answered.failures.values()).count(UNREADABLE)
        annotations = annotations_of(matches, answered, _annotator(named, judge))
        file = out / ("annotations.json" if seed == 0 else f"annotations_{seed}.json")
        write_file(file, [annotations_json(annotations)])
        sets.append(annotations)
    return _scored(args, sets, assets, judge.counts() | {"unreadable": unreadable})


def _judge(args: Alpaca, named: NamedJudge, template: Any, out: Path) -> Any:
    """A WeightedJudge, or a ComparingJudge if the user names a rubric or a judge that writes no text."""
    from jaxsi.evals.alpaca_judging import ComparingJudge, WeightedJudge
    from jaxsi.evals.judging import writes
    from jaxsi.evals.side_by_side import SideBySide
    from jaxsi.stages.prompts import load_rubric
    from jaxsi.stages.prompts.comparison import read_rubric

    rubric = load_rubric() if args.rubric is None else read_rubric(args.rubric)
    config = args.rubric_config(rubric)
    cache, judge = args.answer_cache(out), args.bound_judge(named, out)
    if args.rubric is None and writes(judge):
        return WeightedJudge(cache=cache, writer=judge, template=template, config=config)
    return ComparingJudge(judge=SideBySide(cache=cache, judge=judge, rubric=rubric, config=config))


def _annotator(named: NamedJudge, judge: Any) -> str:
    """The judge's name in annotations: the official one only for the official model with the official template."""
    from jaxsi.evals.alpaca_judging import WeightedJudge, is_official

    if isinstance(judge, WeightedJudge) and is_official(judge):
        from jaxsi.evals.alpaca_assets import JUDGE

        return JUDGE
    return named.name


def _scored(args: Alpaca, sets: Sequence[Any], assets: Any, counts: dict[str, Any]) -> Report:
    """The figures of the first judge seed, and how far those of all seeds lie apart."""
    from jaxsi.evals.alpaca_eval import leaderboard, score

    scores = [score(rows, assets, strength=args.c, compat=args.compat, name=args.name) for rows in sets]
    first, figures = scores[0], [one.figures() for one in scores]
    value = figures[0] | counts
    if counts:
        value["seeds"] = spreads(figures, ("win_rate", "length_controlled_winrate", "discrete_win_rate"))
    if args.out is not None:
        out = make_folder(args.out, "")
        write_file(out / "leaderboard.csv", [leaderboard([first]).encode()])
        rows = [
            {"instruction": row.instruction, "preference": row.preference, "length_controlled": p}
            for row, p in zip(sets[0], (first.predictions or {}).values(), strict=False)
        ]
        write_rows(out / "predictions.jsonl", rows)
    return Report(value, _text(value))


def _text(value: dict[str, Any]) -> str:
    asked = ("judged", "reused", "failed", "unreadable", "torn_lines", "failures")
    shown = {
        name: figure for name, figure in value.items() if name not in ("warnings", "coefficients", "seeds", *asked)
    }
    parts = [
        figures_table(shown),
        *([counts_text(value)] if "judged" in value else []),
        spreads_text(value.get("seeds", {})),
    ]
    parts.append("\n".join(f"warning: {warning}" for warning in value["warnings"]))
    return "\n\n".join(part for part in parts if part)
