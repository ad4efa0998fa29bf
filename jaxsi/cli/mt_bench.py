"""``jaxsi eval mt-bench``: answers MT-Bench's questions, lets a judge grade or compare answers, scores judgments."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxsi.cli.arguments import ChatOptions
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.judge_options import JudgeOptions, answerer, costs, new_folder, spread, spread_text, write_rows
from jaxsi.runs.metrics import table

DESCRIPTION = """MT-Bench: 80 questions of two turns, at the temperature of their category. A judge grades each answer
from 1 to 10, or compares it with a baseline's in both orders; for mathematics, reasoning and code it sees a reference.

--data is a folder as FastChat's data/mt_bench: question.jsonl, reference_answer/gpt-4.jsonl, and for --mode pair
model_answer/BASELINE.jsonl. OUT gets model_answer/NAME.jsonl and model_judgment/JUDGE_single.jsonl (or _pair) in
FastChat's formats, and asked.jsonl: whatever a model has said is there, and is never asked again. If the command is
killed, run it again. Only judgments that failed are repeated.

--judgments scores existing files and asks nobody. A judgment without a score (-1) is counted and left out. If a turn
was judged twice, the last judgment counts; "by rows" is FastChat's figure, which counts both. The prompts are in our
own words; figures to set beside published ones need --judge-prompts with FastChat's file.

Examples:
  jaxsi eval mt-bench --judgments model_judgment/gpt-4_single.jsonl --json
  jaxsi eval mt-bench MODEL --data mt_bench --judge endpoint:gpt-4o --out mt --dry-run
  jaxsi eval mt-bench MODEL --data mt_bench --judge model:JUDGE --out mt --judge-seeds 3
  jaxsi eval mt-bench --answers mine.jsonl --data mt_bench --mode pair --judge endpoint:gpt-4o --out mt"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mtbench(JudgeOptions, ChatOptions):
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
    max_questions: int | None = None
    """Only the first questions."""
    max_new_tokens: int = 1024
    """Of an answer."""
    seed: int = 0
    """Of the answers."""


def mtbench(argv: list[str]) -> Report:
    """Answers, judges and scores MT-Bench."""
    args = parse(Mtbench, argv, "jaxsi eval mt-bench", DESCRIPTION)
    if args.judgments:
        return _scores(args)
    if (args.model is None) == (args.answers is None):
        raise UsageError("give MODEL, or its --answers, or --judgments to score")
    if args.data is None or args.out is None:
        raise UsageError("--data and --out are missing; only --judgments needs neither")
    from jaxsi.evals import mt_bench
    from jaxsi.evals.answer_cache import AnswerCache
    from jaxsi.evals.judging import estimate
    from jaxsi.evals.mt_bench_prompts import TEMPLATES, read_templates

    templates = TEMPLATES if args.judge_prompts is None else read_templates(args.judge_prompts)
    questions = mt_bench.read_questions(args.data, args.max_questions)
    baseline = _baseline(args, questions) if args.mode == "pair" else {}
    out = new_folder(args.out)
    writer = args.writer(args.judging(out))
    cfg = args.config()
    cache = AnswerCache(out / "asked.jsonl")
    if args.dry_run and args.model is not None:
        return _estimate(args, questions, baseline, templates, writer)
    model, answers = _answers(args, cache, questions)
    if args.mode == "pair":
        tasks = mt_bench.pair_tasks(questions, answers, baseline, templates)
    else:
        tasks = mt_bench.single_tasks(questions, answers, templates)
    if args.dry_run:
        judge = estimate(writer, [task.request for task in tasks], cfg.max_new_tokens)
        return costs(judge={name: count * args.judge_seeds for name, count in judge.items()})
    judge_name = _judge_name(args)
    files = []
    for seed in range(args.judge_seeds):
        named: dict[str, Any] = {"judge": judge_name, "seed": seed}
        if args.mode == "pair":
            rows = mt_bench.compare(cache, writer, tasks, cfg, models=(model, args.baseline), **named)
        else:
            rows = mt_bench.grade(cache, writer, tasks, cfg, model=model, **named)
        suffix = "" if seed == 0 else f".seed{seed}"
        files.append(out / "model_judgment" / f"{judge_name}_{args.mode}{suffix}.jsonl")
        write_rows(files[-1], [*_others(files[-1], model), *rows])
    return _scores(args, files, model, {question.question_id: question.category for question in questions})


