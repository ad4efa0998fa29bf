"""``jaxsi eval arena-hard``: answers hard prompts, lets a judge compare them with a baseline's, scores judgments."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

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
judgments, --battles a file of weighted battles. The judge prompt is in our own words, so figures are not those of the
leaderboard. The judge has to write text: a model or an endpoint.

--style-control also prints scores apart from the length of answers and their markdown, by arena-hard-auto's method.
With --judgments it needs the answers: --baseline FILE, and --style-answers FILES of the models. If their rows have no
"metadata" with counts, --style-tokenizer MODEL counts the tokens.

{JUDGED}

{JUDGES}

Examples:
  jaxsi eval arena-hard --judgments model_judgment/gpt-4.1/mine.jsonl --json
  jaxsi eval arena-hard MODEL --data question.jsonl --baseline gpt-4-0314.jsonl --judge endpoint:gpt-4.1 -o arena
  jaxsi eval arena-hard --battles arena_hard_battles.jsonl
  jaxsi eval arena-hard --judgments model_judgment/gpt-4.1/*.jsonl --style-control length markdown \\
    --style-answers model_answer/*.jsonl --baseline model_answer/o3-mini-2025-01-31.jsonl --category hard_prompt"""


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
    """Only the questions or judgments of this category, such as hard_prompt or creative_writing."""
    style_control: tuple[Literal["length", "markdown"], ...] = ()
    """Control scores for the style of answers: their length, their markdown, or both."""
    style_answers: tuple[Path, ...] = ()
    """Files of model_answer of all models in --judgments."""
    style_tokenizer: str | None = None
    """The model whose tokenizer counts the tokens of all answers. Default: the counts in the files."""
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

    if args.style_answers and not (args.judgments and args.style_control):
        raise UsageError("--style-answers belongs to --judgments and --style-control; leave it out")
    if args.judgments:
        return _scored(args)
    if args.battles is not None and args.style_control:
        raise UsageError("--style-control: battles do not say which answers they are about; give --judgments")
    if args.battles is not None:
        value = {"battles": arena_hard.battle_scores(args.battles)}
        return Report(value, table([{"battle": name, **_flat(row)} for name, row in value["battles"].items()]))
    if (args.model is None) == (args.answers is None):
        raise UsageError("give MODEL, or its --answers, or --judgments or --battles to score")
    if args.data is None or args.baseline is None or args.out is None:
        raise UsageError("--data, --baseline and --out are needed; only --judgments and --battles need none")
    return _judged(args, args.data, args.baseline, args.out)


def _scored(args: Arena) -> Report:
    """The figures of the files of judgments that the user names."""
    from jaxsi.evals import arena_hard
    from jaxsi.evals.arena_style import read_styles

    judgments = arena_hard.read_judgments(args.judgments)
    chosen = [games for games in judgments if args.category in (None, games.category)]
    if not chosen:
        raise UsageError(f"--category {args.category}: the judgments have {_listed(g.category for g in judgments)}")
    value: dict[str, Any] = {"models": arena_hard.scores(chosen)}
    if args.style_control:
        if args.baseline is None:
            raise UsageError(
                "--style-control needs the baseline's answers: give its file of model_answer, --baseline FILE"
            )
        count = _token_counter(args)
        styles = dict(read_styles(path, count) for path in args.style_answers)
        missing = sorted({games.model for games in chosen} - styles.keys())
        if missing:
            raise UsageError(
                f"--style-control needs the answers of {_listed(missing)}: give their files of model_answer, such as "
                f"model_answer/{missing[0]}.jsonl, with --style-answers"
            )
        value["style_control"] = _controlled(args, chosen, styles, read_styles(args.baseline, count)[1])
    return Report(value, _text(value["models"], value.get("style_control")))


def _listed(names: Iterable[str]) -> str:
    found = sorted(set(names))
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _token_counter(args: Arena) -> Callable[[str], int] | None:
    """How many tokens a text has, by the tokenizer of --style-tokenizer."""
    if args.style_tokenizer is None:
        return None
    from jaxsi.lm import resolve
    from jaxsi.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve(args.style_tokenizer))
    return lambda text: len(tokenizer.encode_text(text))


def _controlled(args: Arena, judgments: Sequence[Any], styles: Mapping[str, Any], baseline: Any) -> dict[str, Any]:
    from jaxsi.evals.arena_style import controlled_scores

    warnings = []
    if len({games.model for games in judgments}) == 1:
        warnings.append(
            "with one model the score is that at its own mean style, so nearly the plain one; compare "
            "score_at_equal_style, or give the judgments of several models"
        )
    categories = {games.category for games in judgments}
    if len(categories) > 1:
        warnings.append(
            f"the categories {_listed(categories)} are fitted together, against one baseline; give --category for each "
            "by itself"
        )
    figures = controlled_scores(judgments, styles, baseline, args.style_control)
    return {"controls": list(args.style_control), **figures, "warnings": warnings}


def _judged(args: Arena, data: Path, baseline_file: Path, folder: Path) -> Report:
    from jaxsi.evals import arena_hard, arena_style
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
    count = _token_counter(args)
    style = None if not args.style_control else arena_style.read_styles(baseline_file, count)[1]
    if style is not None and count is None and args.answers is None:
        raise UsageError("--style-control needs --style-tokenizer MODEL here, which counts the tokens of new answers")
    model, answers, plans = _answers(args, questions, out)
    requests = arena_hard.game_requests(questions, answers, baseline)
    cache, writer = args.answer_cache(out), args.bound_judge(named, out)
    if args.dry_run:
        return planned(**plans, judge=plan_texts(cache, writer, requests, cfg, args.judge_seeds))
    figures, without, games = [], 0, []
    for seed in range(args.judge_seeds):
        judged = arena_hard.judge_games(
            cache, writer, questions, answers, baseline, cfg, model=model, judge=named.file_name, seed=seed
        )
        suffix = "" if seed == 0 else f".seed{seed}"
        file = out / "model_judgment" / named.file_name / f"{file_name(model)}{suffix}.jsonl"
        write_rows(file, judged)
        without += sum(game["score"] is None for row in judged for game in row["games"])
        games.append(arena_hard.read_judgments([file]))
        figures.append(arena_hard.scores(games[-1])[model])
    counts = cache.counts()
    value = {"models": {model: figures[0]}, "judge": args.judge, "baseline": str(baseline_file)}
    value |= counts | {"unreadable": without - counts["failed"], "seeds": spreads(figures, ("score",))}
    if style is not None:
        answered = args.answers or out / "model_answer" / f"{file_name(model)}.jsonl"
        styles = {model: arena_style.read_styles(answered, count)[1]}
        value["style_control"] = _controlled(args, games[0], styles, style)
    parts = [_text(value["models"], value.get("style_control")), counts_text(value), spreads_text(value["seeds"])]
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


def _text(models: Mapping[str, Any], controlled: Mapping[str, Any] | None = None) -> str:
    parts = [table([{"model": model, **_flat(row)} for model, row in models.items()])]
    if controlled is not None:
        parts.append("controlled for " + " and ".join(controlled["controls"]))
        parts.append(table([{"model": model, **_flat(row)} for model, row in controlled["models"].items()]))
        parts.append(table([{"effect of": name, "beta": beta} for name, beta in controlled["coefficients"].items()]))
        parts += [f"warning: {warning}" for warning in controlled["warnings"]]
    if any(row["categories"] for row in models.values()):
        parts.append(table([{"model": model, **row["categories"]} for model, row in models.items()]))
    return "\n\n".join(parts)
