"""The processes of one run on one machine: started together, watched, ended together, and started again after a crash.

No JAX here: a supervisor takes no device from the processes that it starts.
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

# What the processes end with, and so does their supervisor.
DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75

HEARTBEAT = 100  # seconds, JAX's own
LONGEST_BACKOFF = 300.0  # seconds; the wait before a restart doubles up to this
TERM_SECONDS = 10.0  # from asking a process to end to ending it
POLL_SECONDS = 0.05

# Kills the groups that it was told of and not told off again when the supervisor is gone, however that ended: then the
# pipe is at its end. A death signal of the kernel would reach the processes, and not what they have started themselves.
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
    """How many processes, and what is done when one of them fails.

    ``restarts`` is how often all are started again, after ``backoff`` seconds, then twice as many, and so on; an
    attempt of ``healthy`` seconds starts the count anew. When one process has failed the others have ``heartbeat``
    seconds to notice. ``devices`` fake CPU devices for each process, where given.
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
                raise ValueError(f"{name} is {value}; it is at least {least}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``code``: 0, 1, 2 or 75, of all processes together; ``exit_codes``: of each in the last attempt, 128 + the signal
    for one that a signal ended; ``output``: what process 0 of the last attempt wrote on stdout."""

    code: int
    restarts: int
    exit_codes: list[int]
    seconds: float
    output: str


def supervise(command: Sequence[str], how: Supervision) -> Outcome:
    """Runs ``how.processes`` times ``command`` as one run; starts all of them again when one has crashed.

    What they write on stderr is passed on line by line, behind "[i] " for process i > 0, and so is what those write on
    stdout. SIGTERM is passed on to them, and nothing is started again. An exception (KeyboardInterrupt) ends them all.
    Call it from the main thread.
    """
    began = time.monotonic()
    total = count = 0
    with _Guard() as guard, _stop_flag() as stop:
        while True:
            started = time.monotonic()
            attempt = _Attempt(command, how, guard, stop)
            codes = attempt.ended()
            code = _together(codes, attempt.first_failure, stop.is_set)
            if time.monotonic() - started >= how.healthy:
                count = 0
            if code == FAILED and count < how.restarts:
                seconds = backoff(how, count)
                total, count = total + 1, count + 1
                _say(
                    f"process {_told(codes, attempt.first_failure)}; restart {count} of {how.restarts} in {seconds:g} s"
                )
                if not stop.within(seconds):
                    continue
                code = STOPPED
            elif code == FAILED:
                _say(f"process {_told(codes, attempt.first_failure)}; no restart left of {how.restarts}")
            return Outcome(code, total, codes, round(time.monotonic() - began, 3), attempt.output)


def backoff(how: Supervision, count: int) -> float:
    """Seconds before a restart, of which there were ``count`` since the last healthy attempt."""
    return min(how.backoff * 2.0 ** min(count, 60), LONGEST_BACKOFF)  # 2.0**1024 is no float


def _together(codes: Sequence[int], first_failure: int | None, stopping: bool) -> int:
    """The exit code of all: wrong usage is never worth a restart, and what a signal has stopped goes on later."""
    if first_failure is None:
        return DONE
    if USAGE in codes:
        return USAGE
    # Who is stopped says so with 75; its peers may abort when they lose it. Before a process takes signals it dies.
    return STOPPED if stopping or codes[first_failure] == STOPPED else FAILED


def _told(codes: Sequence[int], index: int | None) -> str:
    code = codes[index or 0]
    return f"{index} ended with {code}" + (f" ({signal.Signals(code - 128).name})" if code - 128 in _SIGNALS else "")


_SIGNALS = frozenset(int(number) for number in signal.Signals)


class _Attempt:
    """The processes of one attempt, each the leader of a session of its own."""

    def __init__(self, command: Sequence[str], how: Supervision, guard: "_Guard", stop: "_Stop"):
        self.how, self.guard, self.stop = how, guard, stop
        self.first_failure: int | None = None
        self.kept: list[bytes] = []
        self.children: list[subprocess.Popen[bytes]] = []
        self.readers: list[threading.Thread] = []
        self.lock = threading.Lock()
        port = free_port()
        try:
            for index in range(how.processes):
                self._start(index, command, environment(os.environ, how, index, port))
        except BaseException:
            self._kill()
            raise

    def _start(self, index: int, command: Sequence[str], env: Mapping[str, str]) -> None:
        child = subprocess.Popen(
            command, env=env, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.children.append(child)
        self.guard.watch(child.pid)
        for pipe, kept in ((child.stdout, index == 0), (child.stderr, False)):
            reader = threading.Thread(target=self._read, args=(pipe, index, kept), daemon=True)
            reader.start()
            self.readers.append(reader)

    def _read(self, pipe: IO[bytes], index: int, kept: bool) -> None:
        prefix = f"[{index}] " if index else ""
        with pipe:
            for line in pipe:
                if kept:
                    self.kept.append(line)
                    continue
                text = line.decode(errors="replace").removesuffix("\n")
                with self.lock:
                    print(prefix + text, file=sys.stderr, flush=True)

    @property
    def output(self) -> str:
        return b"".join(self.kept).decode(errors="replace")

    def ended(self) -> list[int]:
        """Waits until all have ended, of themselves or because one has failed; their exit codes."""
        try:
            self._wait()
        except BaseException:
            self._end(signal.SIGINT)
            raise
        finally:
            self._kill()
        return [_shell_code(child.returncode) for child in self.children]

    def _wait(self) -> None:
        """Until all have ended, or the others have had their time since one has failed."""
        passed_on, deadline = False, float("inf")
        while True:
            alive = self._alive()
            failed = [index for index, child in enumerate(self.children) if child.returncode not in (None, DONE)]
            if failed and self.first_failure is None:
                self.first_failure = failed[0]
                code = self.children[failed[0]].returncode
                deadline = time.monotonic() + (0.0 if code == USAGE else self.how.heartbeat)
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
        """Whether a process runs; what one that has ended leaves behind (data workers) ends with it."""
        for child in self.children:
            if child.returncode is None and child.poll() is not None:
                self._end_group(child)
        return any(child.returncode is None for child in self.children)

    def _signal(self, number: signal.Signals) -> None:
        """To the processes alone: their data workers are theirs to end, after the last save."""
        for child in self.children:
            if child.returncode is None:
                child.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        self._signal(number)
        deadline = time.monotonic() + TERM_SECONDS
        while self._alive() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def _kill(self) -> None:
        """Ends what is left and takes in the last lines."""
        for child in self.children:
            if child.returncode is None:
                self._end_group(child)
                child.wait()
        for reader in self.readers:
            reader.join(TERM_SECONDS)  # a process that has left its group may hold the pipe for ever

    def _end_group(self, child: "subprocess.Popen[bytes]") -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it; on macOS only zombies
            os.killpg(child.pid, signal.SIGKILL)
        self.guard.forget(child.pid)


class _Guard:
    """A process that outlives the supervisor for long enough to kill what it has left."""

    def __enter__(self) -> "_Guard":
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GUARD], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            start_new_session=True, text=True, bufsize=1,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def watch(self, group: int) -> None:
        self._tell(f"+{group}\n")

    def forget(self, group: int) -> None:
        self._tell(f"-{group}\n")

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        # Somebody has killed the guard: the run goes on, less guarded.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line)


class _Stop:
    """Whether SIGTERM has come. (An Event has a lock, which the code that the handler interrupts may hold.)"""

    is_set = False

    def within(self, seconds: float) -> bool:
        """Waits as long, or until SIGTERM."""
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


def _say(text: str) -> None:
    print(f"jaxsi: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(given: Mapping[str, str], how: Supervision, index: int, port: int) -> dict[str, str]:
    """The environment of process ``index``: where the coordinator is and who it is itself, as JAX reads them."""
    own = {
        **given,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(how.processes),
        "JAX_PROCESS_ID": str(index),
    }
    if how.devices is not None:
        flag = "--xla_force_host_platform_device_count"
        kept = [word for word in given.get("XLA_FLAGS", "").split() if not word.startswith(flag)]
        own |= {"XLA_FLAGS": " ".join([*kept, f"{flag}={how.devices}"]), "JAX_PLATFORMS": "cpu"}
    return own
