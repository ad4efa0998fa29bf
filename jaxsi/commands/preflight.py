"""What can be refused before any work: a model, a mesh or prompts that do not fit one another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsi import hf, lm as lmlib, mesh as meshlib, model
from jaxsi.chat import render_prompt
from jaxsi.methods.self_rewarding import PromptFile
from jaxsi.records import Prompt, RecordError, read_prompts
from jaxsi.tokenizer import Tokenizer, load_tokenizer


def check(cfg: Any) -> None:
    """Raises where a run of ``cfg`` is bound to fail: no such model, a mesh that does not fit, an over-long prompt."""
    folder = lmlib.resolve(cfg.model)
    config = hf.read_config(folder)
    mesh = meshlib.make_mesh(cfg.mesh)
    model.weight_shardings(config, mesh)
    parts = meshlib.axis_size(mesh, "batch")
    for name, train in (("sft", cfg.sft), ("dpo.train", cfg.dpo.train)):
        if train is not None and train.batch_size // train.accumulate % parts:
            rows = train.batch_size // train.accumulate
            raise meshlib.MeshError(
                f"{name}.batch_size {train.batch_size} in accumulate = {train.accumulate} parts is {rows} rows at "
                f"once, which do not divide over {parts} devices (mesh axes data x fsdp); make it a multiple of "
                f"{parts * train.accumulate}, or choose another mesh"
            )
    if isinstance(cfg.prompts, PromptFile):
        prompts = read_prompts(cfg.prompts.path, cfg.prompts.max_prompts)
        rounds = cfg.iterations - 1
        if len(prompts) < rounds and not cfg.prompts.repeat:
            reason = f"{len(prompts)} prompts for {rounds} iterations of new prompts"
            raise RecordError(cfg.prompts.path, None, f"{reason}; give more, lower iterations, or set prompts.repeat")
        limit = min(config.max_positions - cfg.sampling.max_new_tokens, cfg.dpo.train.max_length - 1)
        why = (
            f"the model has {config.max_positions} positions, of which sampling.max_new_tokens takes "
            f"{cfg.sampling.max_new_tokens}, and dpo.train.max_length is {cfg.dpo.train.max_length}"
        )
        check_lengths(cfg.prompts.path, prompts, load_tokenizer(folder), limit, why)


def check_lengths(path: Path | str, prompts: Sequence[Prompt], tokenizer: Tokenizer, limit: int, why: str) -> None:
    """Raises: RecordError naming the first prompt of a file that takes more than ``limit`` tokens."""
    for prompt in prompts:
        tokens = len(render_prompt(tokenizer, prompt.messages))
        if tokens > limit:
            reason = f"prompt {prompt.id!r} has {tokens} tokens, the limit is {limit} ({why})"
            raise RecordError(path, None, f"{reason}; shorten it, leave it out, or change these settings")
