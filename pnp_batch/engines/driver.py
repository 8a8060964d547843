"""What all engines share: one run in an output folder, its log, its progress, its failures, and how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager

from pnp_batch.engines.remote import STOP_FILE, Report, Spec
from pnp_batch.engines.run import Run, Summary, logged, only_run
from pnp_batch.errors import PnpError
from pnp_batch.failures import FailureList
from pnp_batch.monitor import Monitor
from pnp_batch.plan import Estimate, Package
from pnp_batch.runner import Worker, ledger_of
from pnp_batch.stages.outputs import Outputs
from pnp_batch.stages.work import Outcome
from pnp_batch.store import ArtifactStore
from pnp_batch.store.files import remove_temps_of, write_atomic
from pnp_batch.survey import content_digest

log = logging.getLogger(__name__)

WATCH_SECONDS = 1.0


class Driver:
    """Takes note of what workers did. Made by `driving`.

    Attributes:
        run: What was asked for.
        monitor: Who shows how it goes; the `Events` of a worker in this process.
        outputs: The output folder.
        ledger: The attempt ledger.
        is_stopped: Whether something failed and that is to end the run.
        corrupt: Corrupt artifacts that workers in other processes met, one sentence each.
    """

    def __init__(self, run: Run) -> None:
        manifest = run.plan.manifest
        self.run = run
        about = {"manifest": content_digest(manifest), "whole": run.is_whole}
        self.monitor = Monitor(run.plan.estimate(), manifest.output, run.view, about)
        self.outputs = Outputs(manifest.output)
        self.ledger = ledger_of(manifest)
        self.failures = FailureList(manifest)
        self.is_stopped = False
        self._videos: set[str] = set()
        self.corrupt: list[str] = []
        self._watched = 0.0
        self._is_through = False

    def note_dtype(self, worker: Worker) -> None:
        """Notes what is computed in: it is in the keys, and who looks at the results may have another kind of device."""
        self.monitor.about["dtype"] = worker.context.dtype

    def settle(self, package: Package, outcomes: Sequence[Outcome]) -> None:
        """Takes note of how the results of a package, or of a part of one, ended."""
        failed = self.failures.settle(package, outcomes)
        done = {outcome.id for outcome in outcomes if outcome.done} - self._videos
        if package.jobs[0].window is not None:
            self._videos |= done  # every window of a finished video says so
        self.monitor.settled(rows_of(self.run, package), len(done), len(failed))
        for row in failed:
            log.error("%s: '%s' failed at %s: %s", row["source"], row["prompt"], row["stage"], row["error"])
        for message in dict.fromkeys(f"failed: {row['source']}: {row['error']}" for row in failed):
            self.monitor.note(message)  # once for a picture that cannot be read, however many prompts it has
        self.is_stopped = self.is_stopped or (self.run.fail_fast and bool(failed))

    # For workers in other processes

    def spec(self, device: str, name: str, token: str, threads: int) -> Spec:
        """What a worker is told when it starts; see `Spec`."""
        run, manifest = self.run, self.run.plan.manifest
        stages = list(run.stages)
        return Spec(manifest.to_json(), str(manifest.path), device, name, token, stages, run.fail_fast, threads)

    def take(self, package: Package, report: Report) -> None:
        """What a worker says about a package that it went through."""
        self.take_rows(report)
        self.settle(package, report.outcomes)

    def take_rows(self, report: Report) -> None:
        """What counts of a report even where the package was left half done."""
        for row in report.rows:
            self.outputs.add_row(row)
        for line in report.log:
            log.info(line)
        for note in report.notes:
            self.monitor.note(note)
        self.corrupt += [sentence for sentence in report.corrupt if sentence not in self.corrupt]

    def watch_workers(self, force: bool = False) -> None:
        """Reads the workers' signs of life, a second apart, or more for many workers on a slow file system."""
        if force or time.monotonic() - self._watched >= max(WATCH_SECONDS, self.monitor.workers_known / 100):
            self._watched = time.monotonic()
            beats = self.ledger.workers()
            self.monitor.watch(beats, [writer for writer in beats if not self.ledger.is_dead(writer)])

    def bury(self, tokens: Collection[str], cause: str) -> bool:
        """Notes the death of workers and tidies up after them; gives whether something in hand is struck for it."""
        self.watch_workers(force=True)
        writers = {name for name in self.ledger.workers() if name.rpartition("-")[2] in tokens}
        for writer in writers:
            self.ledger.bury(writer, cause)
        processes = {writer.rpartition("-")[0] for writer in writers}
        for folder in (self.run.plan.manifest.store, self.outputs.root, self.ledger.root):
            remove_temps_of(processes, folder)
        return any(mark.writer in writers for mark in self.ledger.marks())

    def ask_to_stop(self) -> None:
        """Workers see this at their next step."""
        write_atomic(self.ledger.root / STOP_FILE, "")

    def may_go_on(self) -> None:
        """Takes `ask_to_stop` back."""
        (self.ledger.root / STOP_FILE).unlink(missing_ok=True)

    def finish(self) -> None:
        """Every package was settled: the place for work at the end of a run."""
        self._is_through = not self.is_stopped

    def tidy(self) -> None:
        """Removes what processes that are gone left half-written, and forgets those workers that no strike names."""
        ArtifactStore(self.run.plan.manifest.store).remove_stale_temporaries()
        self.outputs.remove_stale_temporaries()
        self.ledger.remove_the_dead()

    def close(self) -> None:
        """Writes the last state and the failure lists."""
        self.monitor.close()
        self.ledger.dismiss()
        self.tidy()
        self.failures.finish(self.run.is_whole and self._is_through)
        self.outputs.drop_superseded_rows()

    def summary(self, corrupt: Sequence[str]) -> Summary:
        """How it ended."""
        state = self.monitor.state
        log.info(
            "%d of %d results are there, %d failed, %d UNet rows",
            state.done,
            state.translations,
            state.failed,
            state.rows,
        )
        return Summary(
            translations=state.translations,
            done=state.done,
            failed=state.failed,
            inverted=state.inverted,
            translated=state.translated,
            rows=state.rows,
            seconds=state.seconds,
            corrupt=corrupt,
            passed=state.passed,
            saved=state.saved,
            flagged=state.flagged,
            not_judged=state.not_judged,
        )


@contextmanager
def driving(run: Run) -> Iterator[Driver]:
    """A run from lock to failure lists.

    Raises:
        EnvironmentFailure: Another run works in the folder, or the disk is full or read-only.
    """
    manifest = run.plan.manifest
    with only_run(manifest.output), logged(manifest.output), closing(run.view):
        driver = Driver(run)
        if run.forgive:
            driver.ledger.forgive()
        driver.tidy()
        driver.may_go_on()
        state = driver.monitor.state
        log.info("run of %s: %d results of %d trajectories", manifest.path, state.translations, state.trajectories)
        try:
            yield driver
        except (KeyboardInterrupt, PnpError) as error:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else f"stopped: {error}"
            log.warning("%s; %d of %d results are there", why, state.done, state.translations)
            raise
        finally:
            driver.close()


def rows_of(run: Run, package: Package) -> int:
    """UNet rows that the plan counts for a package."""
    estimate = Estimate()
    for job in package.jobs:
        estimate.add(job, run.plan.checkpoint)
    return estimate.rows
