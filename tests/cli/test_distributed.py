"""How processes find each other: options, variables, clusters; and how the failure of one ends them all."""

import re
import socket
import time

import pytest
from processes import ended, free_port, start

from jaxsi.cli import distributed
from jaxsi.cli.command import UsageError
from jaxsi.cli.distributed import JoinError, Options

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in (*VARIABLES, *distributed.SLURM, distributed.OPEN_MPI, distributed.OPEN_MPI_4):
        monkeypatch.delenv(name, raising=False)


def test_command_line_without_options_stays_unchanged():
    argv = ["run", "x.py", "--seed", "1", "--", "run", "--distributed"]
    assert distributed.take_options(argv) == (None, argv)


def test_options_are_removed_anywhere_before_two_dashes():
    line = "--coordinator=h:12 run --num-processes 4 x.py --process-id 3 --heartbeat 7 -- a --coordinator b"
    options, rest = distributed.take_options(line.split())
    assert options == Options(coordinator="h:12", num_processes=4, process_id=3, heartbeat=7)
    assert rest == ["run", "x.py", "--", "a", "--coordinator", "b"]


def test_variables_replace_missing_options(monkeypatch):
    for name, value in zip(VARIABLES, ("[::1]:80", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert distributed.take_options(["run"]) == (None, ["run"])
    assert distributed.take_options(["run", "--distributed"])[0] == Options(
        coordinator="[::1]:80", num_processes=2, process_id=1
    )
    assert distributed.take_options(["run", "--process-id", "0"])[0] == Options(
        coordinator="[::1]:80", num_processes=2, process_id=0
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--coordinator h:1", "--num-processes (or JAX_NUM_PROCESSES) and --process-id (or JAX_PROCESS_ID) missing"),
        ("--num-processes 2 --process-id 0", "--coordinator (or JAX_COORDINATOR_ADDRESS) missing"),
        ("--coordinator h --num-processes 2 --process-id 0", "is 'h'; give process 0's HOST:PORT"),
        ("--coordinator h:70000 --num-processes 2 --process-id 0", "is 'h:70000'; give process 0's HOST:PORT"),
        ("--coordinator h:1 --num-processes 0 --process-id 0", "--num-processes (JAX_NUM_PROCESSES) is '0'"),
        ("--coordinator h:1 --num-processes 2 --process-id two", "--process-id (JAX_PROCESS_ID) is 'two'"),
        (
            "--coordinator h:1 --num-processes 2 --process-id 2",
            "--process-id is 2, but --num-processes is 2; give a number from 0 to 1",
        ),
        ("--distributed --heartbeat 0", "--heartbeat is '0'; give a whole number of at least 1"),
        (
            "--heartbeat 10",
            "--heartbeat alone has no effect: it sets how long a dead process goes unnoticed; add --distributed",
        ),
        ("--distributed --heartbeat", "--heartbeat needs a value"),
    ],
)
def test_wrong_option_is_named(line, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        distributed.take_options(["run", *line.split()])


def test_single_variable_without_the_others_is_refused():
    [(code, out, err)] = ended([start(["-m", "jaxsi", "status", ".", "--distributed"], JAX_NUM_PROCESSES="2")])
    assert (code, out) == (2, "")
    assert "error: JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID not set" in err


def test_error_of_unknown_launcher_says_what_to_set(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"install it, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES="):
        distributed.join(Options())


def test_error_of_silent_coordinator_names_it_and_the_fix():
    port = free_port()
    message = rf"process 0 did not answer at 127.0.0.1:{port} within 1 s .* start it, or give"
    with pytest.raises(JoinError, match=message):
        distributed.join(Options(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=1), timeout=1)


def test_error_of_used_port_names_it():
    with socket.create_server(("", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(JoinError, match=f"port {port} of the coordinator localhost:{port} cannot be used"):
            distributed.join(Options(coordinator=f"localhost:{port}", num_processes=2, process_id=0), timeout=1)


# ---- real processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({}, "no SLURM, GKE, JobSet, TPU metadata or Open MPI was recognised, and JAX_COORDINATOR_ADDRESS is not set"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"},
            "this is inside SLURM but not a SLURM task (SLURM_STEP_NODELIST and SLURM_PROCID and SLURM_LOCALID not set",
        ),
    ],
    ids=["nothing", "a shell inside an allocation"],
)
def test_process_without_known_peers_goes_on_alone_and_says_so(run, variables, why):
    [(code, out, err)] = ended([start(["-m", "jaxsi", "status", run, "--distributed"], **variables)])
    assert code == 0, err
    assert str(run) in out
    assert f"jaxsi: --distributed: going on as one process: {why}" in err


def slurm(index: int, port: int) -> dict[str, str]:
    """The variables of one of two tasks on this host. JAX takes the port from the job's number."""
    return {
        "SLURM_JOB_ID": str(port),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "SLURM_STEP_NUM_NODES": "1",
    }


def by_variables(index: int, port: int) -> dict[str, str]:
    return dict(zip(VARIABLES, (f"127.0.0.1:{port}", "2", str(index)), strict=True))


@pytest.mark.parametrize("environment", [slurm, by_variables])
def test_two_processes_join_and_only_the_first_reports(run, environment):
    port = free_port()
    words = ["-m", "jaxsi", "status", run, "--json", "--distributed"]
    (code_0, out_0, err_0), (code_1, out_1, err_1) = ended([start(words, 2, **environment(i, port)) for i in range(2)])
    assert (code_0, code_1) == (0, 0), err_0 + err_1
    assert "jaxsi: 2 processes, 4 devices (cpu)" in err_0
    assert str(run) in out_0
    assert "devices" not in err_1 and out_1 == ""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_failed_process_names_itself_and_the_other_ends_within_the_heartbeat(run, failing):
    processes, port = [], free_port()
    for index in range(2):
        folder = run / "absent" if index == failing else run
        join = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", index, "--heartbeat", 10]
        processes.append(start(["-m", "jaxsi", "status", folder, *join]))
    out, err = processes[failing].communicate(timeout=60)
    start_time = time.monotonic()
    assert (processes[failing].returncode, out) == (1, "")
    assert f"jaxsi: process {failing} of 2: error: {run / 'absent'} holds no run" in err
    processes[1 - failing].communicate(timeout=60)
    assert time.monotonic() - start_time < 10 + 5
    assert processes[1 - failing].returncode != 0
