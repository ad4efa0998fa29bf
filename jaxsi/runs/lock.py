"""The lock of a run directory: one process at a time, and none after that process has died."""

import fcntl
import os
from pathlib import Path

from jaxsi.runs.config_snapshot import RunError


def take_lock(path: Path) -> int:
    """A descriptor that holds the run directory ``path`` until it is closed.

    Raises: RunError if another process holds it.
    """
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it when the process dies
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise RunError(f"{path} is in use by {holder}; wait for it, stop it, or give another directory") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode())
    return descriptor


def is_locked(path: Path) -> bool:
    """Whether a live process holds the run directory ``path``."""
    try:
        with (path / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
