"""Progress of long work with the time left: bars on a terminal, lines in a log. Only process 0 prints.

A stage may take hours, and so may one shard of it. So the pieces of a stage report as well, down to the rows of a
batch: "iter_2/judgments 256/4096, 2:10:00 left: sampling 300/768, 3:20 left". While a program runs that cannot be
looked into, a thread repeats the last state, so that a log has a line about every `SILENCE` seconds at least.
"""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

EVERY = 10.0  # seconds from a line to the next, if there is something new
SILENCE = 30.0  # seconds after which a line says that the work still goes on

Advance = Callable[[int, bool], None]


def processes() -> tuple[int, int]:
    """(index of this process, number of processes): (0, 1) unless jax.distributed is initialised. Starts no backend."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


@contextlib.contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Advance]:
    """Yields advance(items, worked), which moves a bar on a terminal, or else prints a line about every ten seconds.
    ``worked`` is false for items of an earlier run: they say nothing about the time left.

    Without ``total`` nothing is known about the work but its name, and what its pieces report.
    """
    if processes()[0] != 0:
        yield _nothing
    elif sys.stderr.isatty():
        with _bar(label, total, is_piece=False) as advance:
            yield advance
    else:
        with _lines(label, total, is_piece=False) as advance:
            yield advance


@contextlib.contextmanager
def piece(label: str, total: int) -> Iterator[Advance]:
    """`progress` of a piece of the work whose progress is reported now, such as sampling in a shard. Outside of any
    nothing is printed: short calls from Python stay silent."""
    if _bars.display is not None:
        with _bar(label, total, is_piece=True) as advance:
            yield advance
    elif _log.pieces:
        with _lines(label, total, is_piece=True) as advance:
            yield advance
    else:
        yield _nothing


def _nothing(items: int, worked: bool) -> None:
    pass


# ---- a log -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Piece:
    label: str
    total: int | None
    is_piece: bool
    start: float
    done: int = 0
    worked: int = 0
    moved: float = 0.0  # when it advanced last

    def left(self, now: float) -> float | None:
        """Seconds left at the pace so far; None if there is no pace, or nothing left."""
        if not self.worked or self.total is None or self.done >= self.total:
            return None
        pace = (self.moved - self.start) / self.worked
        return max(pace * (self.total - self.done) - (now - self.moved), 0.0)

    def text(self, now: float) -> str:
        count = "" if self.total is None else f" {self.done}/{self.total}"
        left = self.left(now)
        return f"{self.label}{count}" + ("" if left is None else f", {_clock(left)} left")


class _Log:
    """What is going on now, from the whole to its pieces, and when a line was printed last."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.last_line = 0.0
        self.lock = threading.Lock()

    def tell(self, *, after: float) -> None:
        """Prints a line if none was printed for ``after`` seconds."""
        now = time.monotonic()
        with self.lock:
            if not self.pieces or now - self.last_line < after:
                return
            first = max(i for i, one in enumerate(self.pieces) if not one.is_piece)
            shown = self.pieces[first:]
            line = ": ".join(one.text(now) for one in shown)
            if all(one.left(now) is None for one in shown):
                line += f", {_clock(now - shown[0].start)} so far"
            print(line, file=sys.stderr, flush=True)
            self.last_line = now


_log = _Log()


@contextlib.contextmanager
def _lines(label: str, total: int | None, *, is_piece: bool) -> Iterator[Advance]:
    one = _Piece(label, total, is_piece, time.monotonic())
    one.moved = one.start

    def advance(items: int, worked: bool) -> None:
        one.done += items
        one.worked += items if worked else 0
        one.moved = time.monotonic()
        if one.left(one.moved) is not None:
            _log.tell(after=EVERY)

    with contextlib.ExitStack() as stack:
        if not _log.pieces:
            _log.last_line = one.start
            stack.enter_context(_signs_of_life())
        _log.pieces.append(one)
        stack.callback(_log.pieces.remove, one)
        yield advance


@contextlib.contextmanager
def _signs_of_life() -> Iterator[None]:
    """A thread that prints the last state when nothing has for `SILENCE` seconds. It touches no device."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SILENCE / 3):
            _log.tell(after=SILENCE)

    thread = threading.Thread(target=watch, name="jaxsi progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


# ---- a terminal ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Bars:
    display: Any = None  # the rich.progress.Progress that is shown now: there can be one only


_bars = _Bars()


@contextlib.contextmanager
def _bar(label: str, total: int | None, *, is_piece: bool) -> Iterator[Advance]:
    if total is None:
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import Progress

    with contextlib.ExitStack() as stack:
        if _bars.display is None:
            _bars.display = stack.enter_context(Progress(console=Console(stderr=True)))
            stack.callback(setattr, _bars, "display", None)
        display = _bars.display
        task = display.add_task(label, total=total)
        if is_piece:
            stack.callback(display.remove_task, task)
        yield lambda items, worked: display.advance(task, items)
