"""The processes of one run on one machine: started together, watched, ended together, and restarted after a crash.

This module does not import JAX: a supervisor must not take devices from the processes that it starts.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

# Exit codes of the processes, and of their supervisor.
DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75

HEARTBEAT = 100  # seconds, JAX's own default
LONGEST_BACKOFF = 300.0  # seconds; the wait before a restart doubles up to this
TERM_SECONDS = 10.0  # between asking a process to end and killing it
POLL_SECONDS = 0.05

# Kills the process groups that are still on its list when the supervisor has ended in any way, which closes the pipe. A
# death signal of the kernel would reach the processes, but not the processes that they have started themselves.
GUARD = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervision:
    """The number of processes, and what to do if one of them fails.

    ``restarts``: how often all are started again, first after ``backoff`` seconds, then after twice as many, and so on.
    After an attempt of at least ``healthy`` seconds the count starts anew. If one process fails, the others have
    ``heartbeat`` seconds to notice. ``devices``: the number of fake CPU devices of each process, or None.
    """

    processes: int
    restarts: int = 3
    backoff: float = 5.0
    heartbeat: float = HEARTBEAT
    healthy: float = 1800.0
    devices: int | None = None

    def __post_init__(self):
        for name, least in (("processes", 1), ("restarts", 0), ("backoff", 0), ("heartbeat", 0), ("devices", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; give at least {least}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``code``: 0, 1, 2 or 75, for all processes together. ``exit_codes``: one for each process of the last attempt, or
    128 + the signal that ended it. ``output``: stdout of process 0 in the last attempt."""

    code: int
    restarts: int
    exit_codes: list[int]
    seconds: float
    output: str


def supervise(command: Sequence[str], supervision: Supervision) -> Outcome:
    """Runs ``command`` in ``supervision.processes`` processes as one run; restarts all of them after a crash.

    Their lines on stderr are passed on, with "[i] " in front for process i > 0; so are lines on stdout of processes
    i > 0. SIGTERM is passed on to all of them, and then nothing is restarted. An exception (KeyboardInterrupt) ends all
    of them. Call this function from the main thread.
    """
    start = time.monotonic()
    total = count = 0
    with _Guard() as guard, _stop_flag() as stop:
        while True:
            attempt_start = time.monotonic()
            attempt = _Attempt(command, supervision, guard, stop)
            codes = attempt.wait()
            code = _joint_code(codes, attempt.first_failure, stop.is_set)
            if time.monotonic() - attempt_start >= supervision.healthy:
                count = 0
            if code == FAILED:
                ending = _ending(codes, attempt.first_failure)
                if count < supervision.restarts:
                    seconds = backoff(supervision, count)
                    total, count = total + 1, count + 1
                    _log(f"{ending}; restart {count} of {supervision.restarts} in {seconds:g} s")
                    if not stop.within(seconds):
                        continue
                    code = STOPPED
                else:
                    _log(f"{ending}; all {supervision.restarts} restarts are used up")
            return Outcome(code, total, codes, round(time.monotonic() - start, 3), attempt.output)


def backoff(supervision: Supervision, count: int) -> float:
    """Seconds before the next restart; ``count``: restarts since the last healthy attempt."""
    return min(supervision.backoff * 2.0 ** min(count, 60), LONGEST_BACKOFF)  # 2.0**1024 would overflow


def _joint_code(codes: Sequence[int], first_failure: int | None, stopping: bool) -> int:
    """The exit code of all processes together."""
    if first_failure is None:
        return DONE
    if USAGE in codes:  # a restart would fail in the same way
        return USAGE
    # SIGTERM makes a process exit with 75, and its peers may abort when they lose it. A process that has not installed
    # its handler yet is killed.
    return STOPPED if stopping or codes[first_failure] == STOPPED else FAILED


def _ending(codes: Sequence[int], index: int | None) -> str:
    """How a process ended: "process 1 ended with 137 (SIGKILL)"."""
    code = codes[index or 0]
    name = f" ({signal.Signals(code - 128).name})" if code - 128 in _SIGNALS else ""
    return f"process {index} ended with {code}{name}"


_SIGNALS = frozenset(int(number) for number in signal.Signals)


