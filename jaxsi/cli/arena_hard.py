"""``jaxsi eval arena-hard``: answers hard prompts, lets a judge compare them with a baseline's, scores judgments."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.eval_answers import Answering, name_of, responses_of
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

DESCRIPTION = f"""Arena-Hard v0.1 and v2.0: a judge compares MODEL's answers with a baseline's, in both orders; a strong
verdict counts three times. The score is the mean over all weighted games, with the 5 to 95 % range of a bootstrap over
games (as arena-hard-auto shows it) and over prompts (wider: the games of a prompt are not independent).

--data is arena-hard-auto's question.jsonl and --baseline a file of its model_answer: gpt-4-0314 for v0.1;
o3-mini-2025-01-31 (hard prompts) and gemini-2.0-flash-001 (creative writing) for v2.0, one --category at a time. DIR
gets model_answer/ and model_judgment/ in its formats; several models may share it. --judgments scores existing files of
judgments, --battles a file of weighted battles. Style control is not here. The judge prompt is in our own words, so
figures are not those of the leaderboard. The judge has to write text: a model or an endpoint.

{JUDGED}

{JUDGES}

Examples:
  jaxsi eval arena-hard --judgments model_judgment/gpt-4.1/mine.jsonl --json
  jaxsi eval arena-hard MODEL --data question.jsonl --baseline gpt-4-0314.jsonl --judge endpoint:gpt-4.1 -o arena
  jaxsi eval arena-hard --battles arena_hard_battles.jsonl"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arena(Answering, JudgedBy):
    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    answers: Path | None = None
    """In place of MODEL: a file of model_answer."""
    judgments: tuple[Path, ...] = ()
    """Only score these files."""
    battles: Path | None = None
    """Only score this file of battles."""
    data: Path | None = None
    """The file of questions."""
    baseline: Path | None = None
    """The file with the answers of the model to compare with."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """A folder for the answers and judgments."""
    category: str | None = None
    """Only the questions of this category, such as hard_prompt or creative_writing."""
    name: str | None = None
    """The model's name in the files. Default: the last part of MODEL."""
    max_prompts: int | None = None
    """Only the first questions."""
    temperature: float = 0.0
    """Of the responses. 0 is greedy."""
    top_p: float = 1.0
    max_new_tokens: int = 4096
    """Most new tokens of a response."""
    judge_tokens: int = 2048
    """Most new tokens of a judgment."""


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
    from jaxsi.evals.judging import plan_texts

    check_counts(max_prompts=args.max_prompts)
    cfg = args.judge_config()
    given = arena_hard.read_questions(data)
    chosen = [uid for uid, (_, category) in given.items() if args.category in (None, category)][: args.max_prompts]
    if not chosen:
        raise UsageError(f"--category {args.category}: {data} has {', '.join(sorted({c for _, c in given.values()}))}")
    questions = {uid: given[uid] for uid in chosen}
    _, baseline = arena_hard.read_answers(baseline_file)
    arena_hard.game_requests(questions, baseline, baseline)  # all prompts have an answer of the baseline
    out = make_folder(folder, "--out")
    named = args.named_judge(args.model, out)
    named.check_writes()
    model, answers, plans = _answers(args, questions, out)
    requests = arena_hard.game_requests(questions, answers, baseline)
    cache, writer = args.answer_cache(out), args.bound_judge(named).writer
    if args.dry_run:
        return planned(**plans, judge=plan_texts(cache, writer, requests, cfg, args.judge_seeds))
    figures, without = [], 0
    for seed in range(args.judge_seeds):
        judged = arena_hard.judge_games(
            cache, writer, questions, answers, baseline, cfg, model=model, judge=named.file_name, seed=seed
        )
        suffix = "" if seed == 0 else f".seed{seed}"
        file = out / "model_judgment" / named.file_name / f"{file_name(model)}{suffix}.jsonl"
        write_rows(file, judged)
        without += sum(game["score"] is None for row in judged for game in row["games"])
        figures.append(arena_hard.scores(arena_hard.read_judgments([file]))[model])
    counts = cache.counts()
    value = {"models": {model: figures[0]}, "judge": args.judge, "baseline": str(baseline_file)}
    value |= counts | {"unreadable": without - counts["failed"], "seeds": spreads(figures, ("score",))}
    parts = [_text(value["models"]), counts_text(value), spreads_text(value["seeds"])]
    return Report(value, "\n\n".join(part for part in parts if part))


def _answers(args: Arena, questions: Any, out: Path) -> tuple[str, dict[str, str], dict[str, Any]]:
    """The model's name and its answers, from the file or from the model; in a dry run texts in their place, and the
    plan of them."""
    from jaxsi.evals import arena_hard
    from jaxsi.evals.judging import unsampled
    from jaxsi.runs.records import Prompt

    if args.answers is not None:
        model, answers = arena_hard.read_answers(args.answers)
        return args.name or model, answers, {}
    assert args.model is not None
    model = name_of(args.model, args.name)
    prompts = [Prompt.of(uid, text) for uid, (text, _) in questions.items()]
    if args.dry_run:
        texts = dict.fromkeys(questions, unsampled(args.max_new_tokens))
        return model, texts, {"responses": plan_of_responses(prompts, args.max_new_tokens)}
    responses = responses_of(args.model, prompts, args, out / f"responses_{file_name(model)}", args.temperature)
    answers = dict(zip(questions, responses, strict=True))
    rows = arena_hard.answer_rows(model, questions, answers)
    write_rows(out / "model_answer" / f"{file_name(model)}.jsonl", rows)
    return model, answers, {}


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
