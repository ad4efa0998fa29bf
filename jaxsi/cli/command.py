"""The form of every command: it takes its arguments and returns a ``Report``. JAX is imported only when it runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import IO, Any, TypeVar

Arguments = TypeVar("Arguments")

# Where a conversation is shown while it goes on: stdout; with --json stderr, so that stdout has the one object alone.
SCREEN: ContextVar[IO[str]] = ContextVar("screen")

EVERY_COMMAND = """Options of every command: --json prints one JSON object on stdout instead of the table (progress and
messages go to stderr); --debug shows the traceback of an error; -h, --help.
Several processes: --distributed joins the others, found through SLURM, GKE, JobSet, TPU metadata, Open MPI, or the
variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Or name the
others with --coordinator HOST:PORT, --num-processes N and --process-id I. If a process dies, the others end after
100 seconds, or --heartbeat SECONDS."""


class UsageError(Exception):
    """A command line that cannot work: exit code 2."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a command: ``value`` is printed with --json, else ``text``; the process ends with ``exit_code``."""

    value: Mapping[str, Any]
    text: str
    exit_code: int = 0


def parse(cls: type[Arguments], argv: Sequence[str], prog: str, description: str) -> Arguments:
    """Parses ``argv`` into the dataclass ``cls``; an unknown or missing argument ends the process with exit code 2."""
    import tyro

    return tyro.cli(
        cls,
        args=list(argv),
        prog=prog,
        description=f"{description.strip()}\n\n{EVERY_COMMAND}",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
