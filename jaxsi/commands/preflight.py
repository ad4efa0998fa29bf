"""What can be refused before any work: a model, a mesh or prompts that do not fit one another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsi import hf, lm as lmlib, mesh as meshlib, model
from jaxsi.chat import render_prompt
from jaxsi.methods.self_rewarding import PromptFile
from jaxsi.records import Prompt, RecordError, read_jsonl, read_prompts
from jaxsi.tokenizer import Tokenizer, load_tokenizer


def check(cfg: Any, directory: Path) -> None:
    """Raises where a run of ``cfg`` in ``directory`` is bound to fail: no such model, a mesh that does not fit, lengths
    beyond the model's positions, an over-long prompt, fewer prompts than iterations that are left."""
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
        if train is not None and train.max_length > config.max_positions:
            raise ValueError(
                f"{name}.max_length is {train.max_length}, the model has {config.max_positions} positions; lower it"
            )
    _check_room("judge", cfg.judge.max_new_tokens, config.max_positions)
    if cfg.early_stop is not None:
        limit = config.max_positions - cfg.sampling.max_new_tokens
        why = f"{config.max_positions} positions less sampling.max_new_tokens"
        check_lengths("early_stop.prompts", cfg.early_stop.prompts(), load_tokenizer(folder), limit, why)
    if not isinstance(cfg.prompts, PromptFile):
        generator = cfg.prompts.generator
        writer = config if generator is None else hf.read_config(lmlib.resolve(generator))
        _check_room("prompts", cfg.prompts.max_new_tokens, writer.max_positions)
    else:
        prompts = read_prompts(cfg.prompts.path, cfg.prompts.max_prompts)
        _check_supply(cfg, directory, prompts)
        limit = min(config.max_positions - cfg.sampling.max_new_tokens, cfg.dpo.train.max_length - 1)
        why = (
            f"the model has {config.max_positions} positions, of which sampling.max_new_tokens takes "
            f"{cfg.sampling.max_new_tokens}, and dpo.train.max_length is {cfg.dpo.train.max_length}"
        )
        check_lengths(cfg.prompts.path, prompts, load_tokenizer(folder), limit, why)


def _check_room(name: str, max_new_tokens: int, max_positions: int) -> None:
    if max_new_tokens >= max_positions:
        raise ValueError(
            f"{name}.max_new_tokens is {max_new_tokens} of the model's {max_positions} positions, which leaves no room "
            "for a prompt; lower it"
        )


def _check_supply(cfg: Any, directory: Path, prompts: Sequence[Prompt]) -> None:
    """Every iteration that has no prompts yet needs one that no other has had."""
    files = [directory / f"iter_{t}" / "prompts.jsonl" for t in range(2, cfg.iterations + 1)]
    done = [file for file in files if file.exists()]
    used = {prompt.id for file in done for prompt in read_jsonl(file, Prompt)}
    left = sum(prompt.id not in used for prompt in prompts)
    rounds = len(files) - len(done)
    if left < rounds and not cfg.prompts.repeat:
        reason = f"{left} prompts for {rounds} iterations of new prompts" + (f" ({len(used)} are used)" if used else "")
        raise RecordError(cfg.prompts.path, None, f"{reason}; give more, lower iterations, or set prompts.repeat")


def check_lengths(path: Path | str, prompts: Sequence[Prompt], tokenizer: Tokenizer, limit: int, why: str) -> None:
    """Raises: RecordError naming the first prompt of a file that takes more than ``limit`` tokens."""
    for prompt in prompts:
        tokens = len(render_prompt(tokenizer, prompt.messages))
        if tokens > limit:
            reason = f"prompt {prompt.id!r} has {tokens} tokens, the limit is {limit} ({why})"
            raise RecordError(path, None, f"{reason}; shorten it, leave it out, or change these settings")
