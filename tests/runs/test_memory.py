"""The memory of stages: each has its own peak, and what is not known is not claimed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import psutil
import pytest
from micro_runs import journal

from jaxsi.runs import memory
from jaxsi.runs.run import Run

MIB = 2**20
needs_reset = pytest.mark.skipif(not os.access(memory.RESET, os.W_OK), reason="this system keeps the mark")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


def take(mib: int) -> None:
    """Fills an array that goes back to the system at once."""
    np.ones(mib * MIB, np.uint8)


@needs_reset
def test_a_small_stage_after_a_large_one_has_its_own_peak():
    now = psutil.Process().memory_info().rss
    with memory.peak() as large:
        take(300)
        assert large()["host"] > now + 290 * MIB
    with memory.peak() as small:
        take(60)
        assert now + 50 * MIB < small()["host"] < now + 150 * MIB
    assert "at_most" not in small()


@needs_reset
def test_a_stage_has_the_peak_of_those_inside_it_and_of_what_was_before_them():
    now = psutil.Process().memory_info().rss
    with memory.peak() as outer:
        take(300)
        with memory.peak() as inner:
            take(60)
        assert inner()["host"] < now + 150 * MIB
        assert outer()["host"] > now + 290 * MIB
    with memory.peak() as outer:
        with memory.peak():
            take(300)
        with memory.peak():
            pass
        assert outer()["host"] > now + 290 * MIB


def test_a_mark_that_cannot_be_set_back_says_at_most(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "RESET", tmp_path / "none" / "clear_refs")
    mark = [700]
    monkeypatch.setattr(memory, "host_mark", lambda: mark[0])
    with memory.peak() as first:
        mark[0] = 900
        assert first() == {"host": 900}
    with memory.peak() as second:
        assert second() == {"host": 900, "at_most": ["host"]}


def test_devices_have_the_peak_of_the_fullest_one(monkeypatch):
    marks = [5 * MIB, 7 * MIB]
    devices = [SimpleNamespace(memory_stats=lambda i=i: {"peak_bytes_in_use": marks[i]}) for i in range(2)]
    jax.devices()
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    with memory.peak() as first:
        marks[0] = 9 * MIB
        assert {k: v for k, v in first().items() if k != "host"} == {"device": 9 * MIB}
    with memory.peak() as second:
        marks[1] = 8 * MIB
        assert second()["device"] == 9 * MIB and "device" in second()["at_most"]
        assert memory.gib(second(), "device") == "≤ 0.01 GiB" and memory.taken() == "≤ 0.01 GiB"
    assert memory.taken() == ""


def refuse():
    raise RuntimeError("UNIMPLEMENTED")


@pytest.mark.parametrize("statistics", [lambda: None, lambda: {"bytes_in_use": 1}, refuse])
def test_devices_that_do_not_say_it_have_no_figure(statistics):
    known = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 1})
    assert memory.device_marks([known, SimpleNamespace(memory_stats=statistics)]) == []


def test_without_proc_the_figure_is_that_of_getrusage(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    now = psutil.Process().memory_info().rss
    assert 0.5 * now < memory.host_mark() < psutil.virtual_memory().total


def test_to_look_starts_no_backend():
    """A run whose models are all behind endpoints must not take the devices of another one."""
    code = """if True:
        import jax
        from jax._src import xla_bridge
        from jaxsi.runs import memory
        with memory.peak() as peak:
            print(sorted(peak()), xla_bridge.backends_are_initialized())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "['host'] False\n"


def test_the_journal_has_the_memory_of_each_stage_that_is_done(tmp_path: Path):
    with Run.open(tmp_path / "run", Config()) as run:
        run.at("iter_1").value("figures", lambda: 1)
        run.at("iter_1").value("figures", lambda: 2)
    entries = journal(tmp_path / "run")
    assert [(entry["event"], "memory" in entry) for entry in entries] == [
        ("start", False), ("done", True), ("reused", False),
    ]  # fmt: skip
    assert 10 * MIB < entries[1]["memory"]["host"] < psutil.virtual_memory().total
