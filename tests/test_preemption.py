"""What SIGTERM does to one process: it stops at once, or where the work asks; for two see test_multihost."""

import os
import signal

import pytest

from jaxsi import preemption


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


def test_importing_the_package_listens_to_nothing():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
