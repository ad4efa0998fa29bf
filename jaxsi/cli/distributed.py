"""Several processes of one command: the global options, joining the others, and leaving without holding them up.

JAX recognises SLURM, GKE and JobSet, TPU VMs, Kubernetes and Open MPI itself; JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID, of which JAX reads only the first, or the options say it everywhere else.
"""

import contextlib
import dataclasses
import importlib.util
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxsi.cli.command import UsageError
from jaxsi.cli.supervisor import HEARTBEAT
from jaxsi.runs.progress import processes

JOINING = 300  # seconds that all processes have to come, JAX's own
SAID_AFTER = 15  # seconds of waiting before a line says so
LINGER = 2  # seconds: process 0 leads, and its end ends the others, which may have the same error to tell

FLAG, COORDINATOR, COUNT, INDEX, BEAT = (
    "--distributed", "--coordinator", "--num-processes", "--process-id", "--heartbeat",
)  # fmt: skip
VARIABLES = {COORDINATOR: "JAX_COORDINATOR_ADDRESS", COUNT: "JAX_NUM_PROCESSES", INDEX: "JAX_PROCESS_ID"}

# All of these, or JAX takes a process for no task of SLURM's: a shell inside an allocation has but some.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI, OPEN_MPI_4 = "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri"  # JAX knows it by the second, gone in version 5


