"""SIGTERM, by which schedulers announce that a machine will go away. Long work asks between its steps whether to stop,
saves everything and stops; other work stops at once. Only the command line listens: importing this module does not.
"""

import contextlib
import itertools
import signal
import sys
from collections.abc import Iterator
from typing import Any


class Stopped(BaseException):
    """SIGTERM has come; ``str()`` says what is kept. Like KeyboardInterrupt it is not an error, and only the top level
    catches it."""


class _Notice:
    """Whether SIGTERM has come, and how many pieces of work now stop themselves."""

    came = False
    stopping_themselves = 0
    polls = itertools.count()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Listens for SIGTERM. It raises ``Stopped``, but inside ``stops_itself`` only ``requested`` becomes true. A second
    SIGTERM always raises. With several processes JAX itself listens, from the moment they have joined."""

    def on_signal(number: int, frame: Any) -> None:
        before, _Notice.came = _Notice.came, True
        if before or not _Notice.stopping_themselves:
            raise Stopped("what is finished is kept")

    previous = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        _Notice.came = False


@contextlib.contextmanager
def stops_itself() -> Iterator[None]:
    """Marks work that asks ``requested`` between its steps, and then saves and stops."""
    _Notice.stopping_themselves += 1
    try:
        yield
    finally:
        _Notice.stopping_themselves -= 1


def check() -> None:
    """For use between two pieces of work, outside of ``stops_itself``.

    Raises: ``Stopped`` if SIGTERM has come. All processes must make the same calls.
    """
    if not _Notice.stopping_themselves and requested():
        raise Stopped("what is finished is kept")


def requested() -> bool:
    """Whether to save and stop now. It becomes true at the same call on all processes; all must make the same calls."""
    jax = sys.modules.get("jax")
    if not _Notice.came and jax is not None and jax.distributed.is_initialized():
        from jax.experimental import multihost_utils

        # True for one number only, the same on all processes, and never again. Hence it is stored.
        _Notice.came = multihost_utils.reached_preemption_sync_point(next(_Notice.polls))
    return _Notice.came
