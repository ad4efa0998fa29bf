"""What can be refused before any work: a model, a mesh or prompts that do not fit one another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxsi.hf.config import read_config
from jaxsi.lm import resolve
from jaxsi.methods.cream import Config as CREAM
from jaxsi.methods.meta_rewarding import Config as MetaRewarding
from jaxsi.methods.seft import Config as SEFT, Round
from jaxsi.methods.self_rewarding import Config as SelfRewarding
from jaxsi.methods.srt import FirstStage
from jaxsi.methods.temporal import Config as Temporal
from jaxsi.model import decoder, mesh as meshlib
from jaxsi.model.decoder import ModelConfig
from jaxsi.runs.config_snapshot import parts_of
from jaxsi.runs.errors import InputError
from jaxsi.runs.records import Prompt, RecordError, read_jsonl
from jaxsi.sampling.generate import SamplingConfig
from jaxsi.stages.critique import CritiqueConfig
from jaxsi.stages.early_stop import EarlyStop
from jaxsi.stages.endpoint import EndpointJudge
from jaxsi.stages.judge import judge
from jaxsi.stages.judges import ModelJudge, RewardJudge
from jaxsi.stages.meta_judge import compare_judgments
from jaxsi.stages.reviser import ReviseConfig
from jaxsi.stages.self_instruct import (
    PromptFile,
    PromptList,
    SelfInstruct,
    check_used,
    read_source,
    without_used,
)
from jaxsi.stages.user_data import columns_of, place_of
from jaxsi.stages.verdicts import JudgeConfig
from jaxsi.text.chat import render_prompt
from jaxsi.text.chat_template import ChatTemplateError
from jaxsi.text.tokenizer import Tokenizer, load_tokenizer
from jaxsi.training.rl import RLConfig
from jaxsi.training.train import TrainConfig

# The first iteration with prompts of its own, of the methods that divide the prompts among iterations.
FIRST_WITH_PROMPTS: dict[type, int] = {SelfRewarding: 2, MetaRewarding: 2, CREAM: 2, Temporal: 2, SEFT: 1}


@runtime_checkable
class NeedsInstalled(Protocol):
    """A part of a config, such as an evaluation, that says before any work what it misses on this machine."""

    def check_installed(self) -> None: ...


class PreflightError(InputError, ValueError):
    """Settings that the model has no room for."""


def check(cfg: Any, directory: Path) -> None:
    """Raises if a run of ``cfg`` in ``directory`` is bound to fail: no such model, a mesh that does not fit, lengths
    beyond the model's positions, a prompt that is too long or that the chat template refuses, used prompts that are
    gone from their file, fewer prompts than iterations that are left.

    ``cfg`` is the Config of any method: its parts are known by their types.
    """
    folder = resolve(cfg.model)
    config = read_config(folder)
    mesh = meshlib.make_mesh(cfg.mesh)
    decoder.weight_shardings(config, mesh)
    parts = dict(parts_of(cfg))
    for name, part in parts.items():
        match part:
            case TrainConfig() | RLConfig():
                part.check(mesh, name)
                longest = part.max_length if isinstance(part, TrainConfig) else part.max_new_tokens + 1
                what = "max_length" if isinstance(part, TrainConfig) else "max_new_tokens"
                if longest > config.max_positions:
                    raise PreflightError(
                        f"{name}.{what} is {getattr(part, what)}, the model has {config.max_positions} positions; "
                        "lower it"
                    )
            case SelfInstruct():
                writer = config if part.generator is None else read_config(resolve(part.generator))
                _check_room(name, part.max_new_tokens, writer.max_positions)
            case FirstStage() if part.drafts is not None:
                writer = read_config(resolve(part.drafts))
                _check_room("sampling", cfg.sampling.max_new_tokens, writer.max_positions)
            case Round():
                lent = {"sampling": (part.drafts, cfg.sampling), "reviser.writing": (part.reviser, cfg.reviser.writing)}
                for setting, (path, settings) in lent.items():
                    if path is not None:
                        _check_room(setting, settings.max_new_tokens, read_config(resolve(path)).max_positions)
            case SamplingConfig() | CritiqueConfig() | ReviseConfig():
                _check_room(name, part.max_new_tokens, config.max_positions)
            case NeedsInstalled():
                part.check_installed()
            case RewardJudge() if not read_config(resolve(part.model)).scalar_head:
                raise PreflightError(f"{name}: {part.model} has no scalar head; give a reward model")
    for name, part in {"": cfg, **parts}.items():
        if isinstance(settings := getattr(part, "judge", None), JudgeConfig):
            _check_judge(f"{name}.judge".lstrip("."), getattr(part, "judging", None), settings, config)
    if isinstance(stop := parts.get("early_stop"), EarlyStop):
        limit = config.max_positions - cfg.sampling.max_new_tokens
        why = f"{config.max_positions} positions less sampling.max_new_tokens"
        kept = directory / "iter_0" / "early_stop_prompts.jsonl"
        prompts = read_jsonl(kept, Prompt) if kept.exists() else stop.prompts()
        check_lengths("early_stop.prompts", prompts, load_tokenizer(folder), limit, why)
    source = parts.get("prompts")
    if isinstance(source, PromptFile | PromptList):
        prompts, place = read_source(source), source.path if isinstance(source, PromptFile) else "prompts"
        repeat = isinstance(source, PromptFile) and source.repeat
        if isinstance(source, PromptFile):
            files = sorted(directory.glob("iter_*/prompts.jsonl"))
            check_used(source, prompts, [prompt for file in files for prompt in read_jsonl(file, Prompt)])
        first = FIRST_WITH_PROMPTS.get(type(cfg))
        if first is not None and not repeat:
            _check_supply(place, prompts, directory, range(first, cfg.iterations + 1))
        limit, why = config.max_positions - 1, f"the model has {config.max_positions} positions"
        if isinstance(sampling := parts.get("sampling"), SamplingConfig):
            limit = config.max_positions - sampling.max_new_tokens
            why += f", of which sampling.max_new_tokens takes {sampling.max_new_tokens}"
        rows = {f"{name}.max_length": p.max_length for name, p in parts.items() if isinstance(p, TrainConfig)}
        if rows:
            shortest = min(rows, key=rows.__getitem__)
            limit, why = min(limit, rows[shortest] - 1), f"{why}, and {shortest} is {rows[shortest]}"
        reading = None
        if isinstance(source, PromptFile):
            reading = {"columns": columns_of(source.columns), "split": source.split}
        check_lengths(place, prompts, load_tokenizer(folder), limit, why, reading)


def _check_judge(name: str, judging: Any, settings: JudgeConfig, config: ModelConfig) -> None:
    """Checks the settings of a judge against who judges: the run's model, another one, or an endpoint."""
    if isinstance(judging, EndpointJudge) and settings.expected:
        raise PreflightError(f"{name}.expected is on, but {judging.model} at an endpoint gives no expected scores")
    if isinstance(judging, ModelJudge):
        config = read_config(resolve(judging.model))
        if config.scalar_head:
            raise PreflightError(
                f"{judging.model} is a reward model, which writes no judgments; name it as reward:MODEL"
            )
    if judging in (judge, compare_judgments) or isinstance(judging, ModelJudge):
        _check_room(name, settings.max_new_tokens, config.max_positions)


