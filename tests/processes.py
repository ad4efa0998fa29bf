"""Several real processes on this machine, for tests: each with CPU devices of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxsi.cli.supervisor import cpu_devices

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(words: Sequence[object], devices: int = 1, **variables: str) -> subprocess.Popen[str]:
    """Starts python WORDS with ``devices`` CPU devices, in a process group of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=inherited | cpu_devices(os.environ, devices) | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def start_command(*words: object, count: int, devices: int, heartbeat: int = 10) -> list[subprocess.Popen[str]]:
    """Starts `jaxsi WORDS` as ``count`` processes that find each other by their options; one alone needs no options."""
    port, command = free_port(), ["-m", "jaxsi", *words]
    if count == 1:
        return [start(command, devices)]
    options = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", count, "--heartbeat", heartbeat]
    return [start([*command, *options, "--process-id", index], devices) for index in range(count)]


def ended(processes: Sequence[subprocess.Popen[str]], timeout: float = 300) -> list[tuple[int, str, str]]:
    """Waits for processes; gives (exit code, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
