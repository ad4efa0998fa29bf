"""Progress of long work, its speed and the time left: bars on a terminal, lines in a log. Only process 0 prints.

On a terminal a run has one display from its beginning to its end: the iteration and what was measured so far, the
stage, and its pieces. Finished stages stay above it as lines.

A stage may take hours, and so may one shard of it. So the pieces of a stage report as well, down to the rows of a
batch: "iter_2/judgments 256/4096, 1.4/s, 45:00 left: sampling 300/768, 2.3/s, 3:20 left". While a program runs that
cannot be looked into, a thread repeats the last state, so that a log has a line about every `SILENCE` seconds at least.
"""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxsi.runs import memory

EVERY = 10.0  # seconds from a line to the next, if there is something new
SILENCE = 30.0  # seconds after which a line says that the work still goes on
WORTH_A_LINE = 1.0  # seconds that a finished stage took, if it is to stay on the terminal

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
        return
    before, _told.label = _told.label, label
    try:
        with (_bar if _on_terminal() else _lines)(label, total, is_piece=False) as advance:
            yield advance
    finally:
        _told.label = before


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


@dataclasses.dataclass
class _Told:
    """What is known about the run that goes on: ``label`` of the innermost stage, ``iterations`` that it has in all,
    and what was measured ``so_far``."""

    label: str = ""
    iterations: int | None = None
    so_far: str = ""

    def heading(self) -> str:
        scope = self.label.partition("/")[0]
        head, _, number = scope.rpartition("_")
        if head == "iter" and number.isdecimal():
            scope = f"iteration {number}" + ("" if self.iterations is None else f" of {self.iterations}")
        return " · ".join(part for part in (scope, self.so_far) if part)


_told = _Told()


@contextlib.contextmanager
def of_run(iterations: int | None) -> Iterator[None]:
    """Keeps one display on the terminal until the run ends; ``iterations``: how many the run has."""
    global _told
    before, _told = _told, _Told(iterations=iterations)
    with contextlib.ExitStack() as stack:
        if processes()[0] == 0 and _on_terminal() and _bars.display is None:
            stack.enter_context(_display())
        try:
            yield
        finally:
            _told = before


def measured(line: str, so_far: str) -> None:
    """Says what was measured of a model, in a line of its own; ``so_far`` stays on the display."""
    _told.so_far = so_far
    say(line)


def say(line: str) -> None:
    """Prints a line on stderr, above the display on a terminal; outside of a stage or a run, too. Process 0 only."""
    if processes()[0] != 0:
        return
    if _bars.display is not None:
        _bars.display.console.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
        print(line, file=sys.stderr, flush=True)


def stage_now() -> str:
    """The label of the innermost work that goes on, e.g. "iter_2/pairs"; "" outside of any."""
    return _told.label


def _on_terminal() -> bool:
    return sys.stderr.isatty()


def speed(amount: float, seconds: float) -> str:
    """ "43/s", "4.3/s" or, of slow work, "5.0 s each"; "" if nothing is known."""
    if not amount or seconds <= 0:
        return ""
    rate = amount / seconds
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


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
        if left is None:
            return f"{self.label}{count}"
        return f"{self.label}{count}, {speed(self.worked, self.moved - self.start)}, {_clock(left)} left"


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
    in_run: bool = False  # a run keeps it: finished stages become lines
    around: list[Any] = dataclasses.field(default_factory=list)  # tasks of the stages that go on, from the whole


_bars = _Bars()


@contextlib.contextmanager
def _display(*, in_run: bool = True) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Count(ProgressColumn):
        def render(self, task: Any) -> Text:
            if task.total is None:
                return Text(_clock(task.elapsed or 0.0), style="dim")
            worked = task.fields["worked"]
            rate = speed(worked, task.fields["moved"] - task.start_time) if worked and task.start_time else ""
            return Text(f"{task.completed:,.0f}/{task.total:,.0f}  {rate}".rstrip())

    class Display(Progress):
        def get_renderables(self) -> Iterator[Any]:
            if in_run and (heading := _told.heading()):
                yield Text(heading, style="bold")
            yield self.make_tasks_table(self.tasks)

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Count(), TimeRemainingColumn())
    with Display(*columns, console=Console(stderr=True), transient=in_run) as display:
        _bars.display, _bars.in_run = display, in_run
        try:
            yield
        finally:
            _bars.display, _bars.in_run = None, False


@contextlib.contextmanager
def _bar(label: str, total: int | None, *, is_piece: bool) -> Iterator[Advance]:
    with contextlib.ExitStack() as stack:
        if _bars.display is None:
            if total is None:
                yield _nothing
                return
            stack.enter_context(_display(in_run=False))
        display: Any = _bars.display
        start = time.monotonic()
        task = display.add_task(label if not is_piece else f"  {label}", total=total, worked=0, moved=start)
        if not is_piece:
            if _bars.around:  # only the innermost stage is shown
                display.update(_bars.around[-1], visible=False)
                stack.callback(display.update, _bars.around[-1], visible=True)
            _bars.around.append(task)
            stack.callback(_bars.around.remove, task)
        if is_piece or _bars.in_run:
            stack.callback(display.remove_task, task)
        amount = [0, 0]

        def advance(items: int, worked: bool) -> None:
            amount[0] += items
            amount[1] += items if worked else 0
            display.update(task, advance=items, worked=amount[1], moved=display.get_time())

        yield advance
        seconds = time.monotonic() - start
        if _bars.in_run and not is_piece and total is not None and amount[1] and seconds >= WORTH_A_LINE:
            line = f"{label}: {amount[0]:,} in {_clock(seconds)} ({speed(amount[1], seconds)})"
            say(f"{line}, {taken}" if (taken := memory.taken()) else line)
