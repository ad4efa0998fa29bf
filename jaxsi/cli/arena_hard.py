"""``jaxsi eval arena-hard``: answers hard prompts, lets a judge compare them with a baseline's, scores judgments."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxsi.cli.arguments import ChatOptions
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.judge_options import JudgeOptions, answerer, costs, new_folder, spread, spread_text, write_rows
from jaxsi.runs.metrics import table

DESCRIPTION = """Arena-Hard v0.1 and v2.0: a judge compares MODEL's answers with a baseline's, in both orders; a strong
verdict counts three times. The score is the mean over all weighted games, with the 5 to 95 % range of a bootstrap over
games (as arena-hard-auto shows it) and over prompts (wider: the games of a prompt are not independent).

--data is arena-hard-auto's question.jsonl and --baseline a file of its model_answer: gpt-4-0314 for v0.1;
o3-mini-2025-01-31 (hard prompts) and gemini-2.0-flash-001 (creative writing) for v2.0, one --category at a time. OUT
gets model_answer/ and model_judgment/ in its formats, and asked.jsonl: whatever a model has said is never asked again.
--judgments scores existing files of judgments, --battles a file of weighted battles. Style control is not here. The
judge prompt is in our own words, so figures are not those of the leaderboard.

Examples:
  jaxsi eval arena-hard --judgments model_judgment/gpt-4.1/mine.jsonl --json
  jaxsi eval arena-hard MODEL --data question.jsonl --baseline gpt-4-0314.jsonl --judge endpoint:gpt-4.1 --out arena
  jaxsi eval arena-hard --battles arena_hard_battles.jsonl"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arena(JudgeOptions, ChatOptions):
    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    answers: Path | None = None
    """In place of MODEL: a file of model_answer."""
    judgments: tuple[Path, ...] = ()
    """Only score these files."""
    battles: Path | None = None
    """Only score this file of battles."""
    data: Path | None = None
    baseline: Path | None = None
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    category: str | None = None
    """Only the questions of this category, such as hard_prompt or creative_writing."""
    name: str | None = None
    """The model's name in the files. Default: the last part of MODEL."""
    max_questions: int | None = None
    temperature: float = 0.0
    """Of the answers."""
    max_new_tokens: int = 4096
    """Of an answer."""
    seed: int = 0
    """Of the answers."""


def arena(argv: list[str]) -> Report:
    """Answers, judges and scores Arena-Hard."""
    args = parse(Arena, argv, "jaxsi eval arena-hard", DESCRIPTION)
    from jaxsi.evals import arena_hard

    if args.judgments:
        value: dict[str, Any] = {"models": arena_hard.scores(arena_hard.read_judgments(args.judgments))}
        return Report(value, _text(value["models"]))
    if args.battles is not None:
        value = {"battles": arena_hard.battle_scores(args.battles)}
        return Report(value, table([{"battle": name, **_flat(row)} for name, row in value["battles"].items()]))
    if (args.model is None) == (args.answers is None):
        raise UsageError("give MODEL, or its --answers, or --judgments or --battles to score")
    if args.data is None or args.baseline is None or args.out is None:
        raise UsageError("--data, --baseline and --out are needed; only --judgments and --battles need none")
    return _judged(args, args.data, args.baseline, args.out)


