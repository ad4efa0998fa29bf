"""``jaxsi eval mt-bench``: answers MT-Bench's questions, lets a judge grade or compare answers, scores judgments."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.eval_answers import Answering, name_of, responding
from jaxsi.cli.eval_judge import JUDGED, JudgedBy, check_counts, file_name
from jaxsi.cli.eval_results import (
    counts_text,
    make_folder,
    plan_of_responses,
    planned,
    spreads,
    spreads_text,
    write_rows,
)
from jaxsi.cli.judges import JUDGES
from jaxsi.runs.metrics import table

DESCRIPTION = f"""MT-Bench: 80 questions of two turns, at the temperature of their category. A judge grades each answer
from 1 to 10, or compares it with a baseline's in both orders; for mathematics, reasoning and code it sees a reference.

--data is a folder as FastChat's data/mt_bench: question.jsonl, reference_answer/gpt-4.jsonl, and for --mode pair
model_answer/BASELINE.jsonl. DIR gets model_answer/NAME.jsonl and model_judgment/JUDGE_single.jsonl (or _pair) in
FastChat's formats; several models may share it. The judge has to write text: a model or an endpoint.

{JUDGED}

--judgments scores existing files and asks nobody. A judgment without a score (-1) is counted and left out. If a turn
was judged twice, the last judgment counts; "by rows" is FastChat's figure, which counts both. The prompts are in our
own words; figures to set beside published ones need --judge-prompts with FastChat's file.

{JUDGES}

Examples:
  jaxsi eval mt-bench --judgments model_judgment/gpt-4_single.jsonl --json
  jaxsi eval mt-bench MODEL --data mt_bench --judge endpoint:gpt-4o -o mt --dry-run
  jaxsi eval mt-bench MODEL --data mt_bench --judge model:JUDGE -o mt --judge-seeds 3
  jaxsi eval mt-bench --answers mine.jsonl --data mt_bench --mode pair --judge endpoint:gpt-4o -o mt"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mtbench(Answering, JudgedBy):
    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    """Whose answers are judged."""
    answers: Path | None = None
    """In place of MODEL: a file of answers in FastChat's format."""
    judgments: tuple[Path, ...] = ()
    """Only score these files."""
    data: Path | None = None
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """A folder for the answers and judgments."""
    mode: Literal["single", "pair"] = "single"
    baseline: str = "gpt-3.5-turbo"
    """The model to compare with, by the name of its file in --data/model_answer."""
    name: str | None = None
    """The model's name in the files. Default: the last part of MODEL."""
    judge_prompts: Path | None = None
    """The judge prompts, in place of ours: a file such as FastChat's judge_prompts.jsonl."""
    max_prompts: int | None = None
    """Only the first questions."""
    temperature: float | None = None
    """Of the responses. Default: that of the question's category."""
    top_p: float = 1.0
    judge_tokens: int = 2048
    """Most new tokens of a judgment."""


def mtbench(argv: list[str]) -> Report:
    """Answers, judges and scores MT-Bench."""
    args = parse(Mtbench, argv, "jaxsi eval mt-bench", DESCRIPTION)
    if args.judgments:
        return _scores(args)
    if (args.model is None) == (args.answers is None):
        raise UsageError("give MODEL, or its --answers, or --judgments to score")
    if args.data is None or args.out is None:
        raise UsageError("--data and --out are missing; only --judgments needs neither")
    check_counts(max_prompts=args.max_prompts)
    from jaxsi.evals import mt_bench
    from jaxsi.evals.judging import plan_texts
    from jaxsi.evals.mt_bench_prompts import TEMPLATES, read_templates

    cfg = args.judge_config()
    templates = TEMPLATES if args.judge_prompts is None else read_templates(args.judge_prompts)
    questions = mt_bench.read_questions(args.data, args.max_prompts)
    baseline = _baseline(args, questions) if args.mode == "pair" else {}
    out = make_folder(args.out, "--out")
    named = args.named_judge(args.model, out)
    named.check_writes()
    model, answers, plans = _answers(args, questions, out)
    if args.mode == "pair" and model == args.baseline:
        raise UsageError(f"the model and the baseline are both {model}; give another --baseline, or --name")
    if args.mode == "pair":
        tasks = mt_bench.pair_tasks(questions, answers, baseline, templates)
    else:
        tasks = mt_bench.single_tasks(questions, answers, templates)
    cache, writer = args.answer_cache(out), args.bound_judge(named, out)
    if args.dry_run:
        return planned(
            **plans, judge=plan_texts(cache, writer, [task.request for task in tasks], cfg, args.judge_seeds)
        )
    files = []
    for seed in range(args.judge_seeds):
        judged: dict[str, Any] = {"judge": named.file_name, "seed": seed}
        if args.mode == "pair":
            rows = mt_bench.compare(cache, writer, tasks, cfg, models=(model, args.baseline), **judged)
        else:
            rows = mt_bench.grade(cache, writer, tasks, cfg, model=model, **judged)
        suffix = "" if seed == 0 else f".seed{seed}"
        files.append(out / "model_judgment" / f"{named.file_name}_{args.mode}{suffix}.jsonl")
        write_rows(files[-1], [*_others(files[-1], model), *rows])
    categories = {question.question_id: question.category for question in questions}
    return _of_files(args, files, model, categories, cache.counts())


