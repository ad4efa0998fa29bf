"""Compiled programs, kept on disk: a command that runs again, or goes on after a kill, does not compile them again."""

import contextlib
import hashlib
import importlib.util
import os
import platform
import stat
import sys
import zlib
from pathlib import Path

FOLDER = "JAX_COMPILATION_CACHE_DIR"
SWITCH = "JAX_ENABLE_COMPILATION_CACHE"
SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

# Of the 18 s that a small run compiles on two CPU cores, programs below this take 0.5 s and are half of the files.
# JAX's own default, 1 s, leaves out programs of 5 s.
SHORTEST_SECONDS = 0.05
LIMIT = 4 * 2**30  # bytes, of all versions of JAX together
WHOLE = 0o400  # the mode of an entry that was found to be whole


class UnsafeFolderError(Exception):
    """A folder that others may write to: they could run code as this user."""


def keep_programs() -> None:
    """Has JAX, which reads these variables when it is imported, keep compiled programs in a folder of this user's.

    A folder that the user has set is JAX's concern alone, and so is everything in a program that has imported JAX
    before. Without a folder that is safe to use a line on stderr says so, and programs are compiled as they come.
    """
    if FOLDER in os.environ or os.environ.get(SWITCH, "1").lower() in ("0", "f", "false", "n", "no", "off"):
        return
    if "jax" in sys.modules:
        return
    try:
        folder = made(cache_home() / "jaxsi" / "programs" / host())
        sweep(folder.parent)
    except (UnsafeFolderError, OSError, RuntimeError) as error:  # RuntimeError: no home
        print(f"jaxsi: compiled programs are not kept: {error}; {FOLDER} may name another folder", file=sys.stderr)
        return
    os.environ[FOLDER] = str(folder)
    os.environ.setdefault(SHORTEST, str(SHORTEST_SECONDS))


def cache_home() -> Path:
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".cache"


def host() -> str:
    """Versions of JAX and the kind of this host's CPU: a program compiled for one may crash on another."""
    from importlib.metadata import version  # which takes as long as all of --help

    versions = "-".join(f"{name}{version(name)}" for name in ("jax", "jaxlib"))
    return f"{versions}-{hashlib.sha256(_cpu().encode()).hexdigest()[:12]}"


def _cpu() -> str:
    kind = [platform.system(), platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        kind += [line for line in first if line.split("\t")[0] in ("model name", "flags", "CPU part", "Features")]
    return "\n".join(kind)


def made(folder: Path) -> Path:
    """``folder``, made with the two above it where they are missing, for this user alone.

    Raises: UnsafeFolderError where one of them is somebody else's or may be written by others; OSError.
    """
    for path in (*reversed(folder.parents[:2]), folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
        if status.st_uid != os.geteuid():
            raise UnsafeFolderError(f"{path} belongs to user {status.st_uid}, and this is user {os.geteuid()}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            mode = stat.S_IMODE(status.st_mode)
            raise UnsafeFolderError(f"others may write to {path} (mode {mode:04o}); empty it, then chmod 700 it")
    return folder


def sweep(programs: Path, limit: int = LIMIT) -> None:
    """Removes entries that are half written, and of the others those used longest ago while all are above ``limit``.

    JAX writes an entry in place and never over an old one: what a killed process left would be warned of and compiled
    again in every later run. JAX's own bound of the size needs a lock at every read, and up to 0.10 ends all writing
    where a process was killed between an entry and the file with its time.
    """
    entries = []
    for path in programs.glob("*/*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process sweeps, too
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
    """Whether the entry's own checksum says that it is whole; it is not read again, then."""
    # With zstandard installed JAX uses it in place of zlib: then the entry is JAX's to judge.
    if importlib.util.find_spec("zstandard") is None:
        try:
            zlib.decompress(path.read_bytes())
        except zlib.error:
            return False
    path.chmod(WHOLE)
    return True
