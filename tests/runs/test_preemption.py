"""SIGTERM stops one process at once, or at the point where its work asks. See test_multihost for two processes."""

import os
import signal

import jax
import numpy as np
import pytest

import tiny
from jaxsi.runs import preemption
from jaxsi.runs.run import Run
from jaxsi.sampling import generate
from jaxsi.training import batches, train
from jaxsi.training.optim import OptimConfig
from jaxsi.training.reference import reference_logps
from tests.training.test_train import Config


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_stops_at_once_outside_of_polled_and_the_old_handler_returns():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.listening():
        assert not preemption.requested()
        with pytest.raises(preemption.Stopped):
            terminate()
    assert signal.getsignal(signal.SIGTERM) is before


def test_polled_work_sees_sigterm_and_a_second_one_raises():
    with preemption.listening(), preemption.stops_itself():
        terminate()
        assert preemption.requested()
        with pytest.raises(preemption.Stopped):
            terminate()
    assert not preemption.requested()


def test_check_stops_after_polled_work_that_did_not_ask():
    with preemption.listening():
        with preemption.stops_itself():
            terminate()
            preemption.check()
        with pytest.raises(preemption.Stopped, match="what is finished is kept"):
            preemption.check()


def stop_by_jax(monkeypatch, poll):
    """Acts as one of several processes that JAX stops at this poll. The list returned fills with the polls' numbers."""
    polls = []
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point",
        lambda number: polls.append(number) or len(polls) == poll,
    )
    return polls


def test_next_stage_stops_all_processes_at_the_same_poll(tmp_path, monkeypatch):
    calls = []
    with preemption.listening(), Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        polls = stop_by_jax(monkeypatch, 3)
        assert [scope.value(name, lambda: calls.append(1) or len(calls)) for name in ("a", "b", "a")] == [1, 2, 1]
        with pytest.raises(preemption.Stopped, match="what is finished is kept"):
            scope.value("c", lambda: calls.append(1) or len(calls))
        assert len(polls) == 3 and polls == list(range(polls[0], polls[0] + 3))
    with Run.open(tmp_path / "run", Config()) as run:
        assert run.at("iter_1").value("c", lambda: calls.append(1) or len(calls)) == 3


def test_long_stage_stops_all_processes_between_waves_and_batches(tmp_path, monkeypatch):
    lm = tiny.make_lm()
    prompts, keys = [[5, 6, 7]] * 5, jax.random.split(jax.random.key(0), 5)

    def sample():
        return generate.generate_ids(lm, prompts, keys, max_new_tokens=4, batch_size=2)

    whole = sample()
    pair = tuple(batches.Sequence_(np.asarray([5, 6, n], np.int32), np.asarray([0, 0, 1], bool)) for n in (7, 8))
    adam = OptimConfig(learning_rate=1e-3)
    config = train.TrainConfig(optim=adam, batch_size=8, max_length=64, remat="none", dtype="bfloat16")
    for work in (sample, lambda: reference_logps(lm, [pair] * 20, config)):
        with preemption.listening(), monkeypatch.context() as patch:
            polls = stop_by_jax(patch, 2)
            with pytest.raises(preemption.Stopped):
                work()
            assert len(polls) == 2
    assert sample() == whole


def test_importing_the_package_installs_no_handler():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
