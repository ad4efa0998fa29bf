"""SIGTERM, by which schedulers announce that a machine goes: long work asks between its steps and stops where all is
saved; anywhere else the command stops at once. Only the command line listens; importing the package changes nothing."""

import contextlib
import itertools
import signal
import sys
from collections.abc import Iterator
from typing import Any


class Stopped(BaseException):
    """SIGTERM has come; ``str()`` says what is kept. No error: as KeyboardInterrupt it is caught at the top alone."""


class _Notice:
    """Whether SIGTERM has come, and whether someone will ask."""

    came = False
    asking = 0
    polls = itertools.count()


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """Listens to SIGTERM: outside of ``polled`` it raises ``Stopped``, inside ``asked`` becomes true; a second one
    raises in any case. Of several processes JAX listens itself, from the moment they have joined."""

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
    """Work that calls ``asked`` between its steps and stops itself."""
    _Notice.asking += 1
    try:
        yield
    finally:
        _Notice.asking -= 1


def check() -> None:
    """Between two pieces of work, none of which ``polled``: raises ``Stopped`` where the command was told to stop. It
    asks, so of several processes all make the same calls."""
    if not _Notice.asking and asked():
        raise Stopped("what is finished is kept")


def asked() -> bool:
    """Whether to save and stop now. Of several processes all are told at the same call, so all make the same calls."""
    jax = sys.modules.get("jax")
    if not _Notice.came and jax is not None and jax.distributed.is_initialized():
        from jax.experimental import multihost_utils

        # True at one number alone, the same on all processes, and never again: remembered here.
        _Notice.came = multihost_utils.reached_preemption_sync_point(next(_Notice.polls))
    return _Notice.came
