"""The supervisor of several processes, with tiny programs: restarts, exits, signals, orphans and passed-on lines."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from jaxsi.cli import launch, supervisor
from jaxsi.cli.main import main
from jaxsi.cli.supervisor import Outcome, Supervision, environment, supervise

ROOT = Path(__file__).parents[2]
ME = "import os, signal, subprocess, sys, time; me = os.environ['JAX_PROCESS_ID']\n"
# Defines present(), which writes the process id into a file of the folder. Called when ready for signals.
PRESENT = """
def present(name=me):
    with open(f"{sys.argv[1]}/{name}.new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"{sys.argv[1]}/{name}.new", f"{sys.argv[1]}/{name}")
"""


def program(text, *arguments):
    return [sys.executable, "-I", "-S", "-c", ME + PRESENT + text, *map(str, arguments)]


def supervised(text, *arguments, **options):
    options = {"processes": 2, "backoff": 0.01, "heartbeat": 5} | options
    return supervise(program(text, *arguments), Supervision(**options))


def ids(folder, count, within=20):
    """The process ids that ``count`` programs have written into a folder."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        files = [path for path in Path(folder).iterdir() if path.suffix != ".new"]
        if len(files) >= count:
            return [int(path.read_text()) for path in files]
        time.sleep(0.02)
    raise AssertionError(f"{folder} has too few files; expected {count} processes")


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(pids, within=10):
    end = time.monotonic() + within
    while not all(map(gone, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return all(map(gone, pids))


def started(folder, text, **options):
    """A supervisor in its own process, as on the command line."""
    options = {"processes": 2, "backoff": 0.01, "heartbeat": 5} | options
    code = (
        "import sys; from jaxsi.cli.supervisor import Supervision, supervise\n"
        f"done = supervise({program(text, folder)!r}, Supervision(**{options!r}))\n"
        "print(done.code, done.restarts, done.exit_codes); sys.exit(done.code)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_know_their_number_and_the_coordinator(capfd):
    names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    done = supervised(f"print(*(os.environ['JAX_' + name] for name in {names}), file=sys.stderr)", processes=3)
    assert (done.code, done.restarts, done.exit_codes) == (0, 0, [0, 0, 0])
    zero, one, two = sorted(capfd.readouterr().err.splitlines(), key=lambda line: line[-1])
    address, count, index = zero.split()
    assert address.startswith("127.0.0.1:")
    assert (count, index) == ("3", "0")
    assert (one, two) == (f"[1] {address} 3 1", f"[2] {address} 3 2")


def test_every_attempt_has_its_own_port(tmp_path):
    text = "open(sys.argv[1] + '/ports', 'a').write(os.environ['JAX_COORDINATOR_ADDRESS'] + '\\n'); sys.exit(1)"
    assert supervised(text, tmp_path, processes=1, restarts=3).restarts == 3
    ports = (tmp_path / "ports").read_text().split()
    assert len(ports) == 4
    assert len(set(ports)) > 1


def test_environment_sets_devices_and_keeps_other_flags():
    variables = {"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8", "PATH": "/bin"}
    result = environment(variables, Supervision(processes=2, devices=4), 1, 1234)
    assert result["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=4"
    assert (result["JAX_PLATFORMS"], result["PATH"]) == ("cpu", "/bin")
    assert environment(variables, Supervision(processes=2), 1, 1234)["XLA_FLAGS"] == variables["XLA_FLAGS"]


def test_crash_restarts_all_processes(tmp_path, capfd):
    text = """
first = not os.path.exists(sys.argv[1] + "/again")
present(f"{me}.{'first' if first else 'second'}")
if first:
    if me == "1":
        while not os.path.exists(sys.argv[1] + "/0.first"):
            time.sleep(0.01)
        open(sys.argv[1] + "/again", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""
    done = supervised(text, tmp_path, heartbeat=0.2)
    assert (done.code, done.restarts, done.exit_codes) == (0, 1, [0, 0])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"again", "0.first", "1.first", "0.second", "1.second"}
    assert "process 1 ended with 137 (SIGKILL); restart 1 of 3 in 0.01 s" in capfd.readouterr().err


def test_restarts_are_limited_and_waits_double(capfd):
    done = supervised("sys.exit(3)", restarts=3, backoff=0.02)
    assert (done.code, done.restarts, done.exit_codes) == (1, 3, [3, 3])
    err = capfd.readouterr().err
    assert [f"restart {n} of 3 in {s} s" in err for n, s in ((1, 0.02), (2, 0.04), (3, 0.08))] == [True] * 3
    assert "process 0 ended with 3; all 3 restarts are used up" in err or "process 1 ended with 3; all 3" in err
    assert done.seconds >= 0.02 + 0.04 + 0.08


def test_backoff_stays_below_its_limit():
    supervision = Supervision(processes=1, backoff=5)
    assert [supervisor.backoff(supervision, count) for count in (0, 1, 2, 5, 6, 5000)] == [5, 10, 20, 160, 300, 300]


def test_healthy_attempt_resets_the_count(tmp_path):
    text = """
attempts = len(os.listdir(sys.argv[1]))
present(str(attempts))
time.sleep(0.5 if attempts == 1 else 0)
sys.exit(1 if attempts < 4 else 0)
"""
    done = supervised(text, tmp_path, processes=1, restarts=3, healthy=0.4)
    assert (done.code, done.restarts) == (0, 4)


def test_wrong_usage_is_not_repeated_and_ends_the_others_at_once(tmp_path):
    start = time.monotonic()
    done = supervised("present(me); sys.exit(2) if me == '1' else time.sleep(60)", tmp_path, heartbeat=50)
    assert (done.code, done.restarts) == (2, 0)
    assert done.exit_codes == [128 + signal.SIGTERM, 2]
    assert time.monotonic() - start < 20


def test_process_that_ignores_sigterm_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "TERM_SECONDS", 0.3)
    text = """
if me == "1":
    while len(os.listdir(sys.argv[1])) < 2:
        time.sleep(0.01)
    sys.exit(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
present("0")
worker = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
open(sys.argv[1] + "/worker.new", "w").write(str(worker.pid))
os.rename(sys.argv[1] + "/worker.new", sys.argv[1] + "/worker")
time.sleep(60)
"""
    done = supervised(text, tmp_path, restarts=0, heartbeat=0.2)
    assert (done.code, done.exit_codes) == (1, [128 + signal.SIGKILL, 1])
    assert all_gone(ids(tmp_path, 2))


def test_data_workers_of_crashed_process_end_with_it(tmp_path):
    text = """
worker = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
open(sys.argv[1] + "/worker", "w").write(str(worker.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    start = time.monotonic()
    assert supervised(text, tmp_path, processes=1, restarts=0).code == 1
    assert all_gone(ids(tmp_path, 1))
    assert time.monotonic() - start < 20  # although the worker held the pipes


def test_sigterm_is_passed_on_and_nothing_is_restarted(tmp_path):
    text = """
signal.signal(signal.SIGTERM, lambda *_: (present(me + ".saved"), sys.exit(75)))
present(me)
time.sleep(60)
"""
    process = started(tmp_path, text)
    ids(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75
    assert out.split() == ["75", "0", "[75,", "75]"]
    assert {"0.saved", "1.saved"} <= {path.name for path in tmp_path.iterdir()}


def test_sigterm_during_backoff_ends_supervisor_at_once():
    process = started("/", "sys.exit(1)", backoff=60)
    assert "restart 1 of 3 in 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75
    assert out.split()[:2] == ["75", "1"]


def test_processes_stopped_by_others_are_not_restarted():
    done = supervised("sys.exit(75)")
    assert (done.code, done.restarts) == (75, 0)


def test_finished_run_exits_with_0_despite_sigterm(tmp_path):
    process = started(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); present(); time.sleep(60)")
    ids(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_interrupt_leaves_no_process(tmp_path):
    process = started(tmp_path, "present(); time.sleep(60)")
    pids = ids(tmp_path, 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT  # from a plain interpreter; the command line turns it into 130
    assert all_gone(pids)


def test_killed_supervisor_leaves_no_orphan(tmp_path):
    text = """
worker = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"])
open(f"{sys.argv[1]}/{me}.worker.new", "w").write(str(worker.pid))
os.rename(f"{sys.argv[1]}/{me}.worker.new", f"{sys.argv[1]}/{me}.worker")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
present()
time.sleep(60)
"""
    process = started(tmp_path, text)
    pids = ids(tmp_path, 4)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(family) == 5  # two processes, a data worker for each, and the guard
    assert set(pids) <= set(family)
    process.kill()
    process.communicate(timeout=20)  # returns, so nobody holds its pipes
    assert all_gone(family)


def test_supervise_leaves_no_zombie_and_no_thread():
    threads = threading.active_count()
    assert supervised("pass", processes=3).code == 0
    assert psutil.Process().children() == []
    assert threading.active_count() == threads


def test_lines_stay_whole_and_in_order(capfd):
    text = """
for n in range(200):
    print("line", n, "." * 50, file=sys.stderr)
    print("result", n)
sys.stderr.write("no end of line")
"""
    done = supervised(text)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    expected = [f"line {n} {'.' * 50}" for n in range(200)]
    assert [line for line in lines if line.startswith("line")] == expected
    assert [line for line in lines if line.startswith("[1] line")] == [f"[1] {line}" for line in expected]
    assert [line for line in lines if line.startswith("[1] result")] == [f"[1] result {n}" for n in range(200)]
    assert len(lines) == 3 * 200 + 2
    assert {"no end of line", "[1] no end of line"} <= set(lines)
    assert done.output == "".join(f"result {n}\n" for n in range(200))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"processes": 0}, "processes is 0"), ({"restarts": -1}, "restarts is -1"), ({"devices": 0}, "devices is 0")],
)
def test_impossible_supervision_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Supervision(**{"processes": 1, **options})


def launched(capsys, monkeypatch, *argv, **fields):
    """(exit code, output, the arguments of `supervise`) of a launch that starts nothing."""
    calls = []
    outcome = Outcome(**{"code": 0, "restarts": 0, "exit_codes": [0], "seconds": 1.5, "output": "one\n"} | fields)
    monkeypatch.setattr(launch, "supervise", lambda *arguments: calls.append(arguments) or outcome)
    code = main(["launch", "local", *argv])
    return code, capsys.readouterr(), calls[0]


def test_everything_after_the_dashes_reaches_the_processes(capsys, monkeypatch):
    words = ["run", "config.py", "--json", "--debug", "--help", "--dpo.beta", "0.2", "--", "-n"]
    code, (out, _), (command, supervision) = launched(capsys, monkeypatch, "-n", "2", "--heartbeat", "9", "--", *words)
    assert command[1:] == ["-m", "jaxsi", *words[:-2], "--distributed", "--heartbeat", "9", *words[-2:]]
    assert (code, out) == (0, "one\n")
    assert supervision == Supervision(processes=2, heartbeat=9)


def test_launch_prints_its_outcome_as_json(capsys, monkeypatch):
    code, (out, _), _ = launched(
        capsys, monkeypatch, "--json", "-n", "1", "--", "status", "x", code=75, exit_codes=[75], restarts=2
    )
    assert code == 75
    assert json.loads(out) == {"processes": 1, "restarts": 2, "exit_codes": [75], "seconds": 1.5, "output": "one\n"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-n", "2"], "after --"),
        (["-n", "2", "--"], "after --"),
        (["-n", "0", "--", "status", "x"], "processes is 0"),
        (["-n", "2", "--", "launch", "local", "-n", "2"], "give the command itself"),
        (["--", "status", "x"], "processes"),
    ],
)
def test_wrong_launch_exits_with_2(argv, message, capsys):
    assert main(["launch", "local", *argv]) == 2
    assert message in capsys.readouterr().err


def test_wrong_command_is_started_once():
    words = ["launch", "local", "-n", "2", "--", "run"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxsi", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: give a config first" in done.stderr
    assert "restart" not in done.stderr


@pytest.mark.slow
def test_run_goes_on_after_a_process_is_killed(tmp_path):
    directory, env = tmp_path / "run", os.environ | {"PYTHONPATH": str(ROOT)}
    launch_words = [
        "launch",
        "local",
        "-n",
        "2",
        "--devices",
        "1",
        "--heartbeat",
        "10",
        "--backoff",
        "0.1",
        "--json",
        "--",
    ]
    words = ["run", "tests/micro/sampling.py", "--run-dir", str(directory)]
    command = [sys.executable, "-m", "jaxsi", *launch_words, *words]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (directory / "iter_0" / "responses.shards").exists() and time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    (second,) = [
        child for child in psutil.Process(process.pid).children() if child.environ().get("JAX_PROCESS_ID") == "1"
    ]
    second.kill()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    value = json.loads(out)
    assert (value["processes"], value["restarts"], value["exit_codes"]) == (2, 1, [0, 0])
    assert "ended with 137 (SIGKILL); restart 1 of 3" in err
    assert json.loads((directory / "summary.json").read_text())["status"] == "complete"
    assert "complete" in value["output"]
