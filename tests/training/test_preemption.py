import os
import signal

from sret_jax.training.preemption import EXIT_STATUS, Preemption


def test_sigterm_is_noticed_instead_of_ending_the_process():
    with Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached(2)


def test_afterwards_sigterm_does_what_it_did_before():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_exit_status_is_that_of_a_process_that_sigterm_ended():
    assert EXIT_STATUS == 143
