"""Watching a run: counts, rate and ETA; the progress file that `status` reads; the live view and the plain lines."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pnp_batch import interrupts
from pnp_batch.errors import disk_errors_named
from pnp_batch.inputs import PROGRESS_FILE
from pnp_batch.names import counted
from pnp_batch.plan import Estimate
from pnp_batch.store.files import write_atomic

log = logging.getLogger(__name__)

FILE_SECONDS = 1.0
SILENT_SECONDS = 30.0
LINE_SECONDS = 10.0


@dataclass
class WorkerState:
    """One worker in a process of its own.

    Attributes:
        name: What a person calls it.
        host: Its machine.
        doing: What it has in hand.
        rows: UNet rows it computed.
        rate: UNet rows a second.
        silent: Seconds since its last sign of life.
    """

    name: str
    host: str
    doing: str
    rows: int
    rate: float
    silent: float

    @classmethod
    def of(cls, beat: Mapping[str, Any]) -> WorkerState:
        """From its last sign of life in the ledger."""
        seconds = max(beat["updated"] - beat["began"], 1e-3)
        silent = max(time.time() - beat["updated"], 0.0)
        return cls(beat["name"], beat["host"], beat["doing"], beat["rows"], beat["rows"] / seconds, silent)

    def __str__(self) -> str:
        silent = f", silent for {clock(self.silent)}" if self.silent > SILENT_SECONDS else ""
        return f"{self.name} on {self.host}: {self.doing}, {counted(self.rows, 'UNet row')}, {self.rate:.1f}/s{silent}"


@dataclass
class State:
    """How far a run is.

    Attributes:
        trajectories: In the plan.
        translations: Results in the plan.
        done: Results that are there.
        failed: Results that failed.
        inverted: Trajectories made by this run.
        translated: Results computed by this run.
        passed: Results that the quality gate let pass.
        saved: Of them those that a retry made pass.
        flagged: Results that missed a threshold in every attempt.
        not_judged: Results of which a figure could not be measured.
        rows: UNet rows computed by this run.
        rows_total: UNet rows of the whole plan.
        rows_settled: UNet rows of the plan that need no more thought: computed, or found done.
        seconds: Since the run began.
        is_beyond_plan: Whether more rows were computed than were planned, and there is still work in hand.
        eta: Seconds to go, or None while that is not known.
        workers: Those in other processes.
    """

    trajectories: int
    translations: int
    rows_total: int
    done: int = 0
    failed: int = 0
    inverted: int = 0
    translated: int = 0
    passed: int = 0
    saved: int = 0
    flagged: int = 0
    not_judged: int = 0
    rows: int = 0
    rows_settled: int = 0
    seconds: float = 0.0
    is_beyond_plan: bool = False
    eta: float | None = None
    workers: list[WorkerState] = field(default_factory=list)

    @property
    def at_least_done(self) -> int:
        """Results that are there, those of the package in hand included."""
        return max(self.done, self.translated)

    @property
    def rate(self) -> float:
        """UNet rows a second."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def percent(self) -> int:
        """Of the rows; 100 once all are settled, and not before."""
        return 100 * self.rows_settled // self.rows_total if self.rows_total else 100

    @property
    def time_left(self) -> str:
        """The ETA in words."""
        return "unknown (more rows than planned)" if self.is_beyond_plan else clock(self.eta)


class View(Protocol):
    """Shows a state."""

    def show(self, state: State) -> None:
        """Called often; draws what changed."""

    def say(self, message: str) -> None:
        """A line of its own."""

    def close(self) -> None:
        """The run is over."""


