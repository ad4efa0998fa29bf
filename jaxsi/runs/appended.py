"""A file of JSON lines that only grows. Several processes may append to it and read it at the same time."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

_DAMAGED = object()


class AppendedLines:
    """The JSON objects of a file, one a line, in the order in which they were appended.

    A process that dies while it writes leaves at most one line cut short. Readers ignore it and count it in ``torn``,
    and the next one who appends ends it.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._position = 0  # bytes read so far
        self._damaged, self._tail = 0, False

    @property
    def torn(self) -> int:
        """The number of lines seen so far that are not JSON."""
        return self._damaged + self._tail

    def read(self) -> Iterator[Any]:
        """The values that were added since the last call. Raises: OSError."""
        if not self.path.exists():
            return
        with self.locked("rb", fcntl.LOCK_SH) as file:
            file.seek(self._position)
            *lines, tail = file.read().split(b"\n")
        self._position += sum(len(line) + 1 for line in lines)
        values = [_value(line) for line in lines if line.strip()]
        last = _value(tail)  # nobody is writing now: its writer is dead
        if isinstance(last, dict):  # whole but for the line break
            self._position += len(tail)
            values.append(last)
        self._tail = bool(tail) and not isinstance(last, dict)
        self._damaged += sum(value is _DAMAGED for value in values)
        yield from (value for value in values if value is not _DAMAGED)

    def append(self, values: Iterable[Any]) -> None:
        """Adds values; they are on disk when this returns. Raises: OSError."""
        lines = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values).encode()
        with self.locked("ab+", fcntl.LOCK_EX) as file:
            end = file.seek(0, os.SEEK_END)
            cut_short = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
            file.write(b"\n" * cut_short + lines)
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def locked(self, mode: str, lock: int) -> Iterator[IO[bytes]]:
        """The open file, and its folder if it has to be made. Raises: OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open(mode) as file:
            fcntl.flock(file, lock)  # released when the file closes
            yield file


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return _DAMAGED
