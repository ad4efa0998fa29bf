"""The command line: finds the command, reserves stdout for its result, and turns an error into one line and an exit
code."""

import contextlib
import importlib
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import IO

from jaxsi import __version__
from jaxsi.cli import compile_cache, distributed
from jaxsi.cli.command import EVERY_COMMAND, SCREEN, Report, UsageError
from jaxsi.runs import preemption, provenance
from jaxsi.runs.errors import InputError
from jaxsi.runs.progress import processes, say, stage_now

# command -> (module, function, summary). A module is imported only when its command runs.
COMMANDS = {
    "run": ("jaxsi.cli.run", "run", "run a config, or go on where the run stopped"),
    "status": ("jaxsi.cli.status", "status", "the finished and the remaining stages of a run directory"),
    "report": ("jaxsi.cli.report", "report", "one HTML page of runs: figures, plots and a browser of samples"),
    "generate": ("jaxsi.cli.generate", "generate", "sample responses to a file of prompts"),
    "judge": ("jaxsi.cli.judge", "judge", "judge responses with a model"),
    "sft": ("jaxsi.cli.train", "sft", "fine-tune a model on a file of demonstrations"),
    "dpo": ("jaxsi.cli.train", "dpo", "train a model on a file of preference pairs"),
    "reward": ("jaxsi.cli.train", "reward", "train a reward model on a file of preference pairs"),
    "rl": ("jaxsi.cli.rl", "rl", "reinforce a model by a reward model, or by a function of yours"),
    "pairs": ("jaxsi.cli.pairs", "pairs", "make preference pairs of responses and their judgments"),
    "chat": ("jaxsi.cli.chat", "chat", "talk to a model"),
    "improve srt": ("jaxsi.cli.improve", "srt", "refine a model's responses by its own feedback"),
    "improve seft": ("jaxsi.cli.improve", "seft", "revise a model's responses with a reviser"),
    "improve pit": ("jaxsi.cli.improve", "pit", "improve a model's responses with an improver"),
    "improve self-refine": ("jaxsi.cli.improve", "refine", "ask a model for feedback and for better responses"),
    "improve best-of-n": ("jaxsi.cli.improve", "best", "take the best of several responses"),
    "eval toy": ("jaxsi.cli.eval", "toy", "exact quality on the embedded world"),
    "eval agreement": ("jaxsi.cli.agreement", "agreement", "how well a judge agrees with people"),
    "eval mt-bench": ("jaxsi.cli.mt_bench", "mtbench", "MT-Bench: answers, judgments, scores"),
    "eval arena-hard": ("jaxsi.cli.arena_hard", "arena", "Arena-Hard: answers, judgments, scores"),
    "eval ifeval": ("jaxsi.cli.ifeval", "ifeval", "instruction following that programs check"),
    "eval lm-eval": ("jaxsi.cli.lm_eval", "harness", "tasks of lm-evaluation-harness"),
    "eval alpaca-eval": ("jaxsi.cli.eval_alpaca", "alpaca", "AlpacaEval 2.0, raw and length-controlled"),
    "eval compare": ("jaxsi.cli.eval_compare", "compare", "one model against another, by a judge in both orders"),
    "launch local": ("jaxsi.cli.launch", "local", "start several processes as one run, and restart them after a crash"),
    "export": ("jaxsi.cli.export", "export", "write a Hugging Face folder"),
    "plan": ("jaxsi.cli.plan", "plan", "memory, time and chip-hours of a config on hardware that you do not have"),
    "bench generate": ("jaxsi.cli.bench", "generate", "speed of generation"),
    "bench score": ("jaxsi.cli.bench", "score", "speed of scoring"),
    "bench train": ("jaxsi.cli.bench", "train", "speed of training"),
    "bench methods": ("jaxsi.cli.bench", "methods", "compare all methods on the embedded world"),
}

EXAMPLES = """Examples:
  jaxsi run configs/self_rewarding/toy.py
  jaxsi status runs/toy
  jaxsi report runs/toy
  jaxsi eval toy runs/toy@2 --json
  jaxsi generate Qwen/Qwen3-0.6B --prompts prompts.jsonl -o responses.jsonl

MODEL is a Hugging Face folder or hub name, a .gguf file, a jaxsi checkpoint, a run directory (its newest complete
iteration, or the one that its method found best), or RUN_DIR@t (its iteration t)."""

