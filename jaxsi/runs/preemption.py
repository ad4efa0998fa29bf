"""SIGTERM, by which schedulers announce that a machine will go away. Long work asks for it between its steps and stops
once everything is saved; other work stops at once. Only the command line listens for it: importing does not.
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
    """Whether SIGTERM has come, and how many pieces of work will ask for it."""

    came = False
    asking = 0
    polls = itertools.count()


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Listens for SIGTERM. Outside of ``polled`` it raises ``Stopped``; inside, ``asked`` becomes true. A second
    SIGTERM always raises. With several processes JAX itself listens, from the moment they have joined."""

    def on_signal(number: int, frame: Any) -> None:
        before, _Notice.came = _Notice.came, True
        if before or not _Notice.asking:
            raise Stopped("what is finished is kept")

    previous = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        _Notice.came = False


@contextlib.contextmanager
def polled() -> Iterator[None]:
    """Marks work that calls ``asked`` between its steps and stops itself."""
    _Notice.asking += 1
    try:
        yield
    finally:
        _Notice.asking -= 1


def check() -> None:
    """Call this between two pieces of work, outside of ``polled``. Raises: ``Stopped``: if SIGTERM has come. It calls
    ``asked``, so all processes must make the same calls."""
    if not _Notice.asking and asked():
        raise Stopped("what is finished is kept")


def asked() -> bool:
    """Whether to save and stop now. It becomes true at the same call on all processes; all must make the same calls."""
    jax = sys.modules.get("jax")
    if not _Notice.came and jax is not None and jax.distributed.is_initialized():
        from jax.experimental import multihost_utils

        # True for one number only, the same on all processes, and never again. Hence it is stored.
        _Notice.came = multihost_utils.reached_preemption_sync_point(next(_Notice.polls))
    return _Notice.came
