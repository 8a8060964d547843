"""A worker in a process of its own, on this machine or another: what engine `ray` and engine `slurm` start.

Only text goes in and out (JSON; keys and settings, never tensors), and files: signs of life in the ledger, results in the store.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pnp_batch import interrupts
from pnp_batch.checkpoint import resolve
from pnp_batch.errors import EnvironmentFailure, ModelError
from pnp_batch.ledger import Ledger
from pnp_batch.manifest import Manifest
from pnp_batch.plan import Package, package_from_json
from pnp_batch.runner import Worker
from pnp_batch.stages.outputs import RowList
from pnp_batch.stages.work import Outcome

BEAT_SECONDS = 1.0
STOP_FILE = "stop"


@dataclass(frozen=True)
class Spec:
    """What a worker is told when it starts.

    Attributes:
        manifest: `Manifest.to_json`, without inputs.
        path: The manifest's file.
        device: `cpu`, or `cuda` for the one that the engine gave it.
        name: What a person calls it.
        token: Ends its name in the ledger, so that whoever started it finds it there.
        stages: Names of the stages to run.
        fail_fast: Whether to end at the first failure.
        threads: CPU threads.
    """

    manifest: str
    path: str
    device: str
    name: str
    token: str
    stages: Sequence[str]
    fail_fast: bool
    threads: int

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))


@dataclass
class Report:
    """What a worker says about a package.

    Attributes:
        outcomes: How its results ended.
        rows: For `metadata.jsonl`.
        log: Lines for the run's log.
        notes: Of these, those for a person.
        corrupt: Corrupt artifacts met.
        interrupted: Whether it was asked to stop before the end.
        failure: Why this worker cannot go on: its machine failed, not the work.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    interrupted: bool = False
    failure: str | None = None

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """From another process."""
        content = json.loads(text)
        return cls(**{**content, "outcomes": [Outcome(**outcome) for outcome in content["outcomes"]]})


class RemoteWorker:
    """Makes packages in this process; never raises because of one.

    Args:
        spec: `Spec.to_json`.
    """

    def __init__(self, spec: str) -> None:
        self.spec = Spec(**json.loads(spec))
        manifest = Manifest.from_json(self.spec.manifest, Path(self.spec.path))
        manifest = manifest.with_run({"devices": self.spec.device})
        checkpoint = resolve(
            manifest.model, manifest.base, revision=manifest.revision, variant=manifest.variant, config=manifest.config
        )
        os.environ["OMP_NUM_THREADS"] = str(self.spec.threads)  # torch reads it when it is imported
        self.rows = RowList()
        self.events = WorkerEvents(self.spec.name)
        self.worker = Worker(manifest, checkpoint, self.events, self.spec.fail_fast, self.rows)
        self.worker.ledger.writer = f"{self.worker.ledger.writer.rpartition('-')[0]}-{self.spec.token}"
        self.events.ledger = self.worker.ledger
        self.events.beat("ready")

    def bury_earlier_selves(self) -> None:
        """A job that was requeued is another process of the same name: the one before it is gone, whatever its machine says."""
        ledger = self.worker.ledger
        for writer in ledger.workers():
            if writer.endswith(f"-{self.spec.token}") and writer != ledger.writer:
                ledger.bury(writer, "its job was requeued")

    def process(self, package_json: str) -> str:
        """Makes what is missing of a package (`plan.package_to_json`).

        Returns:
            `Report.to_json`.
        """
        report = Report()
        with self.events.collected(report):
            try:
                package = package_from_json(package_json, self.worker.store.root, self.worker.ledger)
                self.events.beat(f"package {package.index}")
                interrupts.check()
                self.events.stop_if_asked()
                self._process(package, report)
            except (EnvironmentFailure, ModelError) as error:
                report.failure = str(error)
            except KeyboardInterrupt:
                report.interrupted = True
        report.rows, report.corrupt = list(self.rows), list(self.worker.store.corrupt.values())
        self.rows.clear()
        self.events.beat("idle")
        return report.to_json()

    def _process(self, package: Package, report: Report) -> None:
        """Part by part, so that an interruption keeps what is known."""
        for part in self.worker.parts(package):
            report.outcomes += [unit.outcome for unit in self.worker.process(part, self.spec.stages)]
            if self.spec.fail_fast and any(outcome.error is not None for outcome in report.outcomes):
                return


class WorkerEvents:
    """Counts what a worker does and gives signs of life; ends the work in hand when a file asks for it."""

    def __init__(self, name: str) -> None:
        self.name, self.ledger = name, Ledger(Path())
        self._rows = 0
        self._made: Counter[str] = Counter()
        self._doing, self._beaten, self._begin = "", 0.0, time.time()
        self._report = Report()

    def step(self, rows: int) -> None:
        """UNet rows were computed."""
        interrupts.check()
        self._rows += rows
        if time.monotonic() - self._beaten >= BEAT_SECONDS:
            self.beat(self._doing)
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Ends the work in hand when a file asks for it."""
        if (self.ledger.root / STOP_FILE).exists():
            raise interrupts.Interrupted

    def made(self, stage: str, count: int) -> None:
        """A stage made artifacts or files."""
        self._made[stage] += count

    def note(self, message: str) -> None:
        """Something a person should know."""
        self._report.notes.append(f"{self.name}: {message}")

    def beat(self, doing: str) -> None:
        """A sign of life."""
        self._doing, self._beaten = doing, time.monotonic()
        state = {"name": self.name, "doing": doing, "began": self._begin, "rows": self._rows, "made": dict(self._made)}
        self.ledger.beat(state)

    def collected(self, report: Report) -> _Collecting:
        """Within the block, what is logged goes into a report."""
        self._report = report
        return _Collecting(report, self.name)


class _Collecting(logging.Handler):
    """Puts log lines into a report: many processes must not append to one file."""

    def __init__(self, report: Report, name: str) -> None:
        super().__init__(logging.INFO)
        self.report, self.worker = report, name
        self.logger = logging.getLogger("pnp_batch")

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a line."""
        self.report.log.append(f"{self.worker}: {record.getMessage()}")

    def __enter__(self) -> None:
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
