"""Progress of long work: a line in a log now and then, a bar on a terminal."""

import dataclasses
import io
import re
import threading
import time

import pytest

import tiny
from jaxsi.runs import memory, progress as module
from jaxsi.runs.progress import piece, progress
from jaxsi.runs.records import Judgment, Prompt
from jaxsi.runs.run import Run
from jaxsi.stages.answers import answers, read_answers
from jaxsi.stages.judge import JudgeConfig, judge
from jaxsi.stages.prompts import Rubric
from jaxsi.training.optim import OptimConfig
from jaxsi.training.train import DPOConfig, TrainConfig, dpo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0


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
    assert log.getvalue() == "iter_1/candidates 65/100, 1.2/s, 0:28 left\n"


def test_log_has_no_line_at_the_end(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", log)
    with progress("x", 2) as advance:
        clock[0] = 60
        advance(2, True)
    assert log.getvalue() == ""


def test_pieces_of_a_stage_report_within_a_shard(clock, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", log)
    with progress("iter_1/judgments"), progress("iter_1/judgments", 512) as advance:  # the stage, and its shards
        clock[0] = 100
        advance(256, True)
        with piece("sampling", 40) as sampled:
            for _ in range(3):
                clock[0] += 6
                sampled(10, True)
            sampled(10, True)
        with piece("scoring", 40) as scored:
            clock[0] += 6
            scored(10, True)
    with piece("sampling", 40) as sampled:  # outside of a stage
        clock[0] += 100
        sampled(10, True)
    assert log.getvalue().splitlines() == [
        "iter_1/judgments 256/512, 2.6/s, 1:40 left",
        "iter_1/judgments 256/512, 2.6/s, 1:28 left: sampling 20/40, 1.7/s, 0:12 left",
        "iter_1/judgments 256/512, 2.6/s, 1:16 left: scoring 10/40, 1.7/s, 0:18 left",
    ]


def test_log_says_that_a_long_program_still_runs(monkeypatch):
    """Nothing can be known while a program is compiled or computed, but that it goes on."""
    log = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", log)
    monkeypatch.setattr(module, "SILENCE", 0.03)
    with progress("iter_2/prompts"), piece("sampling", 64):
        for _ in range(500):
            if log.getvalue().count("\n") > 1:
                break
            time.sleep(0.01)
    assert set(log.getvalue().splitlines()) == {"iter_2/prompts: sampling 0/64, 0:00 so far"}
    before = log.getvalue()
    time.sleep(0.1)
    assert log.getvalue() == before
    assert threading.active_count() == len([t for t in threading.enumerate() if t.name != "jaxsi progress"])


@pytest.mark.slow
def test_every_stage_of_judging_and_training_reports_in_a_log(clock, monkeypatch, tmp_path):
    """A shard may take an hour on a CPU: the rows, the scores and the steps in it are counted."""
    log, lm = io.StringIO(), tiny.make_lm()
    monkeypatch.setattr(module.sys, "stderr", log)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.__setitem__(0, clock[0] + 20) or clock[0])
    pairs = tiny.preference_pairs(12)
    prompts = [Prompt(id=pair.id, messages=pair.messages) for pair in pairs]
    rubric = Rubric(name="short", template="{prompt} {response}")
    optim = OptimConfig(learning_rate=1e-3)
    training = TrainConfig(optim=optim, batch_size=4, max_length=64, remat="none", dtype="float32")
    with Run.open(tmp_path / "run", Config()) as run:
        it = run.at("iter_1")
        answered = answers(prompts, [pair.chosen for pair in pairs])
        cfg = JudgeConfig(num_samples=1, max_new_tokens=4, expected=True, batch_size=4)
        it.sharded(
            "judgments", answered, read_answers, judge, lm, rubric, cfg, it.key("judge"), of=Judgment, shard_size=256
        )
        dpo(lm, pairs, DPOConfig(train=training), it)
    lines = log.getvalue()
    for pattern in (
        r"^iter_1/judgments 0/12: sampling \d+/12, \d.* \d+:\d\d left$",
        r"^iter_1/judgments 0/12: scoring \d+/12, \d.* \d+:\d\d left$",
        r"^iter_1/ref_logps_\w+: log-probabilities of pairs \d+/12, \d.*, \d+:\d\d left$",
        r"^iter_1/train \d/\d, \d.*, \d+:\d\d left$",
    ):
        assert re.search(pattern, lines, re.MULTILINE), (pattern, lines)


def test_terminal_shows_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    with progress("iter_1/train", 4) as advance:
        advance(4, True)
    assert "iter_1/train" in terminal.getvalue() and "100%" in terminal.getvalue()


def test_terminal_shows_pieces_beside_the_whole(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    with progress("iter_1/prompts"), progress("iter_1/prompts", 4) as advance:
        with piece("sampling", 8) as sampled:
            sampled(8, True)
        advance(4, True)
    assert "iter_1/prompts" in terminal.getvalue() and "100%" in terminal.getvalue()
    with piece("sampling", 8) as sampled:  # the display of the stage is closed
        sampled(8, True)


def test_only_process_0_prints(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    monkeypatch.setattr(module, "processes", lambda: (1, 2))
    with progress("x", 4) as advance:
        advance(4, True)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("amount", "seconds", "text"),
    [(430, 10, "43/s"), (43, 10, "4.3/s"), (2, 10, "5.0 s each"), (12_345, 1, "12,345/s"), (0, 5, ""), (5, 0, "")],
)
def test_speed_is_readable_at_every_size(amount, seconds, text):
    assert module.speed(amount, seconds) == text


def test_terminal_shows_a_run_with_its_iteration_the_quality_so_far_and_finished_stages(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    with module.of_run(3):
        module.measured("iteration 1: quality 69.7", "quality 69.7")
        with progress("iter_2/judgments"), progress("iter_2/judgments", 8) as advance:
            with piece("sampling", 4) as sampled:
                sampled(4, True)
            clock[0] += 4
            advance(8, True)
            module.say("jaxsi: iter_2/judgments: alarm: look")
            module._bars.display.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "iteration 2 of 3 · quality 69.7" in shown
    for line in (
        "iteration 1: quality 69.7",
        "jaxsi: iter_2/judgments: alarm: look",
        "iter_2/judgments: 8 in 0:04 (2.0/s)",
    ):
        assert line in [one.strip() for one in shown.splitlines()]


def test_terminal_shows_the_memory_of_a_finished_stage(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    monkeypatch.setattr(memory, "host_mark", lambda: 3 * 2**29)
    with module.of_run(None), memory.peak(), progress("iter_2/judgments", 8) as advance:
        clock[0] += 4
        advance(8, True)
    assert re.search(r"iter_2/judgments: 8 in 0:04 \(2\.0/s\), (≤ )?1\.50 GiB", terminal.getvalue())


def test_log_has_lines_of_what_was_measured_and_none_of_the_display(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(module.sys, "stderr", log)
    with module.of_run(3):
        with progress("iter_1/evaluation"):
            assert module.stage_now() == "iter_1/evaluation"
        module.measured("iteration 1: quality 69.7", "quality 69.7")
    assert log.getvalue() == "iteration 1: quality 69.7\n" and module.stage_now() == ""
