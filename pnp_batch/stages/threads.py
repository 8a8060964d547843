"""A few threads for the pictures of a batch: decoding, resizing, checksums, PNG and files all leave Python's lock alone.

Nothing runs beside them: a stage hands out its pictures and waits. So torch's own threads sleep meanwhile, what is on its way
through memory is one picture a thread, and the ledger and the rows are still in the hands of one thread alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MOST = 8  # at 8 the results of a batch take 1 to 3% of the time that a fast GPU takes for them (docs/performance.md)
IN_HAND = 4  # for each thread: fewer leave threads waiting for the last one, more make signals wait longer

T = TypeVar("T")
R = TypeVar("R")


def count(device: str) -> int:
    """How many threads the pictures of a worker get.

    A worker on a CPU takes no more than torch does, which waits for them: `OMP_NUM_THREADS` is how engines and people share
    the cores out. One on a GPU takes what cores there are, since it needs them for moments only.
    """
    cores = len(os.sched_getaffinity(0))
    given = os.environ.get("OMP_NUM_THREADS", "") if device == "cpu" else ""
    return max(min(int(given) if given.isdecimal() else cores, MOST), 1)


def in_hand(things: Sequence[T], device: str) -> Iterator[Sequence[T]]:
    """Pieces of some things: what is in hand at once, and so what the death of a worker is blamed on, however many there are."""
    size = IN_HAND * count(device)
    yield from (things[i : i + size] for i in range(0, len(things), size))


def each(work: Callable[[T], R], things: Sequence[T], device: str) -> list[R]:
    """What `work` gives for each thing, in order. Where it raises, what has begun ends and the rest is left.

    Raises:
        Exception: The first one of `work`.
    """
    if len(things) < 2 or count(device) == 1:
        return [work(thing) for thing in things]
    # The decoders silence warnings for a moment each, which threads must not do at once: silent before, silent after.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(count(device)) as pool:
        return list(pool.map(work, things))