def _answers(args: Mtbench, cache: Any, questions: Sequence[Any]) -> tuple[str, Mapping[int, tuple[str, ...]]]:
    """The model's name and its answers, from the file or from the model."""
    from jaxsi.evals import mt_bench

    if args.answers is not None:
        model, answers = mt_bench.read_answers(args.answers)
        mt_bench.complete(questions, answers, str(args.answers))
        return args.name or model, answers
    assert args.model is not None and args.out is not None
    writer, name = answerer(args.model, args.out, args.mesh, args.dtype, args.model_chat)
    model = args.name or name
    cfg = args.config(max_new_tokens=args.max_new_tokens)
    answers = mt_bench.answer(cache, writer, questions, cfg, args.seed)
    write_rows(args.out / "model_answer" / f"{_file_name(model)}.jsonl", mt_bench.answer_rows(model, answers))
    return model, answers


def _baseline(args: Mtbench, questions: Sequence[Any]) -> Mapping[int, tuple[str, ...]]:
    from jaxsi.evals import mt_bench

    assert args.data is not None
    folder = args.data / "model_answer"
    files = [folder / f"{args.baseline}{ending}" for ending in (".jsonl", ".jsonl.gz")]
    path = next((file for file in files if file.is_file()), files[0])
    _, answers = mt_bench.read_answers(path)
    mt_bench.complete(questions, answers, str(path))
    return answers


def _estimate(args: Mtbench, questions: Sequence[Any], baseline: Any, templates: Any, writer: Any) -> Report:
    """Calls and tokens before anything is answered: an answer counts as --max-new-tokens tokens."""
    from jaxsi.evals import mt_bench
    from jaxsi.evals.judging import estimate

    empty = {question.question_id: ("",) * len(question.turns) for question in questions}
    if args.mode == "pair":
        tasks = mt_bench.pair_tasks(questions, empty, baseline, templates)
    else:
        tasks = mt_bench.single_tasks(questions, empty, templates)
    judge = estimate(writer, [task.request for task in tasks], args.judge_max_new_tokens)
    judge["prompt_tokens"] += sum(task.turn for task in tasks) * args.max_new_tokens
    calls = sum(len(question.turns) for question in questions)
    asked = sum(len(" ".join(question.turns).encode()) // 3 + 64 for question in questions)
    twice = sum(len(question.turns) - 1 for question in questions)  # the second turn sees the first one and its answer
    answers = {
        "calls": calls,
        "prompt_tokens": 2 * asked + twice * args.max_new_tokens,
        "completion_tokens": calls * args.max_new_tokens,
    }
    return costs(answers=answers, judge={name: count * args.judge_seeds for name, count in judge.items()})


def _judge_name(args: Mtbench) -> str:
    """The judge in the files' names: endpoint:gpt-4o,base_url=... -> gpt-4o, model:folder/judge -> judge."""
    assert args.judge is not None
    return _file_name(Path(args.judge.partition(":")[2].partition(",")[0] or args.judge).name)


def _file_name(name: str) -> str:
    return name.replace("/", "_").replace("@", "_at_")


def _others(path: Path, model: str) -> list[dict[str, Any]]:
    """The judgments of other models in a file that is written again."""
    from jaxsi.stages.rows import rows

    found = [row for _, row in rows(path)] if path.is_file() else []
    return [row for row in found if isinstance(row, dict) and model not in (row.get("model"), row.get("model_1"))]


def _scores(
    args: Mtbench, files: Sequence[Path] = (), model: str | None = None, questions: Mapping[int, str] | None = None
) -> Report:
    """The figures of judgments: of the files named, or of one model's that were just written, a file for each seed."""
    from jaxsi.evals.mt_bench import read_questions
    from jaxsi.evals.mt_bench_scores import pair_scores, read_judgments, single_scores

    if questions is None and args.data is not None:
        questions = {question.question_id: question.category for question in read_questions(args.data)}
    grades, matches = read_judgments(files[:1] or args.judgments)
    value: dict[str, Any] = {}
    if grades:
        value["single"] = single_scores(grades, questions)
    if matches:
        models = {name for match in matches for name in (match.model_1, match.model_2)}
        value["pair"] = pair_scores(matches, args.baseline if args.baseline in models else None, questions)
    if model is not None:
        name, figure = ("single", "score") if args.mode == "single" else ("pair", "win_rate_adjusted")
        figures = value[name][model]
        value = {name: {model: figures}, "judge": args.judge, "files": [str(file) for file in files]}
        scores = [figures[figure]]
        for file in files[1:]:
            both = read_judgments([file])
            other = single_scores(both[0]) if name == "single" else pair_scores(both[1], args.baseline)
            scores.append(other[model][figure])
        value["seeds"] = spread(scores)
    return Report(value, _text(value))


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
    if len(value.get("seeds", {}).get("scores", ())) > 1:
        parts.append(spread_text(value["seeds"]))
    if any(row["errors"] and not row["by_rows"].get("score") for row in value.get("single", {}).values()):
        parts.append("no grade could be read: this judge does not write [[5]]; try another one, or more new tokens")
    return "\n\n".join(parts)
