"""What SIGTERM does to one process: it stops at once, or where the work asks; for two see test_multihost."""

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
from tests.training.test_train import Config


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_outside_of_work_that_asks_the_command_stops_at_once_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.noticed():
        assert not preemption.asked()
        with pytest.raises(preemption.Stopped):
            terminate()
    assert signal.getsignal(signal.SIGTERM) is before


def test_work_that_asks_is_told_and_a_second_signal_does_not_wait():
    with preemption.noticed(), preemption.polled():
        terminate()
        assert preemption.asked()
        with pytest.raises(preemption.Stopped):
            terminate()
    assert not preemption.asked()


def test_work_that_ends_before_it_asks_is_the_last():
    with preemption.noticed():
        with preemption.polled():
            terminate()
            preemption.check()
        with pytest.raises(preemption.Stopped, match="what is finished is kept"):
            preemption.check()


def told_by_jax(monkeypatch, poll):
    """As one of several processes, which JAX tells to stop at the poll of that number."""
    asked = []
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point",
        lambda number: asked.append(number) or len(asked) == poll,
    )
    return asked


def test_of_several_processes_the_next_stage_stops_all_at_the_same_poll(tmp_path, monkeypatch):
    ran = []
    with preemption.noticed(), Run.open(tmp_path / "run", Config()) as run:
        scope = run.at("iter_1")
        asked = told_by_jax(monkeypatch, 3)
        assert [scope.value(name, lambda: ran.append(1) or len(ran)) for name in ("a", "b", "a")] == [1, 2, 1]
        with pytest.raises(preemption.Stopped, match="what is finished is kept"):
            scope.value("c", lambda: ran.append(1) or len(ran))
        assert len(asked) == 3 and asked == list(range(asked[0], asked[0] + 3))
    with Run.open(tmp_path / "run", Config()) as run:
        assert run.at("iter_1").value("c", lambda: ran.append(1) or len(ran)) == 3


def test_of_several_processes_a_long_stage_stops_between_its_waves_and_batches(tmp_path, monkeypatch):
    lm = tiny.make_lm()
    prompts, keys = [[5, 6, 7]] * 5, jax.random.split(jax.random.key(0), 5)
    sampled = lambda: generate.generate_ids(lm, prompts, keys, max_new_tokens=4, batch_size=2)  # noqa: E731
    whole = sampled()
    pair = tuple(batches.Sequence_(np.asarray([5, 6, n], np.int32), np.asarray([0, 0, 1], bool)) for n in (7, 8))
    config = train.TrainConfig(optim=OptimConfig(learning_rate=1e-3), batch_size=8, max_length=64, remat="none")
    for work in (sampled, lambda: train.reference_logps(lm, [pair] * 20, config)):
        with preemption.noticed(), monkeypatch.context() as patch:
            asked = told_by_jax(patch, 2)
            with pytest.raises(preemption.Stopped):
                work()
            assert len(asked) == 2
    assert sampled() == whole


def test_importing_the_package_listens_to_nothing():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
