"""Signals become exceptions that end the work in order, and none of them gets lost."""

import os
import signal
import time
from collections.abc import Iterator

from calib.base import interrupts
from calib.base.interrupts import Terminated
from calib.base.progress import Progress

import pytest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Handlers are put back, and what was received is forgotten."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setattr(interrupts, "_received", [])
    monkeypatch.setattr(interrupts, "_last", -interrupts.PATIENCE_SECONDS)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_terminating_signal_is_an_interruption_with_its_own_exit_status(number: signal.Signals, status: int) -> None:
    interrupts.install()
    with pytest.raises(Terminated) as error:
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert error.value.exit_status == status


def test_a_keyboard_interrupt_is_no_termination() -> None:
    interrupts.install()
    with pytest.raises(KeyboardInterrupt) as error:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert not isinstance(error.value, Terminated)


def test_an_interruption_that_was_swallowed_is_raised_again_by_the_next_step_of_the_work() -> None:
    interrupts.install()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    except Terminated:
        pass  # as in a callback of C code, which drops exceptions
    with pytest.raises(Terminated), Progress("draw", 2, "step") as progress:
        progress.advance()


def test_further_signals_do_not_interrupt_the_orderly_end() -> None:
    interrupts.install()
    with pytest.raises(Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)


def test_what_the_process_was_started_to_ignore_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts.install()
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.05)
    interrupts.check()