def _judged(args: Arena, data: Path, baseline_file: Path, folder: Path) -> Report:
    from jaxsi.evals import arena_hard
    from jaxsi.evals.answer_cache import AnswerCache
    from jaxsi.evals.judging import estimate

    given = arena_hard.read_questions(data)
    chosen = [uid for uid, (_, category) in given.items() if args.category in (None, category)][: args.max_questions]
    if not chosen:
        raise UsageError(f"--category {args.category}: {data} has {', '.join(sorted({c for _, c in given.values()}))}")
    questions = {uid: given[uid] for uid in chosen}
    _, baseline = arena_hard.read_answers(baseline_file)
    arena_hard.game_requests(questions, baseline, baseline)  # all prompts have an answer of the baseline
    out = new_folder(folder)
    cfg = args.config()
    writer = args.writer(args.judging(out))
    cache = AnswerCache(out / "asked.jsonl")
    if args.dry_run and args.answers is None:
        requests = arena_hard.game_requests(questions, dict.fromkeys(questions, ""), baseline)
        judge = estimate(writer, requests, cfg.max_new_tokens)
        judge["prompt_tokens"] += len(requests) * args.max_new_tokens
        prompts = sum(len(text.encode()) // 3 + 32 for text, _ in questions.values())
        tokens = {"prompt_tokens": prompts, "completion_tokens": len(questions) * args.max_new_tokens}
        answers = {"calls": len(questions), **tokens}
        return costs(answers=answers, judge={name: count * args.judge_seeds for name, count in judge.items()})
    model, answers = _answers(args, cache, questions, out)
    requests = arena_hard.game_requests(questions, answers, baseline)
    if args.dry_run:
        judge = estimate(writer, requests, cfg.max_new_tokens)
        return costs(judge={name: count * args.judge_seeds for name, count in judge.items()})
    assert args.judge is not None
    judge_name = Path(args.judge.partition(":")[2].partition(",")[0]).name.replace("@", "_at_")
    figures = []
    for seed in range(args.judge_seeds):
        judged = arena_hard.judge_games(
            cache, writer, questions, answers, baseline, cfg, model=model, judge=judge_name, seed=seed
        )
        file = out / "model_judgment" / judge_name / f"{model}{'' if seed == 0 else f'.seed{seed}'}.jsonl"
        write_rows(file, judged)
        figures.append(arena_hard.scores(arena_hard.read_judgments([file]))[model])
    seeds = spread([found["score"] for found in figures])
    value = {"models": {model: figures[0]}, "judge": args.judge, "baseline": str(baseline_file), "seeds": seeds}
    text = _text(value["models"])
    return Report(
        value, f"{text}\n\n{spread_text(seeds)}" if args.judge_seeds > 1 and seeds["mean"] is not None else text
    )


def _answers(args: Arena, cache: Any, questions: Any, out: Path) -> tuple[str, dict[str, str]]:
    """The model's name and its answers, from the file or from the model."""
    from jaxsi.evals import arena_hard
    from jaxsi.evals.judging import ask_texts
    from jaxsi.runs.records import Prompt

    if args.answers is not None:
        model, answers = arena_hard.read_answers(args.answers)
        return args.name or model, answers
    assert args.model is not None
    writer, name = answerer(args.model, out, args.mesh, args.dtype, args.model_chat)
    model = (args.name or name).replace("/", "_").replace("@", "_at_")
    cfg = args.config(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    requests = [Prompt.of(uid, text) for uid, (text, _) in questions.items()]
    found = ask_texts(cache, writer, requests, cfg, template="", seed=args.seed, accept=lambda _: True)
    if found.failures:
        uid, reason = next(iter(found.failures.items()))
        raise UsageError(f"prompt {uid}: {reason}; lower --max-new-tokens ({len(found.failures)} prompts)")
    answers = {uid: value["text"] for uid, value in found.values.items()}
    write_rows(out / "model_answer" / f"{model}.jsonl", arena_hard.answer_rows(model, questions, answers))
    return model, answers


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table: intervals as texts, without the categories."""
    shown = {name: figure for name, figure in row.items() if name != "categories"}
    for name in ("interval", "interval_by_prompt"):
        if shown.get(name) is not None:
            low, high = shown[name]
            shown[name] = f"{low:.3f} to {high:.3f}"
    return shown


def _text(models: Mapping[str, Any]) -> str:
    parts = [table([{"model": model, **_flat(row)} for model, row in models.items()])]
    if any(row["categories"] for row in models.values()):
        parts.append(table([{"model": model, **row["categories"]} for model, row in models.items()]))
    return "\n\n".join(parts)
