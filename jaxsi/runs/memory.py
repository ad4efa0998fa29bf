"""How much memory a stage took at most: the process on the host, and its fullest device.

Both are high-water marks. Linux sets the mark of a process back when asked to, so each stage has a mark of its own. The
mark of a device cannot be set back: if it rose in a stage it is that stage's peak, and if not, the stage took no more.
"""

import contextlib
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux: proc(5)

_blocks: list["_Block"] = []  # those that go on, from the outermost


def host_mark() -> int:
    """The largest resident set of this process in bytes, since it began or since `reset_host`."""
    with contextlib.suppress(OSError, StopIteration):  # else: getrusage may give the figure of the parent process
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_host() -> bool:
    """Sets the mark of the process back to its resident set of now; whether the system lets it."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def device_marks(devices: Iterable[Any]) -> list[int]:
    """The most bytes that were in use on each device since this process began; [] if one of them does not say it, as
    CPUs."""
    marks: list[int] = []
    for device in devices:
        try:
            marks.append((device.memory_stats() or {})["peak_bytes_in_use"])
        except (KeyError, RuntimeError):  # RuntimeError: a backend without statistics
            return []
    return marks


class _Block:
    """A piece of work whose peak is wanted, from now on."""

    def __init__(self) -> None:
        self.host, self.device = host_mark(), _device_mark() or 0
        for around in _blocks:
            around.seen = max(around.seen, self.host)
        self.was_reset = reset_host()
        self.seen = 0  # the mark before a block inside this one set it back

    def so_far(self) -> dict[str, Any]:
        host, device = max(host_mark(), self.seen), _device_mark()
        at_most = [] if self.was_reset or host > self.host else ["host"]
        at_most += ["device"] if device is not None and device <= self.device else []
        known = {"host": host} if device is None else {"host": host, "device": device}
        return {**known, "at_most": at_most} if at_most else known


@contextlib.contextmanager
def peak() -> Iterator[Callable[[], dict[str, Any]]]:
    """Yields a function that says what was taken at most since the beginning of the block: {"host": bytes, "device":
    bytes, if devices say it, "at_most": those of the two whose mark did not rise here and could not be set back}.
    Blocks may be inside one another."""
    block = _Block()
    _blocks.append(block)
    try:
        yield block.so_far
    finally:
        _blocks.remove(block)


def taken() -> str:
    """What the innermost block has taken on a device, or else on the host, e.g. "1.52 GiB"; "" outside of any."""
    found = _blocks[-1].so_far() if _blocks else {}
    return gib(found, "device") or gib(found, "host")


def _device_mark() -> int | None:
    """The mark of the fullest device. Starts no backend: a run that needs no devices must not take them."""
    if "jax" not in sys.modules:
        return None
    import jax
    from jax._src import xla_bridge  # there is no public way to ask

    marks = device_marks(jax.local_devices()) if xla_bridge.backends_are_initialized() else []
    return max(marks, default=None)


def gib(memory: dict[str, Any], of: str) -> str:
    """The figure of "host" or "device" for people: "1.52 GiB", or "≤ 1.52 GiB"; "" if it is not known."""
    value = memory.get(of)
    return "" if value is None else f"{'≤ ' if of in memory.get('at_most', ()) else ''}{value / 2**30:,.2f} GiB"
