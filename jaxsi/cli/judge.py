"""``jaxsi judge``: lets a model judge a file of responses."""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsi.cli.arguments import ChatOptions, Dtype, Model, Out, PromptOptions
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.judges import JUDGES, judge_of, rubric_for
from jaxsi.cli.output_file import Parts, chat_of, check_out, digest, dtype_of, write_in_parts
from jaxsi.cli.stored import Mesh, mesh_for
from jaxsi.cli.tables import figures_table
from jaxsi.runs.config_snapshot import describe_config

DESCRIPTION = f"""Lets MODEL judge responses (a file that `jaxsi generate` wrote): a justification and a score, several
times for each response. Finished parts wait in OUT.shards/ until OUT is complete. If the command is killed, run it
again: it goes on from there. MODEL may be another judge.

{JUDGES}

Examples:
  jaxsi judge runs/toy@3 --responses responses.jsonl --prompts prompts.jsonl -o judgments.jsonl
  jaxsi judge MODEL --responses responses.jsonl --prompts prompts.jsonl -o judgments.jsonl --expected
  jaxsi judge endpoint:gpt-4o-mini --rubric pairwise_judge --responses responses.jsonl --prompts prompts.jsonl -o j
  jaxsi judge verifier:gsm8k.jsonl,prompt=question --responses responses.jsonl --prompts gsm8k.jsonl -o j.jsonl"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(PromptOptions, ChatOptions):
    model: Model
    responses: Path
    """Responses in the format of `jaxsi generate`."""
    out: Out
    """The judgments, one JSON object per line."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    rubric: str | None = None
    """The name of a shipped rubric, or a file. Default: the rubric of MODEL's run if it has one, else
    self_rewarding_judge."""
    num_samples: int = 3
    """Judgments of each response; the score is the mean of the valid ones."""
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256
    expected: bool = False
    """Score by the expectation over all possible scores instead of the number that the judge wrote."""
    seed: int = 0
    dtype: Dtype = "auto"
    """Of the computation. auto: bfloat16 if this device computes in it at speed, else float32. A command that goes on
    keeps the dtype with which it began."""
    mesh: Mesh = Mesh()


def judge(argv: list[str]) -> Report:
    """Judges responses."""
    args = parse(Judge, argv, "jaxsi judge", DESCRIPTION)
    check_out(args.out, args.prompts, args.responses, overwrite=args.overwrite)
    import jax

    from jaxsi.runs.records import Judgment, RecordError, Response, read_jsonl
    from jaxsi.stages.answers import answers
    from jaxsi.stages.judge import judgment_statistics
    from jaxsi.stages.prompts import Rubric

    config = _judge_config(args)
    prompts = args.read()
    responses = read_jsonl(args.responses, Response, fill=plain_response)
    known = {prompt.id for prompt in prompts}
    for line, response in enumerate(responses, start=1):
        if response.prompt_id not in known:
            raise RecordError(
                args.responses, line, f"prompt {response.prompt_id!r} is not in {args.prompts}; give the file it is in"
            )
    if not responses:
        raise RecordError(args.responses, None, "no responses in this file; jaxsi generate writes them")
    rubric = rubric_for(args.rubric, args.model)
    judging = judge_of(args.model, cache=args.out.with_name(f"{args.out.name}.answers.jsonl"))
    judge_texts, lm, dtype = _bound(args, judging)
    start = time.monotonic()
    parts = Parts(
        prompts=digest(prompts, "records"),
        responses=digest(responses, "records"),
        model=_identity(judging) if lm is None else lm.fingerprint,
        settings={"rubric": rubric, "judge": config, "dtype": dtype} | ({} if lm is None else chat_of(lm)),
        seed=args.seed,
    )

    def judge_part(part: Sequence[Response]) -> list[Judgment]:
        return judge_texts(prompts, part, rubric, config, jax.random.key(args.seed))

    def judge_groups(part: Sequence[Any]) -> list[Judgment]:
        return judge_part([response for group in part for response in group.responses])

    if isinstance(rubric, Rubric):
        judgments = write_in_parts(args.out, parts, responses, judge_part, Judgment, by=lm)
    else:  # the responses to a prompt are judged together
        judgments = write_in_parts(args.out, parts, answers(prompts, responses), judge_groups, Judgment, by=lm)
    statistics = judgment_statistics(judgments, rubric)
    seconds = round(time.monotonic() - start, 3)
    value = {"out": str(args.out), "rubric": rubric.name, **statistics, "seconds": seconds}
    if statistics["unscored"] == len(judgments):
        value["warning"] = (
            "no score could be read: this model writes no scores under this rubric; try --expected, which reads "
            "probabilities, or raise --max-new-tokens"
        )
    return Report(value, figures_table({name: figure for name, figure in value.items() if name != "histogram"}))


def _bound(args: Judge, judging: Any) -> tuple[Any, Any, str | None]:
    """The judge as a function of (prompts, responses, rubric, config, key); its model and the dtype of that, both None
    for a judge without a model of this process."""
    from jaxsi.lm import load
    from jaxsi.stages.judge import judge as by_itself
    from jaxsi.stages.judges import ModelJudge, RewardJudge, rewarded

    if judging is by_itself:
        raise UsageError("self: here MODEL is the judge; name a model, or a judge of another kind")
    if not isinstance(judging, ModelJudge | RewardJudge):
        return functools.partial(judging, None), None, None
    dtype = dtype_of(args.out, args.dtype)
    lm = load(judging.model, mesh_for(judging.model, args.mesh), dtype, chat=args.model_chat)
    if isinstance(judging, ModelJudge):
        return functools.partial(by_itself, lm), lm, dtype
    return functools.partial(rewarded, lm, None, batch_size=judging.batch_size), lm, dtype


def _identity(judging: Any) -> str:
    """What a judge without a model of this process is, as a text."""
    from jaxsi.stages.endpoint import EndpointJudge

    return judging.model if isinstance(judging, EndpointJudge) else json.dumps(describe_config(judging))


def plain_response(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a response that was not sampled by jaxsi: {"prompt_id", "text"}, and "id" if it has one."""
    if "prompt_id" not in row or "token_ids" in row:
        return row
    number = row.get("sample", 0)
    defaults = {"id": f"{row['prompt_id']}#{number}", "sample": number, "token_ids": [], "logps": []}
    return defaults | {"finish_reason": "stop", "fingerprint": "", "template": ""} | row


def _judge_config(args: Judge) -> Any:
    from jaxsi.stages.judge import JudgeConfig

    try:
        return JudgeConfig(
            num_samples=args.num_samples,
            temperature=args.temperature,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
            expected=args.expected,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
