"""Where a run came from: the commands that made it, the code, the versions and the devices. For people and model cards;
no computation depends on it, and it is not compared on resume."""

import contextlib
import datetime
import json
import platform
import subprocess
import sys
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jaxsi.runs.progress import processes
from jaxsi.runs.records import write_atomically

FILE = "provenance.json"
COMMAND: ContextVar[str | None] = ContextVar("command", default=None)  # of this process; None from Python
PACKAGES = ("jaxsi", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


def note(directory: Path) -> None:
    """Adds this process to DIR/provenance.json, a list with an entry for each time that the run was taken up (process
    0). It is not worth a failure: a disk that cannot take it will be an error of the run itself."""
    if processes()[0] != 0:
        return
    with contextlib.suppress(OSError):
        entries = [*read(directory), _now()]
        text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
        write_atomically(directory / FILE, [text.encode("utf-8", "backslashreplace")])


def read(directory: Path) -> list[dict[str, Any]]:
    """The entries of DIR/provenance.json; [] if there are none, or if the file is damaged."""
    try:
        entries = json.loads((directory / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _now() -> dict[str, Any]:
    jax = sys.modules.get("jax")
    devices = [] if jax is None else jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": COMMAND.get(),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "devices": f"{len(devices)} x {devices[0].device_kind}" if devices else None,
        "processes": processes()[1],
    }


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the repository that tracks ``folder``, by default that of this package, with "-dirty" if files were
    changed; None outside of one."""
    tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"]
    describe = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:  # an environment inside another project's repository is not that project
        subprocess.run(tracked, capture_output=True, check=True, timeout=20)
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
