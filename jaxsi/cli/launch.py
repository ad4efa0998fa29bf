"""``jaxsi launch``: the processes of a run, started and watched."""

import dataclasses
import sys
from typing import Annotated

import tyro

from jaxsi.cli.command import Report, UsageError, parse
from jaxsi.cli.supervisor import HEARTBEAT, Supervision, supervise

DESCRIPTION = """Runs a command of jaxsi as N processes of one machine that work as one, and starts all of them again
when one crashes; the run then goes on where it was. Give the command behind a bare --, without its "jaxsi"; every
process gets it with --distributed and --heartbeat.

Examples:
  jaxsi launch local -n 1 --restarts 10 -- run configs/self_rewarding/toy.py
  jaxsi launch local -n 2 --devices 4 -- run configs/self_rewarding/toy.py --run-dir runs/two
  jaxsi launch local -n 2 --json -- run configs/self_rewarding/toy.py

One process drives all accelerators of its machine: -n 1 is for those, more are for CPUs, and to try out what several
hosts will do. stdout is that of process 0; of the others everything goes to stderr, behind "[1] " and so on.
Wrong usage (exit code 2) is not tried again. SIGTERM is passed on: the processes save and stop, exit code 75."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    processes: Annotated[int, tyro.conf.arg(aliases=["-n"])]
    """how many"""
    restarts: int = Supervision.restarts
    """how often all of them are started again; 30 minutes without a crash start the count anew"""
    backoff: float = Supervision.backoff
    """seconds before the first restart; each further one waits twice as long, up to 300"""
    heartbeat: int = HEARTBEAT
    """seconds after which a dead process ends the others"""
    devices: int | None = None
    """CPU devices for each process, to try things out"""


def local(argv: list[str]) -> Report:
    """Several processes on this machine."""
    own = argv[: argv.index("--")] if "--" in argv else argv
    options = parse(Local, own, "jaxsi launch local", DESCRIPTION)
    command = argv[len(own) + 1 :]
    if not command:
        raise UsageError("give the command to run behind --: jaxsi launch local -n 2 -- run CONFIG.py [options]")
    if command[0] == "launch":
        raise UsageError("a launch cannot launch a launch; give the command itself, as in: -- run CONFIG.py")
    try:
        how = Supervision(**dataclasses.asdict(options))
    except ValueError as error:
        raise UsageError(str(error)) from error
    cut = command.index("--") if "--" in command else len(command)
    command[cut:cut] = ["--distributed", "--heartbeat", f"{options.heartbeat}"]
    outcome = supervise([sys.executable, "-m", "jaxsi", *command], how)
    value = {
        "processes": how.processes,
        "restarts": outcome.restarts,
        "exit_codes": outcome.exit_codes,
        "seconds": outcome.seconds,
        "output": outcome.output,
    }
    return Report(value, outcome.output.removesuffix("\n"), outcome.code)
