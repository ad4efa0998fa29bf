"""``jaxsi generate``: samples responses to a file of prompts."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from jaxsi.cli.arguments import ChatOptions, Dtype, KVCache, Model, Out, PromptOptions
from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.output_file import Parts, chat_of, check_out, digest, dtype_of, write_in_parts
from jaxsi.cli.stored import Mesh, mesh_for
from jaxsi.cli.tables import figures_table

DESCRIPTION = """Samples responses to the prompts of a file (rows with "prompt" or "messages", and optionally "id").
Finished parts wait in OUT.shards/ until OUT is complete. If the command is killed, run it again: it goes on from there.

Examples:
  jaxsi generate runs/toy@3 --prompts prompts.jsonl -o responses.jsonl --num-samples 4
  jaxsi generate Qwen/Qwen3-0.6B --prompts prompts.jsonl -o out.jsonl --temperature 0 --max-new-tokens 512"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(PromptOptions, ChatOptions):
    model: Model
    out: Out
    """The responses, one JSON object per line."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    num_samples: int = 1
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.9
    top_k: int = 0
    """0 is off."""
    max_new_tokens: int = 256
    seed: int = 0
    dtype: Dtype = "auto"
    """Of the computation. auto: bfloat16 if this device computes in it at speed, else float32. A command that goes on
    keeps the dtype with which it began."""
    batch_size: int = 64
    """Rows generated at the same time. In float32 it does not change the responses; in bfloat16 it changes them, but
    not their distribution."""
    cache: KVCache = "exact"
    """Keys and values: exact in --dtype; or int8, which takes half the memory of bfloat16 and changes the responses."""
    mesh: Mesh = Mesh()


def generate(argv: list[str]) -> Report:
    """Samples responses to a file of prompts."""
    args = parse(Generate, argv, "jaxsi generate", DESCRIPTION)
    check_out(args.out, args.prompts, overwrite=args.overwrite)
    from jaxsi.lm import load
    from jaxsi.methods.preflight import check_lengths
    from jaxsi.runs.records import Prompt, Response
    from jaxsi.sampling.generate import SamplingConfig, generate as sample

    prompts = args.read()
    settings: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("num_samples", "temperature", "top_p", "top_k", "max_new_tokens", "batch_size", "cache")
    }
    try:
        SamplingConfig(**settings, dtype=args.dtype)
    except ValueError as error:
        raise UsageError(str(error)) from error
    dtype = dtype_of(args.out, args.dtype)
    lm = load(args.model, mesh_for(args.model, args.mesh), dtype, chat=args.model_chat)
    limit = lm.config.max_positions - args.max_new_tokens
    why = f"the model has {lm.config.max_positions} positions, and --max-new-tokens takes {args.max_new_tokens} of them"
    check_lengths(args.prompts, prompts, lm.tokenizer, limit, why, args.reading)
    start = time.monotonic()
    sampled = 0  # tokens sampled by this command; an earlier one may have left finished parts

    def sample_part(part: Sequence[Prompt]) -> list[Response]:
        nonlocal sampled
        responses = sample(lm, part, seed=args.seed, **settings)
        sampled += sum(len(response.token_ids) for response in responses)
        return responses

    parts = Parts(
        prompts=digest(prompts, "records"),
        responses=None,
        model=lm.fingerprint,
        settings=settings | {"dtype": dtype} | chat_of(lm),
        seed=args.seed,
    )
    responses = write_in_parts(args.out, parts, prompts, sample_part, Response, by=lm)
    seconds = time.monotonic() - start
    tokens = sum(len(response.token_ids) for response in responses)
    value = {
        "out": str(args.out),
        "prompts": len(prompts),
        "responses": len(responses),
        "tokens": tokens,
        "mean_length": tokens / len(responses),
        "cut_off": sum(response.finish_reason == "length" for response in responses),
        "seconds": round(seconds, 3),
        "tokens_per_second": sampled / seconds,
    }
    return Report(value, figures_table(value))
