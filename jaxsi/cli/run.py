"""``jaxsi run``: runs a config file, with the fields that the command line changes, in a run directory."""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsi.cli.command import EVERY_COMMAND, Report, UsageError
from jaxsi.cli.judges import JUDGES, with_judges
from jaxsi.cli.tables import iterations_table

DESCRIPTION = f"""Runs the config, or goes on where the same command stopped earlier; a finished run does nothing.

Examples:
  jaxsi run configs/self_rewarding/toy.py
  jaxsi run configs/self_rewarding/toy.py --seed 1 --run-dir runs/toy-1
  jaxsi run configs/self_rewarding/toy.py --dpo.learning-rate 5e-7 --run-dir runs/slow
  jaxsi run configs/self_rewarding/toy.py --track tensorboard
  jaxsi run configs/self_rewarding/qwen3_0p6b_1gpu.py --model FOLDER --prompts prompts.jsonl --max-prompts 64

CONFIG.py is a Python file with a function config(). Numbers, texts and switches of the config are options. For a nested
field the first and the last name are enough if only one field fits: --dpo.learning-rate. Further options:
  --prompts FILE      prompts from this file or data set (rows with "prompt" or "messages") in place of the config's
  --max-prompts N     only the first N prompts of that file
  --column prompt=X   the column that has the prompt, if it has another name
  --split NAME        the split of a data set that has several; train by default
  --skip-bad-rows     leave out rows that cannot be read, and count them, in place of an error
  --judging JUDGE     who judges, in Self- and Meta-Rewarding; scores, in SRT's second stage; chooses, in SEFT's
                      internal rounds; rewards, in PIT
  --rubric RUBRIC     what the judge goes by
  --critic CRITIC     SRT's critic: model:, endpoint: or function: as for a judge
  --run-dir DIR       where the run lives; runs/<name of the config> by default
  --track TRACKER     show the run in tensorboard, trackio or wandb as well; may be given several times. A run that has
                      ended is sent as a whole

{JUDGES}

{EVERY_COMMAND}"""


def run(argv: list[str]) -> Report:
    """Runs a config file."""
    path, options, overrides = _split(argv)
    if path is None:
        if any(word in ("-h", "--help") for word in argv):
            print(
                f"usage: jaxsi run CONFIG.py [options]\n\n{DESCRIPTION}\n\njaxsi run CONFIG.py --help lists the fields."
            )
            raise SystemExit(0)
        raise UsageError("give a config first: jaxsi run CONFIG.py [options]")
    directory = Path(options.run_dir or Path("runs") / path.stem)
    cfg = with_judges(
        configure(path, overrides, **prompt_fields(options)),
        directory,
        judging=options.judging,
        rubric=options.rubric,
        critic=options.critic,
    )
    return run_config(cfg, directory, track=options.track)


def run_config(cfg: Any, directory: Path, *, track: Sequence[str] = ()) -> Report:
    """Runs ``cfg`` in ``directory``, unless the run is complete already, and reports its summary. ``track``: names of
    trackers. Raises: UsageError if one is not installed."""
    from jaxsi.methods.start import finish
    from jaxsi.report.trackers import TrackerError, check, following
    from jaxsi.runs.status import read_summary

    try:
        check(track)
    except TrackerError as error:
        raise UsageError(str(error)) from None
    began = time.monotonic()
    with following(directory, track):
        nothing_left = finish(cfg, directory) is None
    summary, seconds = read_summary(directory), round(time.monotonic() - began, 3)
    state = "complete, nothing left to do" if nothing_left else f"complete after {seconds:.0f} s"
    value = {"run_dir": str(directory), "already_complete": nothing_left, "seconds": seconds, **summary}
    return Report(value, f"{directory}: {state}\n\n{iterations_table(summary)}")


