"""Several processes of one command: the global options, joining the others, and leaving without blocking them.

JAX recognises SLURM, GKE and JobSet, TPU VMs, Kubernetes and Open MPI by itself. Anywhere else the options are needed,
or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (JAX itself reads only the first).
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

JOIN_SECONDS = 300  # for all processes to join; JAX's own default
SILENT_SECONDS = 15  # of waiting before a line on stderr says so
LINGER_SECONDS = 2  # the end of process 0 ends the others: they need this time to report the same error

FLAG, COORDINATOR, COUNT = "--distributed", "--coordinator", "--num-processes"
INDEX, BEAT = "--process-id", "--heartbeat"
VARIABLES = {COORDINATOR: "JAX_COORDINATOR_ADDRESS", COUNT: "JAX_NUM_PROCESSES", INDEX: "JAX_PROCESS_ID"}

# JAX recognises a SLURM task only if all of these are set; a shell inside an allocation has only some of them.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# JAX recognises Open MPI by the second, which version 5 no longer sets.
OPEN_MPI, OPEN_MPI_4 = "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri"


class JoinError(Exception):
    """The other processes cannot be reached."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to join. ``coordinator`` ("host:port"), ``num_processes`` and ``process_id`` come from options or variables;
    None: not set. ``heartbeat`` is in seconds."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat: int = HEARTBEAT