def _check_room(name: str, max_new_tokens: int, max_positions: int) -> None:
    if max_new_tokens >= max_positions:
        raise PreflightError(
            f"{name}.max_new_tokens is {max_new_tokens} of the model's {max_positions} positions, which leaves no room "
            "for a prompt; lower it"
        )


def _check_supply(place: str, prompts: Sequence[Prompt], directory: Path, iterations: range) -> None:
    """Every iteration that has no prompts yet needs one that no other has had."""
    files = [directory / f"iter_{t}" / "prompts.jsonl" for t in iterations]
    done = [file for file in files if file.exists()]
    used = [prompt for file in done for prompt in read_jsonl(file, Prompt)]
    left = len(without_used(prompts, used))
    rounds = len(files) - len(done)
    if left < rounds:
        reason = f"{left} prompts for {rounds} iterations of new prompts" + (f" ({len(used)} are used)" if used else "")
        raise RecordError(place, None, f"{reason}; give more, lower iterations, or set repeat of a PromptFile")


def check_lengths(
    path: Path | str,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    limit: int | None,
    why: str,
    reading: Mapping[str, Any] | None = None,
) -> None:
    """Raises: RecordError naming file, line and id of the first prompt that the chat template refuses, or that takes
    more than ``limit`` tokens.

    Args:
      reading: how the file was read, as in `user_data.read_prompts`; None: ``path`` is not a file.
    """

    def refused(prompt: Prompt, reason: str) -> RecordError:
        line = None if reading is None else place_of(path, prompt.id, **reading)
        return RecordError(path, line, f"prompt {prompt.id!r}{reason}")

    for prompt in prompts:
        try:
            tokens = len(render_prompt(tokenizer, prompt.messages))
        except ChatTemplateError as error:
            raise refused(prompt, f": {error}") from error
        if limit is not None and tokens > limit:
            reason = f" has {tokens} tokens, the limit is {limit} ({why})"
            raise refused(prompt, f"{reason}; shorten it, leave it out, or change these settings")
