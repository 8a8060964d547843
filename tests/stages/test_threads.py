"""A few threads: results in order, bounded, and nothing begun after an error."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pnp_batch.stages import threads


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")


class Gauge:
    """How many are at work at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    @contextmanager
    def one_more(self) -> Iterator[None]:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        yield
        with self._lock:
            self.now -= 1


def test_all_threads_work_at_once_no_more_than_these_do_and_results_come_in_order() -> None:
    gauge, all_here = Gauge(), threading.Barrier(4)

    def work(number: int) -> int:
        with gauge.one_more():
            all_here.wait(timeout=60)  # goes on when four have come
            return number**2

    assert threads.each(work, range(40), "cpu") == [number**2 for number in range(40)]
    assert gauge.most == 4


def test_after_an_error_what_has_begun_ends_and_nothing_else_begins() -> None:
    begun, ended = [], []

    def work(number: int) -> None:
        begun.append(number)
        if number == 3:
            raise ValueError(number)
        ended.append(number)

    with pytest.raises(ValueError, match="3"):
        threads.each(work, range(10_000), "cpu")
    assert sorted(ended) == sorted(number for number in begun if number != 3) and len(begun) < 10_000


def test_warnings_that_decoders_silence_are_heard_again() -> None:
    def work(_: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")

    before = list(warnings.filters)
    threads.each(work, range(1000), "cpu")
    assert list(warnings.filters) == before


@pytest.mark.parametrize("given, expected", [("3", 3), ("100", threads.MOST), ("0", 1)])
def test_a_worker_on_a_cpu_has_the_threads_that_torch_has(
    monkeypatch: pytest.MonkeyPatch, given: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    size = threads.IN_HAND * expected
    assert threads.count("cpu") == expected
    assert [len(piece) for piece in threads.in_hand(range(size + 1), "cpu")] == [size, 1]


def test_a_worker_on_a_gpu_takes_what_cores_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = set()
    for given in ("1", "3", "100", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        counts.add(threads.count("cuda"))
    assert len(counts) == 1 and threads.count("cpu") in counts