class _Attempt:
    """The processes of one attempt, each the leader of its own session."""

    def __init__(self, command: Sequence[str], supervision: Supervision, guard: "_Guard", stop: "_Stop"):
        self.heartbeat, self.guard, self.stop = supervision.heartbeat, guard, stop
        self.first_failure: int | None = None
        self.output_lines: list[bytes] = []
        self.children: list[subprocess.Popen[bytes]] = []
        self.readers: list[threading.Thread] = []
        self.lock = threading.Lock()
        port = free_port()
        try:
            for index in range(supervision.processes):
                self._start(index, command, environment(os.environ, supervision, index, port))
        except BaseException:
            self._kill()
            raise

    def _start(self, index: int, command: Sequence[str], env: Mapping[str, str]) -> None:
        child = subprocess.Popen(
            command,
            env=env,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.children.append(child)
        self.guard.watch(child.pid)
        for pipe, is_output in ((child.stdout, index == 0), (child.stderr, False)):
            reader = threading.Thread(target=self._read, args=(pipe, index, is_output), daemon=True)
            reader.start()
            self.readers.append(reader)

    def _read(self, pipe: IO[bytes], index: int, is_output: bool) -> None:
        prefix = f"[{index}] " if index else ""
        with pipe:
            for line in pipe:
                if is_output:
                    self.output_lines.append(line)
                    continue
                text = line.decode(errors="replace").removesuffix("\n")
                with self.lock:
                    print(prefix + text, file=sys.stderr, flush=True)

    @property
    def output(self) -> str:
        return b"".join(self.output_lines).decode(errors="replace")

    def wait(self) -> list[int]:
        """Waits until all processes have ended, by themselves or because one failed. Returns their exit codes."""
        try:
            self._watch()
        except BaseException:
            self._end(signal.SIGINT)
            raise
        finally:
            self._kill()
        return [_shell_code(child.returncode) for child in self.children]

    def _watch(self) -> None:
        """Waits until all have ended, or until the others have had ``heartbeat`` seconds after a failure."""
        passed_on, deadline = False, float("inf")
        while True:
            alive = self._alive()
            failed = [index for index, child in enumerate(self.children) if child.returncode not in (None, DONE)]
            if failed and self.first_failure is None:
                self.first_failure = failed[0]
                code = self.children[failed[0]].returncode
                deadline = time.monotonic() + (0.0 if code == USAGE else self.heartbeat)
            if not alive:
                return
            if time.monotonic() >= deadline:
                self._end(signal.SIGTERM)
                return
            if self.stop.is_set and not passed_on:
                passed_on = True
                self._signal(signal.SIGTERM)
            time.sleep(POLL_SECONDS)

    def _alive(self) -> bool:
        """Whether any process runs. When a process has ended, its data workers are killed as well."""
        for child in self.children:
            if child.returncode is None and child.poll() is not None:
                self._end_group(child)
        return any(child.returncode is None for child in self.children)

    def _signal(self, number: signal.Signals) -> None:
        """Sends a signal to the processes only: they end their data workers themselves, after the last save."""
        for child in self.children:
            if child.returncode is None:
                child.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        self._signal(number)
        deadline = time.monotonic() + TERM_SECONDS
        while self._alive() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _kill(self) -> None:
        """Kills the processes that are left and reads the last lines."""
        for child in self.children:
            if child.returncode is None:
                self._end_group(child)
                child.wait()
        for reader in self.readers:
            reader.join(TERM_SECONDS)  # not for ever: a process that left its group may keep the pipe open

    def _end_group(self, child: "subprocess.Popen[bytes]") -> None:
        # The group may be empty; on macOS a group of zombies gives PermissionError.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        self.guard.forget(child.pid)


class _Guard:
    """A process that outlives the supervisor and kills the processes that it has left behind."""

    def __enter__(self) -> "_Guard":
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
            bufsize=1,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def watch(self, group: int) -> None:
        self._write(f"+{group}\n")

    def forget(self, group: int) -> None:
        self._write(f"-{group}\n")

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        # If somebody has killed the guard, the run goes on without it.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line)


class _Stop:
    """Whether SIGTERM has come. Not a threading.Event: the code that the handler interrupts might hold its lock."""

    is_set = False

    def within(self, seconds: float) -> bool:
        """Waits ``seconds``, or until SIGTERM. Returns whether it has come."""
        end = time.monotonic() + seconds
        while not self.is_set and time.monotonic() < end:
            time.sleep(min(POLL_SECONDS, seconds))
        return self.is_set


@contextlib.contextmanager
def _stop_flag() -> Iterator[_Stop]:
    stop = _Stop()

    def set_it(*_: object) -> None:
        stop.is_set = True

    before = signal.signal(signal.SIGTERM, set_it)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _log(text: str) -> None:
    print(f"jaxsi: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """A port of this machine on which nothing listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(variables: Mapping[str, str], supervision: Supervision, index: int, port: int) -> dict[str, str]:
    """``variables``, and those that tell process ``index`` its number and the coordinator's address, as JAX reads
    them."""
    environ = {
        **variables,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(supervision.processes),
        "JAX_PROCESS_ID": str(index),
    }
    if supervision.devices is not None:
        environ |= cpu_devices(variables, supervision.devices)
    return environ


def cpu_devices(variables: Mapping[str, str], count: int) -> dict[str, str]:
    """The variables that give a process ``count`` CPU devices, with the other XLA flags of ``variables``."""
    flag = "--xla_force_host_platform_device_count"
    others = [word for word in variables.get("XLA_FLAGS", "").split() if not word.startswith(flag)]
    return {"XLA_FLAGS": " ".join([*others, f"{flag}={count}"]), "JAX_PLATFORMS": "cpu"}