def prompt_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of a PromptFile that the command line names."""
    given = {
        "path": options.prompts,
        "max_prompts": options.max_prompts,
        "columns": tuple(options.column) or None,
        "split": options.split,
        "skip_bad_rows": options.skip_bad_rows or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def configure(file: Path, overrides: list[str], **prompts: Any) -> Any:
    """The config of a file, with the fields that the command line changes; ``prompts`` are fields of its PromptFile.

    Raises: UsageError if the file is not a config, or if the config refuses a value. SystemExit for wrong flags.
    """
    import tyro

    from jaxsi.runs.config_file import ConfigFileError, load_config

    try:
        cfg = _with_prompts(load_config(file), prompts)
    except ConfigFileError as error:
        raise UsageError(str(error)) from error
    flags = field_flags(cfg)
    try:
        return tyro.cli(
            type(cfg), default=cfg, args=[_full_flag(word, flags) for word in overrides],
            prog=f"jaxsi run {file}", description=DESCRIPTION,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed),
        )  # fmt: skip
    except ValueError as error:  # a config's own check of its values
        raise UsageError(str(error)) from error


def field_flags(cfg: Any, prefix: str = "--") -> list[str]:
    """The flags of a config's fields, down to those that are not configs: --sft.optim.learning-rate, ..."""
    flags = []
    for field in dataclasses.fields(cfg):
        value, flag = getattr(cfg, field.name), prefix + field.name.replace("_", "-")
        flags += field_flags(value, f"{flag}.") if dataclasses.is_dataclass(value) else [flag]
    return flags


def _full_flag(word: str, flags: list[str]) -> str:
    """`--dpo.learning-rate` -> `--dpo.train.optim.learning-rate`, if only one field fits."""
    short, equals, value = word.partition("=")
    parts = short.split(".")
    if not short.startswith("--") or short in flags or len(parts) < 2:
        return word
    fitting = [flag for flag in flags if flag.split(".")[0] == parts[0] and flag.split(".")[-1] == parts[-1]]
    fitting = [flag for flag in fitting if _is_subsequence(parts, flag.split("."))]
    if len(fitting) > 1:
        raise UsageError(f"{short} fits several fields; write one of {', '.join(fitting)}")
    return fitting[0] + equals + value if fitting else word


def _is_subsequence(parts: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(part in rest for part in parts)


def _split(argv: list[str]) -> tuple[Path | None, argparse.Namespace, list[str]]:
    """(path of the config, the command's own options, the other words: fields of the config)."""
    place = next((i for i, word in enumerate(argv) if word.endswith(".py")), None)
    if argv and not argv[0].startswith("-"):
        place = 0
    rest = [word for i, word in enumerate(argv) if i != place]
    parser = argparse.ArgumentParser(
        prog="jaxsi run", usage="jaxsi run CONFIG.py [options]", add_help=False, allow_abbrev=False
    )
    for name in ("--prompts", "--run-dir", "--judging", "--rubric", "--critic"):
        parser.add_argument(name)
    parser.add_argument("--max-prompts", type=int)
    parser.add_argument("--column", action="append", default=[])
    parser.add_argument("--track", action="append", default=[])
    parser.add_argument("--split")
    parser.add_argument("--skip-bad-rows", action="store_true")
    options, overrides = parser.parse_known_args(rest)
    return None if place is None else Path(argv[place]), options, overrides


def _with_prompts(cfg: Any, fields: dict[str, Any]) -> Any:
    from jaxsi.stages.self_instruct import PromptFile

    if not fields:
        return cfg
    if "prompts" not in {field.name for field in dataclasses.fields(cfg)}:
        raise UsageError("--prompts and the like: this method's prompts come with its data; change the config file")
    if fields.get("max_prompts", 1) < 1:
        raise UsageError(f"--max-prompts is {fields['max_prompts']}; it is at least 1")
    if "path" not in fields and not isinstance(cfg.prompts, PromptFile):
        option = "--" + next(iter(fields)).replace("_", "-").replace("columns", "column")
        raise UsageError(f"{option} needs a file of prompts, and this config has none: give --prompts FILE as well")
    try:
        return dataclasses.replace(
            cfg, prompts=PromptFile(**fields) if "path" in fields else dataclasses.replace(cfg.prompts, **fields)
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
