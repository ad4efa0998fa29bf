"""``jaxsi launch``: starts the processes of a run and watches them."""

import dataclasses
import sys
from typing import Annotated

import tyro

from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.distributed import split_at_dashes
from jaxsi.cli.supervisor import HEARTBEAT, Supervision, supervise

DESCRIPTION = """Runs a jaxsi command as N processes on one machine that work together. If one of them crashes, all are
started again and the run goes on where it stopped. Give the command after a bare --, without its "jaxsi"; every process
gets it with --distributed and --heartbeat added.

Examples:
  jaxsi launch local -n 1 --restarts 10 -- run configs/self_rewarding/toy.py
  jaxsi launch local -n 2 --devices 4 -- run configs/self_rewarding/toy.py --run-dir runs/two
  jaxsi launch local -n 2 --json -- run configs/self_rewarding/toy.py

One process drives all accelerators of its machine, so use -n 1 there. More processes are for CPUs, and for trying out
what several hosts will do. stdout is that of process 0; everything that the others print goes to stderr, after "[1] "
and so on. A wrong command line (exit code 2) is not repeated. SIGTERM is passed on: the processes save and stop, with
exit code 75."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    processes: Annotated[int, tyro.conf.arg(aliases=["-n"])]
    """the number of processes"""
    restarts: int = Supervision.restarts
    """how often all of them are started again; after 30 minutes without a crash the count starts anew"""
    backoff: float = Supervision.backoff
    """seconds before the first restart; each further restart waits twice as long, up to 300"""
    heartbeat: int = HEARTBEAT
    """seconds after which the others end if a process dies"""
    devices: int | None = None
    """fake CPU devices for each process, for trying things out"""


def local(argv: list[str]) -> Report:
    """Several processes on this machine."""
    words, rest = split_at_dashes(argv)
    options = parse(Local, words, "jaxsi launch local", DESCRIPTION)
    command = rest[1:]
    if not command:
        raise UsageError("give the command to run after --: jaxsi launch local -n 2 -- run CONFIG.py [options]")
    if command[0] == "launch":
        raise UsageError("launch cannot start another launch; give the command itself, as in: -- run CONFIG.py")
    try:
        supervision = Supervision(**dataclasses.asdict(options))
    except ValueError as error:
        raise UsageError(str(error)) from error
    before, after = split_at_dashes(command)
    command = [*before, "--distributed", "--heartbeat", f"{options.heartbeat}", *after]
    outcome = supervise([sys.executable, "-m", "jaxsi", *command], supervision)
    value = {
        "processes": supervision.processes,
        "restarts": outcome.restarts,
        "exit_codes": outcome.exit_codes,
        "seconds": outcome.seconds,
        "output": outcome.output,
    }
    return Report(value, outcome.output.removesuffix("\n"), outcome.code)
