"""``jaxsi eval ifeval``: how well a model follows instructions that a program can check."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.eval_answers import Answering, responses_of
from jaxsi.cli.eval_judge import check_counts
from jaxsi.cli.eval_results import make_folder, plan_of_responses, planned, write_rows
from jaxsi.runs.metrics import table

DESCRIPTION = """IFEval: prompts with instructions such as "at least 300 words" or "no commas", which programs check.
Shown are the shares of prompts with all instructions followed and of instructions followed, strict and loose (loose
also tries the response without its first or last line and without asterisks). Thoughts are taken out before checking.

The checkers come with pip install 'jaxsi[ifeval]'. --data is IFEval's input_data.jsonl. DIR gets responses.jsonl and
checks.jsonl. If the command is killed, run it again: it goes on where it stopped. --responses checks existing ones:
rows with "prompt" and "response", or those of `jaxsi generate` with the keys as prompt ids.

The checks are also a judge, and so a reward: --judging verifier:input_data.jsonl,check=ifeval (with loose=true, or
partial=true for the share of the instructions).

Examples:
  jaxsi eval ifeval MODEL --data input_data.jsonl -o ifeval
  jaxsi eval ifeval --responses responses.jsonl --data input_data.jsonl --json
  jaxsi eval ifeval endpoint:gpt-4o-mini --data input_data.jsonl -o ifeval --max-prompts 50"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ifeval(Answering):
    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    responses: Path | None = None
    """In place of MODEL: a file of responses."""
    data: Path
    """The prompts with their instructions."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """A folder for responses and checks."""
    max_prompts: int | None = None
    """Only the first prompts."""
    without_nltk_data: bool = False
    """Leave out the prompts that need NLTK's data punkt_tab, if they are not on this machine."""
    temperature: float = 0.0
    """Of the responses. 0 is greedy."""
    top_p: float = 1.0
    max_new_tokens: int = 1280
    """Most new tokens of a response."""
    dry_run: bool = False
    """Only print how many calls and tokens it would take, from above; no response counts as there."""


def ifeval(argv: list[str]) -> Report:
    """Instruction following that programs check."""
    args = parse(Ifeval, argv, "jaxsi eval ifeval", DESCRIPTION)
    if (args.model is None) == (args.responses is None):
        raise UsageError("give MODEL, or a file of its --responses")
    check_counts(max_prompts=args.max_prompts)
    from jaxsi.evals.ifeval import check, checkable, figures, read_instructed

    given = read_instructed(args.data, args.max_prompts)
    prompts = checkable(given, leave_out=args.without_nltk_data)
    if not prompts:
        raise UsageError(f"--data {args.data}: all {len(given)} prompts need NLTK's data")
    answered = _answers(args, prompts) if args.model is not None else _read_responses(args, prompts)
    if isinstance(answered, Report):
        return answered
    followed = [check(prompt, answered.get(prompt.id, "")) for prompt in prompts]
    value = {"model": args.model or str(args.responses), **figures(prompts, followed)}
    value |= {"left_out": len(given) - len(prompts), "no_response": sum(p.id not in answered for p in prompts)}
    if args.out is not None:
        rows = [
            {"key": prompt.id, "response": answered.get(prompt.id), "strict": list(strict), "loose": list(loose)}
            for prompt, (strict, loose) in zip(prompts, followed, strict=True)
        ]
        write_rows(make_folder(args.out, "--out") / "checks.jsonl", rows)
    return Report(value, _text(value))


def _answers(args: Ifeval, prompts: Any) -> Any:
    """The model's answer to each prompt, by the key; or the report of a dry run."""
    from jaxsi.runs.records import Prompt

    assert args.model is not None
    requests = [Prompt.of(prompt.id, prompt.prompt) for prompt in prompts]
    if args.dry_run:
        return planned(responses=plan_of_responses(requests, args.max_new_tokens))
    out = make_folder(args.out, "MODEL")
    texts = responses_of(args.model, requests, args, out / "responses", args.temperature)
    rows = [{"key": p.id, "prompt": p.prompt, "response": text} for p, text in zip(prompts, texts, strict=True)]
    write_rows(out / "responses.jsonl", rows)
    return {row["key"]: row["response"] for row in rows}


def _read_responses(args: Ifeval, prompts: Any) -> dict[str, str]:
    """The responses of a file, by the keys of their prompts."""
    from jaxsi.runs.records import RecordError
    from jaxsi.stages.rows import rows
    from jaxsi.text.chat_config import written_thought

    assert args.responses is not None
    keys = {prompt.prompt.strip(): prompt.id for prompt in prompts}
    known = {prompt.id for prompt in prompts}
    found: dict[str, str] = {}
    for line, row in rows(args.responses):
        if not isinstance(row, Mapping):
            raise RecordError(args.responses, line, f"a row is a JSON object, found {row!r:.80}")
        text = row.get("response", row.get("text"))
        if not isinstance(text, str):
            raise RecordError(args.responses, line, 'no text under "response" or "text"')
        key = str(row["prompt_id"]) if "prompt_id" in row else keys.get(str(row.get("prompt", "")).strip())
        if key in found:
            raise RecordError(args.responses, line, f"a second response to prompt {key}; give one for each prompt")
        if key in known:
            assert key is not None
            found[key] = written_thought(text).answer
    if not found:
        raise RecordError(args.responses, None, f"no response to a prompt of {args.data}")
    return found


def _text(value: Mapping[str, Any]) -> str:
    rows = []
    for name in ("strict", "loose"):
        low, high = value[f"prompt_{name}_ci95"]
        rows.append(
            {
                "": name,
                "prompts": value[f"prompt_{name}"],
                "low": low,
                "high": high,
                "instructions": value[f"instruction_{name}"],
            }
        )
    kinds = [{"instruction": kind, **figures} for kind, figures in value["kinds"].items()]
    counts = f"{value['prompts']} prompts, {value['instructions']} instructions"
    if value["left_out"] or value["no_response"]:
        counts += f"; left out for want of data: {value['left_out']}; without a response: {value['no_response']}"
    return "\n\n".join([table(rows), table(kinds), counts])
