"""The commands of ``jaxsi``. Each takes its arguments and returns a ``Report``; JAX is imported when one runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Arguments = TypeVar("Arguments")

EVERY_COMMAND = """Options of every command: --json prints one JSON object on stdout in place of the table (progress
and messages go to stderr); --debug shows the traceback of an error; -h, --help.
One of several processes: --distributed joins the others, whom SLURM, GKE, JobSet, TPU metadata, Open MPI or
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell; or by --coordinator HOST:PORT, --num-processes N
and --process-id I. A dead process ends the others after --heartbeat SECONDS (100)."""


class UsageError(Exception):
    """A command line that cannot be carried out as it stands: exit code 2."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What a command has to say: ``value`` with --json, else ``text``; and what the process ends with."""

    value: Mapping[str, Any]
    text: str
    exit_code: int = 0


def parse(cls: type[Arguments], argv: Sequence[str], prog: str, description: str) -> Arguments:
    """``argv`` as the dataclass ``cls``; unknown or missing ones end the process with exit code 2."""
    import tyro

    return tyro.cli(
        cls, args=list(argv), prog=prog, description=f"{description.strip()}\n\n{EVERY_COMMAND}",
        config=(tyro.conf.FlagCreatePairsOff,),
    )  # fmt: skip
