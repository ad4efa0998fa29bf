"""Progress of long work: a line in a log now and then, a bar on a terminal."""

import io

import pytest

from jaxsi.runs import progress as module
from jaxsi.runs.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_log_has_a_line_about_every_ten_seconds_with_the_time_left(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", log)
    with progress("iter_1/candidates", 100) as advance:
        advance(50, False)  # from an earlier run, so it does not count towards the pace
        for _ in range(5):
            clock[0] += 4
            advance(5, True)
    assert log.getvalue() == "iter_1/candidates 65/100, 0:28 left\n"


def test_log_has_no_line_at_the_end(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", log)
    with progress("x", 2) as advance:
        clock[0] = 60
        advance(2, True)
    assert log.getvalue() == ""


def test_terminal_shows_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    with progress("iter_1/train", 4) as advance:
        advance(4, True)
    assert "iter_1/train" in terminal.getvalue() and "100%" in terminal.getvalue()


def test_only_process_0_prints(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    monkeypatch.setattr(module, "processes", lambda: (1, 2))
    with progress("x", 4) as advance:
        advance(4, True)
    assert terminal.getvalue() == ""
