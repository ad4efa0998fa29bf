"""Runs of the micro configs, for tests: each is made once for all files and all workers, with its stops on the way."""

import fcntl
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from processes import ended, start

from jaxsi.methods.start import finish

MICRO = Path(__file__).parent / "micro"


def micro(name: str) -> Path:
    """The config file of a micro run."""
    return MICRO / f"{name}.py"


def run_method(config: Any, directory: Path) -> Path:
    """Runs a config from Python, as the command line does."""
    finish(config, directory)
    return directory


def artefacts(directory: Path) -> dict[str, str]:
    """Hash of every record file and training log, and the fingerprint of every model."""
    files = [path for path in sorted(directory.rglob("*.jsonl")) if path.name != "journal.jsonl"]
    hashes = {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    for manifest in sorted(directory.glob("**/checkpoint/weights/jaxsi.json")):
        hashes[str(manifest.relative_to(directory))] = json.loads(manifest.read_text())["meta"]["fingerprint"]
    return hashes


def journal(directory: Path) -> list[dict[str, Any]]:
    """The entries of a run's journal; a line that is still being written is left out."""
    path = directory / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


class MicroRun(NamedTuple):
    """``whole``: a run without a stop. ``stopped``: another one, which was stopped at each of ``stops`` and taken up
    again. Tests that open a run write to it: they take a copy."""

    whole: Path
    stopped: Path
    stops: list[list[str]]


@functools.cache
def micro_run(name: str) -> MicroRun:
    """The micro run of a method on one device. Whichever test comes first makes it; other workers wait for it."""
    folder = Path(os.environ["JAXSI_TEST_RUNS"]) / name
    folder.mkdir(exist_ok=True)
    stops = folder / "stops.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stops.exists():
            [(code, _, err)] = ended([start(["tests/stop_everywhere.py", micro(name), folder])], timeout=550)
            assert code == 0, err
    return MicroRun(folder / "whole", folder / "stopped", json.loads(stops.read_text()))
