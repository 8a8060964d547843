"""Signals, also those whose exception gets lost."""

from __future__ import annotations

import signal

import pytest

from pnp_batch import interrupts


class Interrupting:
    """Gets a signal where Python drops every exception."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGUSR2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_whose_exception_is_lost_is_seen_at_the_next_look() -> None:
    with interrupts.interruptible(signal.SIGUSR2):
        interrupts.check()
        Interrupting()
        with pytest.raises(interrupts.Interrupted):
            interrupts.check()
    interrupts.check()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


@pytest.mark.parametrize(
    "number, reached", [(signal.SIGTERM, ["once", "twice"]), (signal.SIGINT, ["once"])], ids=["SIGTERM", "SIGINT"]
)
def test_signals_wait_for_what_is_written_together_but_a_second_ctrl_c_does_not(
    number: signal.Signals, reached: list[str]
) -> None:
    written = []
    with pytest.raises(interrupts.Interrupted), interrupts.interruptible(), interrupts.held_back():
        signal.raise_signal(number)
        written.append("once")
        signal.raise_signal(number)
        written.append("twice")
    assert written == reached


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_interrupts(number: signal.Signals) -> None:
    with pytest.raises(interrupts.Interrupted), interrupts.interruptible(signal.SIGUSR2):
        signal.raise_signal(number)