class Monitor:
    """Collects what the stages report. It is the `Events` of a run.

    Attributes:
        state: How far it is.
        about: What else the progress file says of the run.

    Args:
        estimate: Of the plan.
        root: The output folder.
        view: Who shows how it goes.
        about: What else the progress file says of the run.
    """

    def __init__(self, estimate: Estimate, root: Path, view: View, about: Mapping[str, Any] | None = None) -> None:
        self.state = State(estimate.trajectories, estimate.translations, estimate.rows)
        self._root, self._view, self.about = root, view, dict(about or {})
        self._begin = time.monotonic()
        self._started = time.time()
        self._computing_began: float | None = None
        self._written = 0.0
        self._settled_before = 0
        self._rows_before = 0
        self._beats: dict[str, Mapping[str, Any]] = {}
        self.made_counts: Counter[str] = Counter()
        self._refresh()

    def step(self, rows: int) -> None:
        """UNet rows were computed."""
        interrupts.check()
        self._computing_began = self._computing_began or time.monotonic()
        self.state.rows += rows
        self._refresh()

    def made(self, stage: str, count: int) -> None:
        """A stage made artifacts or files."""
        self.made_counts[stage] += count
        self._count()
        self._refresh()

    def _count(self) -> None:
        """What was made here and by workers elsewhere."""
        counts = sum((Counter(beat["made"]) for beat in self._beats.values()), self.made_counts)
        self.state.inverted, self.state.translated = counts["invert"], counts["translate"]
        self.state.passed, self.state.saved = counts["passed"], counts["saved"]
        self.state.flagged, self.state.not_judged = counts["flagged"], counts["not judged"]

    @property
    def workers_known(self) -> int:
        """How many workers in other processes there were so far."""
        return len(self._beats)

    def watch(self, beats: Mapping[str, Mapping[str, Any]], living: Collection[str]) -> None:
        """Signs of life of workers in other processes, by worker; the living are shown, and what the dead did still counts."""
        self._beats |= beats
        rows = sum(beat["rows"] for beat in self._beats.values())
        if rows > self.state.rows:
            self._computing_began = self._computing_began or time.monotonic()
        self.state.rows = rows
        self._count()
        self.state.workers = sorted(
            (WorkerState.of(beats[writer]) for writer in living), key=lambda worker: worker.name
        )
        self._refresh()

    def note(self, message: str) -> None:
        """Something a person should know."""
        log.info(message)
        self._view.say(message)

    def settled(self, rows: int, done: int, failed: int) -> None:
        """A package is over.

        Args:
            rows: UNet rows that the plan counts for it.
            done: Its results that are there.
            failed: Its results that failed.
        """
        self._settled_before += rows
        self._rows_before = self.state.rows
        self.state.done += done
        self.state.failed += failed
        self._refresh()

    def close(self) -> None:
        """Shows and writes the last state; the view is its owner's to close."""
        self._refresh(force=True)

    def _refresh(self, force: bool = False) -> None:
        state, now = self.state, time.monotonic()
        state.seconds = now - self._begin
        reached = self._settled_before + state.rows - self._rows_before
        # A float32 retry, an attempt of the quality gate or an inversion's safe scheme cannot be foretold.
        is_in_hand = state.rows_total > self._settled_before
        state.is_beyond_plan = is_in_hand and reached > state.rows_total
        state.rows_settled = min(reached, state.rows_total - is_in_hand)
        if self._computing_began is not None and state.rows:
            seconds_per_row = (now - self._computing_began) / state.rows
            left = state.rows_total - state.rows_settled
            state.eta = left * seconds_per_row if left and not state.is_beyond_plan else None
        self._view.show(state)
        if force or now - self._written >= FILE_SECONDS:
            self._written = now
            self._write(ended=force)

    def _write(self, ended: bool) -> None:
        content = {**asdict(self.state), **self.about} | {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": self._started,
            "updated": time.time(),
            "ended": ended,
        }
        with disk_errors_named(str(self._root / PROGRESS_FILE)):
            write_atomic(self._root / PROGRESS_FILE, json.dumps(content, indent=1) + "\n")


def clock(seconds: float | None) -> str:
    """A duration as h:mm:ss."""
    if seconds is None:
        return "-:--:--"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class PlainView:
    """A line now and then, for logs and pipes."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._shown = ""

    def show(self, state: State) -> None:
        """Prints a line every few seconds."""
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._print(state)

    def _print(self, state: State) -> None:
        self._last = time.monotonic()
        print(
            f"{state.percent:3}%  {state.at_least_done}/{counted(state.translations, 'result')}, {state.inverted} inverted, "
            f"{state.translated} translated, {state.failed} failed, {state.rate:.1f} UNet rows/s, ETA {state.time_left}",
            *(f"\n      {worker}" for worker in state.workers),
            sep="",
            file=sys.stderr,
            flush=True,
        )

    def say(self, message: str) -> None:
        """Prints a line."""
        print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to tidy up."""


class LiveView:
    """Bars that stay in place on a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[about]}"),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=8,
        )
        self._tasks: dict[str, TaskID] = {}

    def show(self, state: State) -> None:
        """Moves the bars; the first call draws them."""
        self._progress.start()
        failed = f"[red]{state.failed} failed[/red]" if state.failed else "0 failed"
        self._bar("inversions", state.inverted, state.trajectories, "this run")
        self._bar("results", state.at_least_done, state.translations, failed)
        self._bar("UNet rows", state.rows_settled, state.rows_total, f"{state.rate:.1f}/s  ETA {state.time_left}")
        for worker in state.workers:
            self._bar(
                worker.name, worker.rows, state.rows_total, f"{worker.rate:.1f}/s  {worker.doing} ({worker.host})"
            )
        for name in set(self._tasks) - {
            "inversions",
            "results",
            "UNet rows",
            *(worker.name for worker in state.workers),
        }:
            self._progress.remove_task(self._tasks.pop(name))

    def _bar(self, name: str, completed: int, total: int, about: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, about=about)
        self._progress.update(self._tasks[name], completed=completed, about=about)

    def say(self, message: str) -> None:
        """Prints a line above the bars."""
        self._progress.console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the bars as they are."""
        self._progress.stop()


def view_for(console: Console) -> View:
    """The live view on a terminal, plain lines elsewhere."""
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainView()
