"""``jaxsi eval agreement``: how well a judge agrees with people."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxsi.cli.arguments import RowOptions
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.eval_judge import JUDGED, JudgedByRubric, check_counts
from jaxsi.cli.eval_results import counts_text, make_folder, planned, spreads, spreads_text, write_rows
from jaxsi.cli.judges import JUDGES
from jaxsi.runs.metrics import table

DESCRIPTION = f"""How well a judge agrees with people who compared two responses (--human), or ranked several
(--rankings); or how far benchmarks order models as people do (--scores).

--human takes votes on MT-Bench (question_id, turn, model_a, model_b, winner, judge), LLMBar's dataset.json (input,
output_1, output_2, label) and PandaLM's test set (response1, response2, annotator1, ...). --rankings takes rows with
"prompt", "responses" and "ranks".

The judge's verdicts are in a file (--verdicts: such votes by the judge, FastChat's pair or single judgments, LLMBar's
result.json, PandaLM's results, or the verdicts.jsonl of this command; for --rankings the file of `jaxsi judge`), or
--judge is asked now, with pairs in both orders. {JUDGED} DIR also gets verdicts.jsonl.

{JUDGES}

The CSV of --scores has a row for each model: its name, then its scores. What is printed is the rank correlation of
every column with that of --truth, over the models that have both.