def _answers(
    args: Mtbench, questions: Sequence[Any], out: Path
) -> tuple[str, Mapping[int, tuple[str, ...]], dict[str, Any]]:
    """The model's name and its answers, from the file or from the model; in a dry run texts in their place, and the
    plan of them."""
    from jaxsi.evals import mt_bench
    from jaxsi.evals.judging import unsampled
    from jaxsi.runs.records import Prompt

    if args.answers is not None:
        model, answers = mt_bench.read_answers(args.answers)
        mt_bench.complete(questions, answers, str(args.answers))
        return args.name or model, answers, {}
    assert args.model is not None
    model = name_of(args.model, args.name)
    if args.dry_run:
        asked: list[Any] = []

        def count(part: str, prompts: Sequence[Any], temperature: float) -> list[str]:
            asked.extend(prompts)
            return [unsampled(args.max_new_tokens) for _ in prompts]

        answers = mt_bench.answer(count, questions, args.temperature)
        return model, answers, {"responses": plan_of_responses(asked, args.max_new_tokens)}
    turns = [Prompt.of(f"{q.question_id}, {turn}", text) for q in questions for turn, text in enumerate(q.turns, 1)]
    with responding(args.model, turns, args, out / f"responses_{file_name(model)}", args.temperature) as respond:
        answers = mt_bench.answer(respond, questions, args.temperature)
    write_rows(out / "model_answer" / f"{file_name(model)}.jsonl", mt_bench.answer_rows(model, answers))
    return model, answers, {}


def _baseline(args: Mtbench, questions: Sequence[Any]) -> Mapping[int, tuple[str, ...]]:
    from jaxsi.evals import mt_bench

    assert args.data is not None
    folder = args.data / "model_answer"
    files = [folder / f"{args.baseline}{ending}" for ending in (".jsonl", ".jsonl.gz")]
    path = next((file for file in files if file.is_file()), files[0])
    _, answers = mt_bench.read_answers(path)
    mt_bench.complete(questions, answers, str(path))
    return answers


def _others(path: Path, model: str) -> list[dict[str, Any]]:
    """The judgments of other models in a file that is written again."""
    from jaxsi.stages.rows import rows

    found = [row for _, row in rows(path)] if path.is_file() else []
    return [row for row in found if isinstance(row, dict) and model not in (row.get("model"), row.get("model_1"))]


def _scores(args: Mtbench) -> Report:
    """The figures of the files of judgments that the user names."""
    from jaxsi.evals.mt_bench import read_questions

    categories = None
    if args.data is not None:
        categories = {question.question_id: question.category for question in read_questions(args.data)}
    value = _figures(args, args.judgments, categories)
    return Report(value, _text(value))


def _figures(args: Mtbench, files: Sequence[Path], categories: Mapping[int, str] | None) -> dict[str, Any]:
    from jaxsi.evals.mt_bench_scores import pair_scores, read_judgments, single_scores

    grades, matches = read_judgments(files)
    value: dict[str, Any] = {"single": single_scores(grades, categories)} if grades else {}
    if matches:
        models = {name for match in matches for name in (match.model_1, match.model_2)}
        value["pair"] = pair_scores(matches, args.baseline if args.baseline in models else None, categories)
    return value


def _of_files(
    args: Mtbench, files: Sequence[Path], model: str, categories: Mapping[int, str], counts: dict[str, Any]
) -> Report:
    """The figures of one model's judgments that were just written, a file for each judge seed."""
    name, figure = ("single", "score") if args.mode == "single" else ("pair", "win_rate_adjusted")
    each = [_figures(args, [file], categories)[name][model] for file in files]
    value: dict[str, Any] = {name: {model: each[0]}, "judge": args.judge, "files": [str(file) for file in files]}
    value |= counts | {"unreadable": _without_verdict(files, model) - counts["failed"]}
    value["seeds"] = spreads(each, (figure,))
    return Report(value, _text(value))


def _without_verdict(files: Sequence[Path], model: str) -> int:
    """The answers of the judge that are missing or have no verdict; a pair has two."""
    from jaxsi.evals.mt_bench_scores import NO_SCORE
    from jaxsi.stages.rows import rows

    count = 0
    for file in files:
        for _, row in rows(file):
            assert isinstance(row, dict)
            if row.get("model") == model:
                count += row["score"] == NO_SCORE
            elif row.get("model_1") == model:
                count += [row["g1_winner"], row["g2_winner"]].count("error")
    return count


_COUNTS = ("errors", "duplicates", "by rows")


def _text(value: Mapping[str, Any]) -> str:
    """The tables: one line a model, then one column a category."""
    parts = []
    for name, columns in (
        ("single", ("turn_1", "turn_2", "score", "±", "judgments", *_COUNTS)),
        ("pair", ("win", "loss", "tie", "win_rate", "win_rate_adjusted", "±", "consistent", *_COUNTS)),
    ):
        figures: Mapping[str, Any] = value.get(name, {})
        if not figures:
            continue
        rows, categories = [], []
        for model, row in figures.items():
            half = None if row["ci95"] is None else (row["ci95"][1] - row["ci95"][0]) / 2
            shown = row | {"±": half, "by rows": row["by_rows"].get("score", row["by_rows"].get("win_rate_adjusted"))}
            rows.append({"model": model, **{column: shown[column] for column in columns}})
            categories.append({"model": model, **row["categories"]})
        parts += [table(rows), table(categories)]
    if "seeds" in value:
        parts += [part for part in (counts_text(value), spreads_text(value["seeds"])) if part]
    return "\n\n".join(parts)
