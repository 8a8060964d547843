"""Ctrl-C, SIGTERM and what a batch system sends: all end a run at the next step, wherever the signal happened to land."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Not KeyboardInterrupt itself: CPython lets that one decide the exit code when it crosses an `exec`."""


_seen: list[int] = []
_holders = 0  # blocks of `held_back` that are open


def check() -> None:
    """Raises if a signal came but its exception was lost, as happens to one that lands in a `__del__`."""
    if _seen:
        raise Interrupted


def _interrupt(number: int, _frame: FrameType | None) -> None:
    is_impatient = number == signal.SIGINT and number in _seen
    _seen.append(number)
    if not _holders or is_impatient:
        raise Interrupted


@contextmanager
def held_back() -> Iterator[None]:
    """Within the block signals wait for its end, so that a batch is written as a whole; a second Ctrl-C does not wait.

    A second SIGTERM is no sign of impatience: Slurm sends it to each task, and `srun` passes its own on.
    """
    global _holders
    _holders += 1
    try:
        yield
    finally:
        _holders -= 1
    check()


@contextmanager
def interruptible(*others: signal.Signals) -> Iterator[None]:
    """Within the block SIGINT, SIGTERM and others raise `Interrupted`, also where SIGINT is ignored, as in background jobs."""
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM, *others)}
    try:
        yield
    finally:
        _seen.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