Examples:
  jaxsi eval agreement --human human.jsonl --voters expert --verdicts gpt4_pair.jsonl
  jaxsi eval agreement --human human.jsonl --verdicts model_judgment/gpt-4_single.jsonl --json
  jaxsi eval agreement --human LLMBar/Natural/dataset.json --judge endpoint:gpt-4o-mini -o natural --dry-run
  jaxsi eval agreement --human LLMBar/Natural/dataset.json --judge model:MODEL -o natural --judge-seeds 3
  jaxsi eval agreement --rankings rankings.jsonl --judge reward:REWARD_MODEL -o rewards
  jaxsi eval agreement --scores leaderboards.csv --truth "Arena Elo" --json"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement(RowOptions, JudgedByRubric):
    human: Path | None = None
    """Pairs that people compared."""
    rankings: Path | None = None
    """Responses that people ranked."""
    scores: Path | None = None
    """A CSV with the scores of models."""
    truth: str | None = None
    """The column of --scores to compare the others with. Default: the first one with scores."""
    verdicts: Path | None = None
    """What the judge said, in place of --judge."""
    voters: str = ""
    """Count only the votes of people whose name begins so, such as expert."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """A folder for what the judge says."""
    rubric: str | None = None
    """The name of a shipped rubric, or a file. Default: pairwise_judge for --human, self_rewarding_judge for
    --rankings."""
    max_rows: int | None = None
    """Only the first pairs or rankings."""


def agreement(argv: list[str]) -> Report:
    """How well a judge agrees with people."""
    args = parse(Agreement, argv, "jaxsi eval agreement", DESCRIPTION)
    if sum(given is not None for given in (args.human, args.rankings, args.scores)) != 1:
        raise UsageError("give --human (pairs) or --rankings, or --scores (of models); one of them")
    if args.scores is not None:
        return _scores(args)
    if (args.verdicts is None) == (args.judge is None):
        raise UsageError("give --verdicts (a file) or --judge (who is asked now)")
    check_counts(max_rows=args.max_rows)
    return _pairs(args) if args.human is not None else _rankings(args)


def _pairs(args: Agreement) -> Report:
    from jaxsi.evals.agreement import agreement as figures_of, orders
    from jaxsi.evals.asked_agreement import groups_of_pairs, verdicts_of
    from jaxsi.evals.human_labels import read_labels, read_verdicts
    from jaxsi.runs.records import to_json

    assert args.human is not None
    labelled = read_labels(args.human, args.voters)
    pairs = labelled.pairs[: args.max_rows]
    if args.verdicts is not None:
        verdicts, others = read_verdicts(args.verdicts)
        known = {pair.id for pair in labelled.pairs}
        pairs = pairs + [pair for pair in others if pair.id not in known]
        if not {pair.id for pair in pairs if pair.labels} & {verdict.id for verdict in verdicts}:
            raise UsageError(f"--verdicts {args.verdicts} has no verdict about a pair of {args.human}")
        value = {"human": str(args.human), "verdicts": str(args.verdicts), **figures_of(pairs, verdicts)}
        ordered = orders(pairs, verdicts)
        value |= {} if ordered is None else {"orders": ordered}
        return Report(value, _pairs_text(value))
    texts = {pair.id: labelled.texts[pair.id] for pair in pairs if pair.id in labelled.texts}
    if not texts:
        raise UsageError(
            f"--human {args.human} holds no texts, so nothing can be asked; judge the answers with "
            "`jaxsi eval mt-bench --mode pair`, and give its file as --verdicts"
        )
    asked = _ask(args, groups_of_pairs(texts), "pairwise_judge")
    if isinstance(asked, Report):
        return asked
    found, rubric, cfg, counts = asked
    by_seed = [verdicts_of(answers, rubric, cfg) for answers in found]
    assert args.out is not None
    write_rows(args.out / "verdicts.jsonl", [to_json(verdict) for verdict in by_seed[0]])
    each = [figures_of(pairs, verdicts) for verdicts in by_seed]
    value = {"human": str(args.human), "judge": args.judge, "rubric": rubric.name, **each[0]}
    value |= counts | {
        "unreadable": sum(verdict.winner is None for one in by_seed for verdict in one) - counts["failed"]
    }
    value["seeds"] = spreads([figures["majority"] for figures in each], ("accuracy",))
    return Report(value, _pairs_text(value))


def _rankings(args: Agreement) -> Report:
    from jaxsi.evals.agreement import ranking_figures
    from jaxsi.evals.asked_agreement import groups_of_rankings, judgments_of
    from jaxsi.runs.records import Judgment, read_jsonl
    from jaxsi.stages.user_data import read_rankings

    assert args.rankings is not None
    ranked = read_rankings(args.rankings, **args.reading)[: args.max_rows]
    if args.verdicts is not None:
        judgments = read_jsonl(args.verdicts, Judgment)
        tops = [score for judgment in judgments for score in judgment.scores if score is not None]
        value = {"rankings": str(args.rankings), "verdicts": str(args.verdicts)}
        value |= ranking_figures(ranked, judgments, max(tops, default=0.0))
        return Report(value, _rows(value))
    asked = _ask(args, groups_of_rankings(ranked), "self_rewarding_judge")
    if isinstance(asked, Report):
        return asked
    found, rubric, _, counts = asked
    each = [ranking_figures(ranked, judgments_of(answers, ranked), float(rubric.high)) for answers in found]
    unreadable = sum(None in answer["scores"] for answers in found for answer in answers.values.values())
    value = {"rankings": str(args.rankings), "judge": args.judge, "rubric": rubric.name, **each[0]}
    value |= counts | {"unreadable": unreadable}
    value["seeds"] = spreads(each, ("accuracy",))
    return Report(value, _rows(value))


def _scores(args: Agreement) -> Report:
    from jaxsi.evals.agreement import score_correlations
    from jaxsi.evals.human_labels import read_scores

    assert args.scores is not None
    if args.verdicts is not None or args.judge is not None:
        raise UsageError("--scores takes no --verdicts and no --judge; leave them out")
    scores = read_scores(args.scores)
    truth = " ".join((args.truth or next(iter(scores))).split())
    if truth not in scores:
        raise UsageError(f"--truth {truth!r} is no column with scores; they are {', '.join(scores)}")
    value = {"scores": str(args.scores), "truth": truth, "benchmarks": score_correlations(scores, truth)}
    return Report(value, table([{"benchmark": name, **figures} for name, figures in value["benchmarks"].items()]))


def _ask(args: Agreement, groups: Sequence[Any], rubric_name: str) -> Any:
    """(the answers of each seed, the rubric, the settings, the counts), or the report of a dry run."""
    from jaxsi.evals.asked import ask_judge, plan_groups
    from jaxsi.stages.prompts.comparison import read_rubric

    rubric = read_rubric(args.rubric or rubric_name)
    cfg = args.rubric_config(rubric)
    out = make_folder(args.out, "--judge")
    judge = args.bound_judge(args.named_judge(None, out), out)
    cache = args.answer_cache(out)
    if args.dry_run:
        return planned(judge=plan_groups(cache, judge, groups, rubric, cfg, args.judge_seeds))
    found = [ask_judge(cache, judge, groups, rubric, cfg, seed) for seed in range(args.judge_seeds)]
    return found, rubric, cfg, cache.counts()


def _rows(value: Mapping[str, Any]) -> str:
    from jaxsi.cli.tables import figures_table

    flat = {
        name: figure for name, figure in value.items() if not isinstance(figure, dict | list) and name not in _ASKED
    }
    return _joined([figures_table(flat)], value)


_ASKED = ("judged", "reused", "failed", "unreadable", "torn_lines")


def _joined(parts: Sequence[str], value: Mapping[str, Any]) -> str:
    asked = [counts_text(value), spreads_text(value["seeds"])] if "seeds" in value else []
    return "\n\n".join(part for part in [*parts, *asked] if part)


def _pairs_text(value: Mapping[str, Any]) -> str:
    parts = []
    rows = []
    for name, figures in [("all", value), *value.get("groups", {}).items()]:
        human = figures["humans"]
        rows.append(
            {
                "pairs": name,
                "labelled": figures["pairs"],
                "judged": figures["judged"],
                "with ties": _of(figures["with_ties"]),
                "without ties": _of(figures["without_ties"]),
                "human-human with ties": _of(human["with_ties"]),
                "without": _of(human["without_ties"]),
                "majority": figures["majority"]["accuracy"],
                "macro F1": figures["majority"]["f1"],
                "same in both orders": figures["position"]["rate"],
                "ECE": figures["calibration"]["ece"],
            }
        )
    parts.append(table(rows))
    position = value["position"]
    if position["accuracy_mean"] is not None:
        names = ("accuracy_first_order", "accuracy_second_order", "accuracy_mean", "accuracy_both", "first", "second")
        parts.append(table([{name.replace("_", " "): position[name] for name in names}]))
    if value["no_verdict"] or value["not_asked"]:
        missing = value["no_verdict"], value["not_asked"]
        parts.append("pairs without a verdict: {}; that the judge was not asked: {}".format(*missing))
    if value["unread"]:
        parts.append(f"verdicts that could not be read and count as a tie: {value['unread']}")
    if "orders" in value:
        orders = dict(value["orders"])
        models = orders.pop("models")
        parts.append(table([orders]))
        parts.append(table([{"models": models["models"], **{k: models[k] for k in ("spearman", "kendall")}}]))
    return _joined(parts, value)


def _of(share: Mapping[str, Any]) -> str:
    return "-" if share["rate"] is None else f"{share['rate']:.3f} ({share['agree']}/{share['of']})"