def take_options(argv: Sequence[str]) -> tuple[Options | None, list[str]]:
    """(how to join the others, or None if the command line does not ask for it; the command line without the options).

    Words after a bare "--" belong to another command. Raises: UsageError: if a value is wrong or missing.
    """
    before, after = split_at_dashes(argv)
    values: dict[str, str] = {}
    rest: list[str] = []
    words = iter(before)
    for word in words:
        name, equals, value = word.partition("=")
        if word == FLAG:
            values[FLAG] = ""
        elif name in (*VARIABLES, BEAT):
            if not equals and (value := next(words, "")) == "":
                raise UsageError(f"{name} needs a value")
            values[name] = value
        else:
            rest.append(word)
    rest += after
    if not values:
        return None, rest
    if set(values) == {BEAT}:
        raise UsageError(
            f"{BEAT} alone has no effect: it sets how long a dead process goes unnoticed; add {FLAG} or {COORDINATOR}"
        )
    explicit = any(name in values for name in VARIABLES)
    found = {name: values.get(name) or os.environ.get(variable) or None for name, variable in VARIABLES.items()}
    if explicit and (missing := [name for name, value in found.items() if value is None]):
        names = " and ".join(f"{name} (or {VARIABLES[name]})" for name in missing)
        raise UsageError(f"{names} missing: give all of {', '.join(VARIABLES)}")
    options = Options(
        coordinator=found[COORDINATOR],
        num_processes=_number(COUNT, found[COUNT], 1),
        process_id=_number(INDEX, found[INDEX], 0),
        heartbeat=_number(BEAT, values.get(BEAT), 1) or HEARTBEAT,
    )
    _check(options)
    return options, rest


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the words before a bare "--"; the "--" and the words after it)."""
    place = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place:])


def _number(name: str, text: str | None, least: int) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        variable = f" ({VARIABLES[name]})" if name in VARIABLES else ""
        raise UsageError(f"{name}{variable} is {text!r}; give a whole number of at least {least}")
    return int(text)


def _check(options: Options) -> None:
    address, count, index = options.coordinator, options.num_processes, options.process_id
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UsageError(f"{COORDINATOR} ({VARIABLES[COORDINATOR]}) is {address!r}; give process 0's HOST:PORT")
    if count is not None and index is not None and index >= count:
        raise UsageError(f"{INDEX} is {index}, but {COUNT} is {count}; give a number from 0 to {count - 1}")


# ---- joining ---------------------------------------------------------------------------------------------------------


def join(options: Options, timeout: int = JOIN_SECONDS) -> None:
    """Joins the other processes within ``timeout`` seconds. Call it before anything else in JAX.

    If neither options nor variables say who the others are, and JAX recognises no cluster, the process goes on alone
    and a line on stderr says so.

    Raises:
      UsageError: if JAX does not recognise the launcher, or some variables are missing.
      JoinError: if process 0 does not answer at the coordinator's address, or the port is taken.
    """
    import jax

    values = (options.coordinator, options.num_processes, options.process_id)
    arguments: dict[str, Any] = dict(zip(("coordinator_address", "num_processes", "process_id"), values, strict=True))
    if None not in values:
        assert options.coordinator is not None  # for the type checker
        _reach(options.coordinator, options.process_id == 0, timeout)
        arguments["cluster_detection_method"] = "deactivate"  # else JAX asks Kubernetes as well
    elif OPEN_MPI in os.environ and OPEN_MPI_4 not in os.environ:
        if importlib.util.find_spec("mpi4py") is None:
            raise UsageError(
                "JAX needs mpi4py to find the processes of this version of Open MPI: install it, or set "
                "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES=$OMPI_COMM_WORLD_SIZE and "
                "JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK for each process"
            )
        arguments["cluster_detection_method"] = "mpi4py"
    try:
        with _waiting_message(timeout):
            jax.distributed.initialize(
                **arguments, initialization_timeout=timeout, heartbeat_timeout_seconds=options.heartbeat
            )
    except (ValueError, RuntimeError) as error:
        if "defined" not in str(error):  # JAX's message if it finds one of the three values nowhere
            raise JoinError(f"cannot join the other processes: {error}") from error
        _go_on_alone(options, error)
        return
    index, count = processes()
    if index == 0:
        devices = jax.devices()
        print(f"jaxsi: {count} processes, {len(devices)} devices ({devices[0].device_kind})", file=sys.stderr)


def _go_on_alone(options: Options, error: Exception) -> None:
    values = {COORDINATOR: options.coordinator, COUNT: options.num_processes, INDEX: options.process_id}
    missing = [VARIABLES[name] for name, value in values.items() if value is None]
    if len(missing) < len(values):
        raise UsageError(
            f"{' and '.join(missing)} not set, and JAX recognises no cluster that would define them: set all of "
            f"{', '.join(VARIABLES.values())}, or none of them"
        ) from error
    why = "no SLURM, GKE, JobSet, TPU metadata or Open MPI was recognised, and JAX_COORDINATOR_ADDRESS is not set"
    absent = [name for name in SLURM if name not in os.environ]
    if 0 < len(absent) < len(SLURM):
        why = f"this is inside SLURM but not a SLURM task ({' and '.join(absent)} not set); start tasks with srun"
    print(f"jaxsi: {FLAG}: going on as one process: {why}", file=sys.stderr)


def _reach(address: str, lead: bool, timeout: int) -> None:
    """Checks the coordinator's address. JAX itself ends the process without our message if the port is taken or nobody
    answers."""
    host, _, text = address.rpartition(":")
    host, port = host.strip("[]"), int(text)
    if lead:
        try:
            with socket.create_server(("", port), reuse_port=False):
                return
        except OSError as error:
            raise JoinError(
                f"port {port} of the coordinator {address} cannot be used on this host ({error.strerror or error}); "
                "end the process that uses it, or give all processes another port"
            ) from error
    start, announced = time.monotonic(), False
    deadline = start + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=min(10, timeout)):
                return
        except OSError as error:
            now = time.monotonic()
            if now >= deadline:
                raise JoinError(
                    f"process 0 did not answer at {address} within {timeout} s ({error.strerror or error}); start it, "
                    "or give all processes an address of its host that they can reach, and an open port"
                ) from error
            if not announced and now - start > SILENT_SECONDS:
                print(f"jaxsi: waiting for process 0 at {address} ({error.strerror or error})", file=sys.stderr)
                announced = True
            time.sleep(0.2)


@contextlib.contextmanager
def _waiting_message(timeout: int) -> Iterator[None]:
    """Prints, after a while, what JAX is waiting for, because JAX aborts without an error."""
    text = f"jaxsi: waiting for the other processes; JAX aborts if they have not all joined after {timeout} s"
    timer = threading.Timer(SILENT_SECONDS, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---- leaving ---------------------------------------------------------------------------------------------------------


def process_prefix() -> str:
    """The start of a line on stderr: "process 1 of 2: ", or nothing if there is only one process."""
    index, count = processes()
    return f"process {index} of {count}: " if count > 1 else ""


def leave(code: int) -> int:
    """Returns the exit code ``code`` of a failure. One of several processes exits at once instead: at a normal exit JAX
    would wait for the others, which wait for this one."""
    index, count = processes()
    if count > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        if index == 0:
            time.sleep(LINGER_SECONDS)
        os._exit(code)
    return code