FAILURE, USAGE, STOPPED, INTERRUPTED = 1, 2, 75, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 for a failure, 2 for wrong usage, 75 when stopped by SIGTERM,
    130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    words, rest = distributed.split_at_dashes(argv)
    as_json, debug = "--json" in words, "--debug" in words
    argv = [word for word in words if word not in ("--json", "--debug")] + rest
    if argv == ["--version"]:
        print(f"jaxsi {__version__}")
        return 0
    if argv and argv[0] in ("-h", "--help"):
        print(_overview(COMMANDS))
        return 0
    try:
        joining = None
        if _command(argv) != "launch local":  # it has its own --heartbeat, for the processes that it starts
            joining, argv = distributed.take_options(argv)
        if not argv:
            print(_overview(COMMANDS))
            return USAGE
        if (name := _command(argv)) is None:
            return _unknown(argv)
        provenance.COMMAND.set(shlex.join(["jaxsi", *words, *rest]))
        with preemption.listening():
            return _run_command(name, argv[len(name.split()) :], joining, as_json)
    except SystemExit as stop:  # from the parser: 0 after --help, 2 for a wrong command line
        code = stop.code if isinstance(stop.code, int) else USAGE
        return distributed.leave(code) if code else 0
    except preemption.Stopped as stop:  # on all processes at the same time: they leave together
        if processes()[0] == 0:
            print(f"jaxsi: stopped by SIGTERM; {stop}, and the same command goes on from there", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("jaxsi: interrupted; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        return distributed.leave(INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"jaxsi: {distributed.process_prefix()}error: {_message(error)}", file=sys.stderr)
        return distributed.leave(_exit_code(error))


def _run_command(name: str, argv: list[str], joining: distributed.Options | None, as_json: bool) -> int:
    _quiet_libraries()
    module, function, _ = COMMANDS[name]
    with contextlib.ExitStack() as stack:
        wants_help = bool({"-h", "--help"} & set(distributed.split_at_dashes(argv)[0]))
        stdout = sys.stdout if wants_help else stack.enter_context(_result_only_on_stdout())
        if joining is not None and not wants_help:
            distributed.join(joining)
        elif not wants_help:  # several processes need a shared folder, which only the user can choose
            compile_cache.keep_programs()
        stack.enter_context(_plain_warnings())
        SCREEN.set(sys.stderr if as_json else stdout)
        report: Report = getattr(importlib.import_module(module), function)(argv)
        text = json.dumps(report.value, allow_nan=False) if as_json else report.text
        if processes()[0] == 0 and (text or as_json):
            print(text, file=stdout, flush=True)
    return report.exit_code


def _command(argv: list[str]) -> str | None:
    return next((name for name in COMMANDS if argv[: len(name.split())] == name.split()), None)


def _unknown(argv: list[str]) -> int:
    """Shows the commands below a word (`jaxsi eval --help`); anything else is an error."""
    below = {name: entry for name, entry in COMMANDS.items() if name.split()[0] == argv[0]}
    if below and argv[1:] and argv[1] in ("-h", "--help"):
        print(_overview(below))
        return 0
    name = " ".join(argv[: 2 if below else 1])
    print(f"jaxsi: error: unknown command {name!r}; the commands are {', '.join(below or COMMANDS)}", file=sys.stderr)
    return USAGE


def _overview(commands: dict[str, tuple[str, str, str]]) -> str:
    width = max(len(name) for name in commands)
    lines = [f"  {name.ljust(width)}  {summary}" for name, (_, _, summary) in commands.items()]
    head = [
        "usage: jaxsi COMMAND ...",
        "",
        f"jaxsi {__version__}: language models that improve themselves, in JAX.",
        "",
    ]
    return "\n".join(
        [*head, "Commands:", *lines, "", "jaxsi COMMAND --help shows a command's options.", EVERY_COMMAND, "", EXAMPLES]
    )


def _exit_code(error: Exception) -> int:
    """USAGE if the same command is bound to fail again, else FAILURE. A disk error may pass, but not a missing file."""
    if isinstance(error, UsageError):
        return USAGE
    disk = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)
    wrong_input = isinstance(error, InputError) and not error.transient
    return USAGE if wrong_input and not disk else FAILURE


def _message(error: Exception) -> str:
    """The message to print. Our own errors and those about values and files explain themselves; any other needs its
    type."""
    ours = type(error).__module__.split(".")[0] == "jaxsi"
    if ours or type(error) is ValueError or isinstance(error, OSError):
        return str(error)
    if "RESOURCE_EXHAUSTED" in str(error):
        first = str(error).splitlines()[0]
        return f"the device has too little memory ({first}); lower the batch size, or use more devices"
    return f"{type(error).__name__}: {error} (--debug shows where)"


def _quiet_libraries() -> None:
    """Turns off the banners of libraries by variables that they read once, on import."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


class _Warnings(logging.Handler):
    """Prints a warning of this package as one line that says where it arose: "jaxsi: iter_2/pairs: ..."."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message, place = record.getMessage(), f"{stage_now()}: " if stage_now() else ""
            say(f"jaxsi: {place}{'' if message.startswith('alarm: ') else 'warning: '}{message}")
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Meanwhile the warnings of this package are plain lines, whatever handlers other libraries have installed."""
    log, handler = logging.getLogger("jaxsi"), _Warnings(logging.WARNING)
    before = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before


@contextlib.contextmanager
def _result_only_on_stdout() -> Iterator[IO[str]]:
    """Yields stdout for the result. Meanwhile everything that a library prints, in Python or in C, goes to stderr."""
    stdout = sys.stdout
    with contextlib.ExitStack() as stack:
        # In tests and notebooks stdout is captured and may have no file descriptor.
        with contextlib.suppress(OSError, AttributeError):
            if stdout.fileno() == 1:
                stdout.flush()
                copy = os.dup(1)
                os.dup2(2, 1)
                stdout = stack.enter_context(os.fdopen(copy, "w", encoding="utf-8"))
                stack.callback(os.dup2, copy, 1)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield stdout