class JoinError(Exception):
    """The other processes cannot be reached."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to join: ``coordinator`` ("host:port"), ``num_processes`` and ``process_id`` where they are said, in options
    or in variables, else None. ``heartbeat`` in seconds."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat: int = HEARTBEAT


def take_options(argv: Sequence[str]) -> tuple[Options | None, list[str]]:
    """(How to join the others, None where the command line does not ask for it; the command line without the options).

    What stands behind a bare "--" is another command's. Raises: UsageError for wrong values and for missing ones.
    """
    own, behind = _split(argv)
    given: dict[str, str] = {}
    rest: list[str] = []
    words = iter(own)
    for word in words:
        name, equals, value = word.partition("=")
        if word == FLAG:
            given[FLAG] = ""
        elif name in (*VARIABLES, BEAT):
            if not equals and (value := next(words, "")) == "":
                raise UsageError(f"{name} needs a value")
            given[name] = value
        else:
            rest.append(word)
    rest += behind
    if not given:
        return None, rest
    if set(given) == {BEAT}:
        raise UsageError(f"{BEAT} is how long a dead process goes unnoticed; it goes with {FLAG} or {COORDINATOR}")
    explicit = any(name in given for name in VARIABLES)
    said = {name: given.get(name) or os.environ.get(variable) or None for name, variable in VARIABLES.items()}
    if explicit and (missing := [name for name, value in said.items() if value is None]):
        names = " and ".join(f"{name} (or {VARIABLES[name]})" for name in missing)
        raise UsageError(f"{names} missing: {', '.join(VARIABLES)} go together")
    options = Options(
        coordinator=said[COORDINATOR], num_processes=_number(COUNT, said[COUNT], 1),
        process_id=_number(INDEX, said[INDEX], 0),
        heartbeat=_number(BEAT, given.get(BEAT), 1) or HEARTBEAT,
    )  # fmt: skip
    _check(options)
    return options, rest


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    place = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place:])


def own_words(argv: Sequence[str]) -> list[str]:
    """The words of a command line before a bare "--"."""
    return _split(argv)[0]


def _number(name: str, text: str | None, least: int) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        variable = f" ({VARIABLES[name]})" if name in VARIABLES else ""
        raise UsageError(f"{name}{variable} is {text!r}; give a whole number, at least {least}")
    return int(text)


def _check(options: Options) -> None:
    address, count, index = options.coordinator, options.num_processes, options.process_id
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UsageError(f"{COORDINATOR} ({VARIABLES[COORDINATOR]}) is {address!r}; give HOST:PORT of process 0")
    if count is not None and index is not None and index >= count:
        raise UsageError(f"{INDEX} is {index} of {COUNT} {count}; the processes are 0 to {count - 1}")


# ---- joining ---------------------------------------------------------------------------------------------------------


def join(options: Options, timeout: int = JOINING) -> None:
    """Joins the other processes; call it before anything else of JAX.

    Where no option and no variable says who they are and nothing is recognised either, the process goes on alone, and a
    line on stderr says so. Args: timeout: seconds that all of them have to come.

    Raises:
      UsageError: a launcher that JAX does not recognise, or variables of which some are missing.
      JoinError: nobody answers at the coordinator's address, or its port is taken.
    """
    import jax

    said = (options.coordinator, options.num_processes, options.process_id)
    arguments: dict[str, Any] = dict(zip(("coordinator_address", "num_processes", "process_id"), said, strict=True))
    if None not in said:
        assert options.coordinator is not None  # for the type checker
        _reach(options.coordinator, options.process_id == 0, timeout)
        arguments["cluster_detection_method"] = "deactivate"  # or Kubernetes is asked, too
    elif OPEN_MPI in os.environ and OPEN_MPI_4 not in os.environ:
        if importlib.util.find_spec("mpi4py") is None:
            raise UsageError(
                "JAX finds the processes of this version of Open MPI through mpi4py: install it, or set "
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES=$OMPI_COMM_WORLD_SIZE and "
                "JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK for each process"
            )
        arguments["cluster_detection_method"] = "mpi4py"
    try:
        with _saying_that_it_waits(timeout):
            jax.distributed.initialize(
                **arguments, initialization_timeout=timeout, heartbeat_timeout_seconds=options.heartbeat
            )
    except (ValueError, RuntimeError) as error:
        if "defined" not in str(error):  # what JAX says of each of the three that it finds nowhere
            raise JoinError(f"the other processes cannot be joined: {error}") from error
        _alone(options, error)
        return
    index, count = processes()
    if index == 0:
        devices = jax.devices()
        print(f"jaxsi: {count} processes, {len(devices)} devices ({devices[0].device_kind})", file=sys.stderr)


def _alone(options: Options, error: Exception) -> None:
    said = {COORDINATOR: options.coordinator, COUNT: options.num_processes, INDEX: options.process_id}
    missing = [VARIABLES[name] for name, value in said.items() if value is None]
    if len(missing) < len(said):
        raise UsageError(
            f"{' and '.join(missing)} not set, and no cluster is recognised that says it: set all of "
            f"{', '.join(VARIABLES.values())}, or none"
        ) from error
    why = "no SLURM, GKE, JobSet, TPU metadata or Open MPI is recognised, and JAX_COORDINATOR_ADDRESS is not set"
    absent = [name for name in SLURM if name not in os.environ]
    if 0 < len(absent) < len(SLURM):
        why = f"inside SLURM, but no task of its ({' and '.join(absent)} not set): srun starts tasks"
    print(f"jaxsi: {FLAG}: going on as one process: {why}", file=sys.stderr)


def _reach(address: str, lead: bool, timeout: int) -> None:
    """JAX itself ends the process without a word of ours where a port is taken or nobody answers."""
    host, _, text = address.rpartition(":")
    host, port = host.strip("[]"), int(text)
    if lead:
        try:
            with socket.create_server(("", port), reuse_port=False):
                return
        except OSError as error:
            raise JoinError(
                f"port {port} of the coordinator {address} cannot be used on this host ({error.strerror or error}); "
                "end the process that holds it, or give another port to all processes"
            ) from error
    deadline, began, said = time.monotonic() + timeout, time.monotonic(), False
    while True:
        try:
            with socket.create_connection((host, port), timeout=min(10, timeout)):
                return
        except OSError as error:
            now = time.monotonic()
            if now >= deadline:
                raise JoinError(
                    f"no process 0 answers at {address} after {timeout} s ({error.strerror or error}); start it, or "
                    f"give all processes the address at which its host is seen by the others, and a port that is open"
                ) from error
            if not said and now - began > SAID_AFTER:
                print(f"jaxsi: waiting for process 0 at {address} ({error.strerror or error})", file=sys.stderr)
                said = True
            time.sleep(0.2)


@contextlib.contextmanager
def _saying_that_it_waits(timeout: int) -> Iterator[None]:
    """What JAX waits for, and what its end without an error means."""
    text = f"jaxsi: waiting for the other processes; JAX aborts where they are not all here after {timeout} s"
    timer = threading.Timer(SAID_AFTER, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---- leaving ---------------------------------------------------------------------------------------------------------


def of_processes() -> str:
    """ "process 1 of 2: ", or nothing where there is one process: what a line on stderr begins with."""
    index, count = processes()
    return f"process {index} of {count}: " if count > 1 else ""


def leave(code: int) -> int:
    """``code``, to end with; but a process of several that failed ends here and now: JAX would have it wait at its exit
    for the others, and they wait for it."""
    index, count = processes()
    if count > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if index == 0:
            time.sleep(LINGER)
        os._exit(code)
    return code
