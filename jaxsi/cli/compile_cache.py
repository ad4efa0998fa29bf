"""Keeps compiled programs on disk, so that a command that runs again, or goes on after a kill, need not recompile."""

import contextlib
import hashlib
import importlib.util
import os
import platform
import stat
import sys
import zlib
from pathlib import Path

from jaxsi.runs.cache import cache_home

FOLDER = "JAX_COMPILATION_CACHE_DIR"
SWITCH = "JAX_ENABLE_COMPILATION_CACHE"
SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

# A small run compiles for 18 s on two CPU cores. Programs below this limit take 0.5 s of that and would be half of
# the files. JAX's own default, 1 s, would skip programs that take 5 s in total.
SHORTEST_SECONDS = 0.05
LIMIT = 4 * 2**30  # bytes, for all versions of JAX together
WHOLE = 0o400  # the mode that marks an entry as checked and complete


class UnsafeFolderError(Exception):
    """Other users may write to the folder, so they could run code as this user."""


def keep_programs() -> None:
    """Tells JAX, through variables that it reads on import, to keep compiled programs in a folder of this user.

    Does nothing if the user has set a folder, or if JAX is already imported. If there is no safe folder, a line on
    stderr says so and nothing is kept.
    """
    if FOLDER in os.environ or os.environ.get(SWITCH, "1").lower() in ("0", "f", "false", "n", "no", "off"):
        return
    if "jax" in sys.modules:
        return
    try:
        folder = private_folder(cache_home() / "jaxsi" / "programs" / host())
        sweep(folder.parent)
    except (UnsafeFolderError, OSError, RuntimeError) as error:  # RuntimeError: no home directory
        print(f"jaxsi: compiled programs are not kept: {error}; or set {FOLDER} to another folder", file=sys.stderr)
        return
    os.environ[FOLDER] = str(folder)
    os.environ.setdefault(SHORTEST, str(SHORTEST_SECONDS))


def host() -> str:
    """The versions of JAX and the kind of this host's CPU: a program compiled for one kind may crash on another."""
    from importlib.metadata import version  # this import takes as long as all of --help

    versions = "-".join(f"{name}{version(name)}" for name in ("jax", "jaxlib"))
    return f"{versions}-{hashlib.sha256(_cpu().encode()).hexdigest()[:12]}"


def _cpu() -> str:
    kind = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        kind += [line for line in first if line.split("\t")[0] in ("model name", "flags", "CPU part", "Features")]
    return "\n".join(kind)


def private_folder(folder: Path) -> Path:
    """Creates ``folder`` and its two parents, if missing, for this user only, and returns it.

    Raises: UnsafeFolderError: if one of the three belongs to another user or is writable for others; OSError.
    """
    for path in (*reversed(folder.parents[:2]), folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.geteuid():
            raise UnsafeFolderError(f"{path} belongs to user {status.st_uid}, but this is user {os.geteuid()}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(status.st_mode)
            raise UnsafeFolderError(f"others may write to {path} (mode {mode:04o}); empty it, then chmod 700 it")
    return folder


def sweep(programs: Path, limit: int = LIMIT) -> None:
    """Removes half-written entries, then the least recently used ones until the rest is within ``limit`` bytes.

    JAX writes an entry in place and never overwrites one. So every later run would warn about an entry that a killed
    process left half-written, and compile the program again. JAX has a size limit of its own, but it takes a lock at
    every read; and up to 0.10, if a process was killed between writing an entry and the file with its time, nothing is
    written any more.
    """
    entries = []
    for path in programs.glob("*/*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process may sweep at the same time
            status = path.stat()
            if stat.S_IMODE(status.st_mode) != WHOLE and not _mark_whole(path):
                path.unlink()
                continue
            entries.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    size = sum(size for _, size, _ in entries)
    for _, freed, path in sorted(entries):
        if size <= limit:
            break
        path.unlink(missing_ok=True)
        size -= freed


def _mark_whole(path: Path) -> bool:
    """Whether the entry is complete by its own checksum. Its mode then records that, so that it is checked once."""
    # If zstandard is installed, JAX uses it instead of zlib, and JAX itself has to judge the entry.
    if importlib.util.find_spec("zstandard") is None:
        try:
            zlib.decompress(path.read_bytes())
        except zlib.error:
            return False
    path.chmod(WHOLE)
    return True
