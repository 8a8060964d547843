"""The attempt ledger: which unit was in whose hands when a worker died, and when to stop trying.

A *unit* is one artifact in one stage (`invert-<key>`, `translate-<key>`), one picture that is decoded (`read-<path's digest>`) or
one file that is written (`assemble-<result's id>`), not a work package: a package of thirty pictures must not be given up for
one of them. While a worker has a batch of units in hand, each has a *mark*, a file of its own; the end takes it back, whether the
work is done, failed with an error (which the failure list holds) or was interrupted. So a mark whose worker is gone is a
*strike*: the unit was in hand when a process died.

A process that vanished without a word was most likely killed by whoever started it, be it the run itself or the driver that its
workers die with, and is no reason to change a batch, and with it bytes: of such deaths only every tenth is a strike. A crash
leaves its traceback, and a hang and a worker that its engine found dead leave their cause of death; those count each.

Strikes decide what happens next (see `stages.batches.attempt`). After one, the batch is tried again as it was, since a kill is
mostly not its fault and the same batch gives the same bytes. When the next attempt would be the last, its members are tried one
by one: the guilty one dies alone, and a second time, and is quarantined; its innocent mates are done. The second time is for
them: they share the strikes of the batch, and one of them may be in hand when a node is lost.

Marks are made and removed, never rewritten or appended to, which is all that a network file system does safely for many writers.
What lies in the folder is what is in hand and what went wrong: reading it is fast however large the plan is. Deleting it forgives
everything.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pnp_batch.errors import ItemError, disk_errors_named
from pnp_batch.store.files import TEMP_PREFIX, is_alive, remove_stale_temps, write_atomic

STALE_SECONDS = 600.0  # a worker of another machine that gave no sign of life for so long is gone
SILENT_DEATHS = 10  # so many of processes that left no word make one strike
ALONE = 2  # so many of a unit's strikes must have come while nothing else was in hand
ALONE_SUFFIX = ".alone"  # of a mark's name; a writer's ends with its token
BACKSTOP_SECONDS = 5.0  # so long after its time a process that Python cannot end is ended without it
TIMED_OUT = 3  # exit code of a process that a unit held for too long: the environment failed


class Quarantined(ItemError):
    """A unit that took its worker down too often."""


@dataclass(frozen=True)
class Mark:
    """One unit in the hands of one worker.

    Attributes:
        unit: `<stage>-<key>`.
        writer: The worker: host, process and a random token.
        is_alone: Whether the worker had nothing else in hand.
        path: Its file.
    """

    unit: str
    writer: str
    is_alone: bool
    path: Path


class Ledger:
    """The marks below one folder, written and read by any number of processes on any number of machines.

    Args:
        root: The folder.
        max_attempts: How often a unit may be in hand when a worker dies before it is given up, `ALONE` times of these alone.
        unit_timeout: Most seconds that one unit may take; a batch of n may take n times as long.
    """

    def __init__(self, root: Path, max_attempts: int = 3, unit_timeout: float | None = None) -> None:
        self.root, self.max_attempts, self.unit_timeout = root, max_attempts, unit_timeout
        self.writer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._in_hand: list[str] = []

    def strikes(self, unit: str) -> list[Mark]:
        """The attempts at a unit during which a worker died, as far as they count."""
        return self._counted(self._deaths(unit))

    def _deaths(self, unit: str) -> list[Mark]:
        return [mark for mark in self._marks(unit) if self.is_dead(mark.writer)]

    def _counted(self, deaths: Sequence[Mark]) -> list[Mark]:
        told = [mark for mark in deaths if self._left_a_word(mark.writer)]
        return told + [mark for mark in deaths if mark not in told][SILENT_DEATHS - 1 :: SILENT_DEATHS]

    def _left_a_word(self, writer: str) -> bool:
        """Whether a worker said how it died, or an engine that lived said that it did."""
        return (self.root / "dead" / writer).exists() or bool(self._crash(writer))

    def _is_given_up(self, deaths: Sequence[Mark]) -> bool:
        alone = [mark for mark in deaths if mark.is_alone]
        return len(self._counted(deaths)) >= self.max_attempts and len(self._counted(alone)) >= ALONE

    @contextmanager
    def crashes_noted(self) -> Iterator[None]:
        """Within the block a crash of this process leaves its traceback in the ledger; a kill -9 leaves nothing."""
        if faulthandler.is_enabled():  # somebody else wants to see it
            yield
            return
        with self._crash_file() as file:
            faulthandler.enable(file, all_threads=False)
            try:
                yield
            finally:
                faulthandler.disable()
                Path(file.name).unlink(missing_ok=True)

    def _crash_file(self) -> TextIO:
        """Where this process leaves its last traceback."""
        path = self.root / "crashes" / self.writer
        with disk_errors_named(f"the attempt ledger {self.root}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a")

    def _crash(self, writer: str) -> str:
        """The first line of its crash, empty where there was none."""
        try:
            return (self.root / "crashes" / writer).read_text(errors="replace").partition("\n")[0]
        except FileNotFoundError:
            return ""

    @contextmanager
    def attempt(self, units: Sequence[str]) -> Iterator[None]:
        """Holds a mark for each unit within the block; units that are done lose their strikes.

        Raises:
            EnvironmentFailure: The disk is full or read-only.
        """
        marks = [self._mark(unit, is_alone=len(units) == 1) for unit in units]
        self._in_hand = list(units)
        try:
            with disk_errors_named(f"the attempt ledger {self.root}"):
                for mark in marks:
                    _create(mark.path)
            with self._in_time(units):
                yield
            self._forgive(units)
        finally:
            self._in_hand = []
            for mark in marks:
                mark.path.unlink(missing_ok=True)

    def progressed(self) -> None:
        """What is in hand got further than any attempt before it (its loop saved its state), so it is not what kills workers.

        A last attempt is not forgiven its strikes: alone, a unit begins anew and so gets further for no merit of its own.
        """
        self._forgive(unit for unit in self._in_hand if len(self.strikes(unit)) < self.max_attempts - 1)

    def _forgive(self, units: Iterable[str]) -> None:
        for mark in (mark for unit in units for mark in self._deaths(unit)):
            mark.path.unlink(missing_ok=True)

    def refuse(self, unit: str) -> None:
        """Raises where a unit has been tried too often.

        Raises:
            Quarantined: With what is known of the last attempt.
        """
        deaths = self._deaths(unit)
        if self._is_given_up(deaths):
            strikes = self._counted(deaths)
            last = max(strikes, key=lambda mark: _modified(mark.path))
            raise Quarantined(
                f"quarantined: the worker died {len(strikes)} times while this was in its hands (last: "
                f"{self.cause_of_death(last.writer)}); --retry-failed tries it again"
            )

    def quarantined(self) -> list[str]:
        """All units that have been tried too often."""
        deaths: dict[str, list[Mark]] = {}
        for mark in self.marks():
            if self.is_dead(mark.writer):
                deaths.setdefault(mark.unit, []).append(mark)
        return [unit for unit, marks in deaths.items() if self._is_given_up(marks)]

    def forgive(self) -> None:
        """Forgets every strike."""
        for mark in self.marks():
            if self.is_dead(mark.writer):
                mark.path.unlink(missing_ok=True)

    def marks(self) -> Iterator[Mark]:
        """Every mark of every worker."""
        yield from (_parsed(path) for path in self.root.glob("??/*--*"))

    # Who is alive

    def bury(self, writer: str, cause: str) -> None:
        """Notes that a worker is gone, for those on other machines, who cannot look. The first word stands: it is its own."""
        path = self.root / "dead" / writer
        with disk_errors_named(f"the attempt ledger {self.root}"):
            if not path.exists():
                write_atomic(path, cause)

    def beat(self, state: Mapping[str, Any]) -> None:
        """A sign of life of this worker, with what it is doing; read by `workers`."""
        content = {"host": socket.gethostname(), "pid": os.getpid(), "updated": time.time(), **state}
        with disk_errors_named(f"the attempt ledger {self.root}"):
            write_atomic(self.root / "workers" / self.writer, json.dumps(content))

    def dismiss(self) -> None:
        """Forgets the signs of life of all workers: none is at work any more."""
        for path in (self.root / "workers").glob("[!.]*"):
            path.unlink(missing_ok=True)

    def workers(self) -> dict[str, dict[str, Any]]:
        """The last sign of life of every worker of the last run, by writer."""
        states = {}
        for path in (self.root / "workers").glob("[!.]*"):
            try:
                states[path.name] = json.loads(path.read_bytes())
            except (FileNotFoundError, ValueError):
                continue  # it was forgotten just now
        return states

    def is_dead(self, writer: str) -> bool:
        """Whether a worker is gone."""
        if writer == self.writer:
            return False
        if (self.root / "dead" / writer).exists():
            return True  # said by whoever started it: its number may stand for a zombie yet
        host, pid, _token = writer.rsplit("-", 2)
        if host == socket.gethostname():
            return int(pid) == os.getpid() or not is_alive(int(pid))  # in containers every run has the same number
        seen = _modified(self.root / "workers" / writer)
        return time.time() - seen > STALE_SECONDS

    def cause_of_death(self, writer: str) -> str:
        """What is known about the end of a worker."""
        try:
            return (self.root / "dead" / writer).read_text(encoding="utf-8")
        except FileNotFoundError:
            return self._crash(writer) or "it was killed or crashed"

    def remove_the_dead(self) -> None:
        """Forgets workers that are gone, but for those that a strike still names, and what they left half-written."""
        remove_stale_temps(self.root.glob(f"*/{TEMP_PREFIX}*"))
        blamed = {mark.writer for mark in self.marks()}
        for folder in ("workers", "dead", "crashes"):
            for path in (self.root / folder).glob("[!.]*"):
                if path.name not in blamed and (folder == "dead" or self.is_dead(path.name)):
                    path.unlink(missing_ok=True)

    # Marks

    def _marks(self, unit: str) -> list[Mark]:
        folder = self.root / _shelf(unit)
        try:
            names = os.listdir(folder)  # noqa: PTH208 - names are all that is needed
        except FileNotFoundError:
            return []
        return [_parsed(folder / name) for name in names if name.startswith(f"{unit}--")]

    def _mark(self, unit: str, is_alone: bool) -> Mark:
        name = f"{unit}--{self.writer}{ALONE_SUFFIX if is_alone else ''}"
        return Mark(unit, self.writer, is_alone, self.root / _shelf(unit) / name)

    @contextmanager
    def _in_time(self, units: Sequence[str]) -> Iterator[None]:
        """Within the block this process ends when some units take too long.

        Python does that as long as it runs. A hang that lets no other thread run is ended a little later by faulthandler, which
        needs no Python: exit code 1, and the traceback in the ledger.
        """
        if self.unit_timeout is None:
            yield
            return
        seconds = self.unit_timeout * len(units)
        timer = threading.Timer(seconds, self._expire, [units])
        timer.daemon = True
        with self._crash_file() as file:
            try:  # from here on: a signal between the two must not leave one of them running
                faulthandler.dump_traceback_later(seconds + BACKSTOP_SECONDS, exit=True, file=file)
                timer.start()
                yield
            finally:
                timer.cancel()
                faulthandler.cancel_dump_traceback_later()

    def _expire(self, units: Sequence[str]) -> None:
        """Ends this process: a unit that hangs in a kernel or a driver cannot be ended in any other way."""
        assert self.unit_timeout is not None
        cause = f"{units[0]} was not done within {self.unit_timeout * len(units):g} s (unit_timeout)"
        self.bury(self.writer, cause)
        print(
            f"stopped: {cause}; run the same command again; what goes on hanging is left out (max_attempts)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(TIMED_OUT)


def unit_name(stage: str, key: str) -> str:
    """What a unit is called in the ledger."""
    return f"{stage}-{key}"


def _shelf(unit: str) -> str:
    return unit.rpartition("-")[2][:2]


def _parsed(path: Path) -> Mark:
    unit, _, writer = path.name.partition("--")
    return Mark(unit, writer.removesuffix(ALONE_SUFFIX), writer.endswith(ALONE_SUFFIX), path)


def _create(path: Path) -> None:
    try:
        path.touch()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
