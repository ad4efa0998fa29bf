"""Progress of long work with the time left: a bar on a terminal, lines in a log. Only process 0 prints."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


def processes() -> tuple[int, int]:
    """(index of this process, number of processes): (0, 1) unless jax.distributed is initialised. Starts no backend."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int, bool], None]]:
    """Yields advance(items, worked), which moves a bar on a terminal, or else prints a line about every ten seconds.
    ``worked`` is false for items of an earlier run: they say nothing about the time left."""
    if processes()[0] != 0:
        yield lambda items, worked: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            yield lambda items, worked: bar.advance(task, items)
    else:
        yield _LogLines(label, total)


class _LogLines:
    """Progress for logs: "iter_2/candidates 512/4096, 3:20 left"."""

    def __init__(self, label: str, total: int):
        self.label, self.total = label, total
        self.done = self.worked = 0
        self.start = self.last_line = time.monotonic()

    def __call__(self, items: int, worked: bool) -> None:
        now = time.monotonic()
        self.done += items
        self.worked += items if worked else 0
        if now - self.last_line >= 10 and self.worked and self.done < self.total:
            left, seconds = divmod(round((now - self.start) / self.worked * (self.total - self.done)), 60)
            print(f"{self.label} {self.done}/{self.total}, {left}:{seconds:02d} left", file=sys.stderr, flush=True)
            self.last_line = now
