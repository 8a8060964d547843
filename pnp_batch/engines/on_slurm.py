"""Engine `slurm`: a job array of static slices of the plan, submitted with submitit; a new array for what is missing.

The driver submits and watches; it computes nothing. What a slice did it reads from the slice's own report file, never from
Slurm's accounting, which many clusters lack; so it does not matter how a job ended: preempted, out of time, cancelled, or with
its node. When the array has left the queue, what has no report goes into the next one.
"""

from __future__ import annotations

import json
import logging
import secrets
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import submitit

from pnp_batch.engines.driver import Driver, driving, rows_of
from pnp_batch.engines.remote import RemoteWorker, Report
from pnp_batch.engines.run import Run, Summary
from pnp_batch.engines.schedule import Schedule
from pnp_batch.errors import EnvironmentFailure
from pnp_batch.interrupts import Interrupted, interruptible
from pnp_batch.manifest import Manifest, SlurmSpec
from pnp_batch.names import counted
from pnp_batch.plan import Package, Plan, package_to_json
from pnp_batch.runner import Worker
from pnp_batch.store.files import write_atomic
from pnp_batch.store.keys import sha256

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
LEAVE_SECONDS = 45.0  # Slurm kills what does not end within KillWait, 30 s by default
NOTICE_SECONDS = 90  # before its time is over a job is told to stop
FRUITLESS_ARRAYS = 3
SUBMITTED = "sbatch"
ENDED = "its job array ended"
STOPPED = "stopped by a signal; what is left goes on in another job"


def run_slurm(run: Run) -> Summary:
    """Makes everything a plan names that is not there yet, as a Slurm job array.

    Raises:
        EnvironmentFailure: There is no Slurm, it refuses the job, or another run works in the folder.
    """
    with driving(run) as driver:
        Campaign(driver).go()
        driver.finish()
        return driver.summary(driver.corrupt)


def preview(plan: Plan) -> None:
    """Prints the script that would be submitted."""
    executor = _executor(plan.manifest, "pnp-batch-preview")
    executor.parameters["map_count"] = plan.manifest.run.slurm.tasks
    print(f"\n# {SUBMITTED} script (the size of the array is at most this; what is done is not submitted)")
    print(executor._make_submission_file_text(executor._submitit_command_str, "preview"))


@dataclass(frozen=True)
class Array:
    """A job array. It is noted before it is submitted, and found by its job's name: a kill between the two loses nothing.

    The name is a random one: a folder may be reached by several paths, and others may use theirs in the same queue.

    Attributes:
        job: Name of its job, and of its folder of slices and reports.
        tokens: Of its workers in the ledger.
        plan: Digest of what was asked for: an array of another plan is not waited for.
    """

    job: str
    tokens: Sequence[str]
    plan: str


class Campaign:
    """Arrays one after the other until every package is settled."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.run, self.manifest = driver, driver.run, driver.run.plan.manifest
        self.spec, self.folder = self.manifest.run.slurm, _folder(self.manifest)
        self.device = "cuda" if self.spec.wants_gpus else "cpu"
        here = self.manifest.with_run({"devices": self.device})
        self.worker = Worker(here, self.run.plan.checkpoint, driver.monitor, self.run.fail_fast)
        driver.note_dtype(self.worker)
        self.digest = sha256(
            "\n".join(
                [self.manifest.to_json(), *self.run.stages, str(self.run.plan.limit), *sorted(self.run.plan.only or ())]
            ).encode()
            + self.manifest.path.read_bytes()
        )

    def go(self) -> None:
        """Works until nothing is left.

        Raises:
            EnvironmentFailure: Arrays end without having done anything.
        """
        running, left, fruitless = self._running(), self._unsettled(), 0
        while left and not self.driver.is_stopped:
            array = running or self._noted(left)
            before = len(left)
            strikes = len(list(self.driver.ledger.marks()))
            try:
                if array is not running:
                    self._submit(array, left)
                self._watch(array, left)
            except KeyboardInterrupt:
                self._cancel(array)
                raise
            self.driver.bury(set(array.tokens), ENDED)
            got_further = len(left) < before or len(list(self.driver.ledger.marks())) > strikes
            fruitless = 0 if got_further else fruitless + 1
            if fruitless == FRUITLESS_ARRAYS:
                raise EnvironmentFailure(
                    f"{fruitless} job arrays ended without having done anything; their logs are in {_logs(self.manifest)}"
                )
            running = None

    def _unsettled(self) -> dict[str, Package]:
        """The packages to submit, by their text; what is done already is settled here, which computes nothing."""
        left = {}
        monitor = self.driver.monitor
        schedule = Schedule(
            self.run.plan.packages(),
            self.worker.parts,
            lambda package: rows_of(self.run, package),
            monitor.state.rows_total,
            self.spec.tasks,
        )
        while (package := schedule.take()) is not None:
            if self.worker.is_done(package):
                units = self.worker.process(package, self.run.stages)
                self.driver.settle(package, [unit.outcome for unit in units])
            else:
                left[package_to_json(package)] = package
        return left

    def _running(self) -> Array | None:
        """The array of an earlier run of this plan whose driver died; one of another plan is cancelled.

        The workers of one that has ended are buried: those of other machines cannot be looked at.
        """
        try:
            array = Array(**json.loads((self.folder / "array.json").read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        if self._is_queued(array):
            if array.plan == self.digest:
                self.driver.monitor.note(f"the job array {array.job} of an earlier run goes on; waiting for it")
                return array
            self._cancel(array)
        self.driver.bury(set(array.tokens), ENDED)
        return None

    def _noted(self, left: dict[str, Package]) -> Array:
        """The next array, with its slices in its folder; not submitted yet."""
        slices = self._slices(left)
        array = Array(f"pnp-batch-{secrets.token_hex(4)}", [secrets.token_hex(4) for _ in slices], self.digest)
        for path, slice_ in zip(self._slice_files(array), slices, strict=True):
            write_atomic(path, "".join(f"{line}\n" for line in slice_))
        write_atomic(self.folder / "array.json", json.dumps(asdict(array)))
        return array

    def _slice_files(self, array: Array) -> list[Path]:
        return [self.folder / array.job / f"{i}.slice" for i in range(len(array.tokens))]

    def _submit(self, array: Array, left: dict[str, Package]) -> None:
        specs = [
            self.driver.spec(self.device, f"task {i}", token, self.spec.cpus_per_task).to_json()
            for i, token in enumerate(array.tokens)
        ]
        executor = _executor(self.manifest, array.job)
        try:
            jobs = executor.map_array(run_slice, specs, [str(path) for path in self._slice_files(array)])
        except submitit.core.utils.FailedJobError as error:
            raise EnvironmentFailure(f"Slurm refuses the job array: {str(error).strip()}") from error
        number = jobs[0].job_id.partition("_")[0]
        self.driver.monitor.note(
            f"submitted job array {number} ({array.job}): {counted(len(specs), 'task')}, {counted(len(left), 'package')}"
        )

    def _slices(self, left: dict[str, Package]) -> list[list[str]]:
        """The packages dealt out so that every task has about the same number of UNet rows."""
        slices: list[list[str]] = [[] for _ in range(min(self.spec.tasks, len(left)))]
        rows = [0] * len(slices)
        for line, package in left.items():
            least = rows.index(min(rows))
            slices[least].append(line)
            rows[least] += rows_of(self.run, package)
        return slices

    def _watch(self, array: Array, left: dict[str, Package]) -> None:
        """Settles what the tasks report until the array has left the queue; takes it out of `left`."""
        read: dict[Path, int] = defaultdict(int)
        while True:
            queued = self._is_queued(array)
            for path in sorted((self.folder / array.job).glob("*.report")):
                for line, report in _reports(path, read):
                    package = left.pop(line, None)
                    if package is not None:
                        self.driver.take(package, report)
            self.driver.watch_workers()
            if self.driver.is_stopped:
                self._cancel(array)
            if not queued or not left or self.driver.is_stopped:
                return
            time.sleep(POLL_SECONDS)

    def _is_queued(self, array: Array) -> bool:
        """Whether anything of an array waits or runs. A controller that does not answer now says nothing about it."""
        listed = _slurm("squeue", "--me", "--noheader", "--format=%i", f"--name={array.job}")
        return bool(listed.returncode or listed.stdout.strip())

    def _cancel(self, array: Array) -> None:
        """Ends the array and waits for it: its tasks stop at their next step and take their marks back."""
        self.driver.ask_to_stop()
        _slurm("scancel", "--me", f"--name={array.job}")
        end = time.monotonic() + LEAVE_SECONDS
        while self._is_queued(array) and time.monotonic() < end:
            time.sleep(0.5)
        self.driver.may_go_on()


def _folder(manifest: Manifest) -> Path:
    return manifest.output / "slurm"


def _logs(manifest: Manifest) -> Path:
    logs = manifest.run.slurm.logs
    return manifest.located(logs) if logs else _folder(manifest) / "logs"


def _executor(manifest: Manifest, job: str) -> submitit.SlurmExecutor:
    """submitit's writer of sbatch scripts, set up.

    Raises:
        EnvironmentFailure: There is no Slurm here.
    """
    spec = manifest.run.slurm
    try:
        executor = submitit.SlurmExecutor(folder=_logs(manifest), python=spec.python)
    except RuntimeError as error:
        raise EnvironmentFailure(
            "there is no Slurm on this machine (no `srun`); run this where jobs are submitted"
        ) from error
    executor.update_parameters(job_name=job, **_parameters(spec))
    return executor


def _parameters(spec: SlurmSpec) -> dict[str, Any]:
    """submitit's names for the options."""
    names = (
        "partition",
        "gres",
        "gpus_per_node",
        "cpus_per_task",
        "mem",
        "account",
        "qos",
        "constraint",
        "nodelist",
        "time",
    )
    given = {name: value for name in names if (value := getattr(spec, name)) is not None}
    return given | {
        "setup": list(spec.setup),
        "array_parallelism": spec.parallel or spec.tasks,
        "signal_delay_s": min(NOTICE_SECONDS, spec.time * 60 // 4),
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True},
    }


def run_slice(spec: str, path: str) -> None:
    """What a task of the array does: the packages of its slice, each with a line in its report file when it is settled.

    A task that Slurm requeues begins again here and passes over what it has reported.
    """
    try:
        with interruptible(signal.SIGUSR2):  # out of time; the usual ones come to those that are preempted or cancelled
            failure = _work_off(RemoteWorker(spec), Path(path))
    except Interrupted:
        failure = STOPPED
    if failure is not None:
        print(failure)


def _work_off(worker: RemoteWorker, slice_: Path) -> str | None:
    """Works until the end of the slice, or gives the reason why not."""
    worker.bury_earlier_selves()
    report_file = slice_.with_suffix(".report")
    done = {line for line, _ in _reports(report_file, defaultdict(int))}
    for line in slice_.read_text(encoding="utf-8").splitlines():
        if line in done:
            continue
        answer = worker.process(line)
        report = Report.from_json(answer)
        if report.interrupted or report.failure:
            return report.failure or STOPPED
        with report_file.open("ab", buffering=0) as file:
            file.write(f"\n{json.dumps([line, answer])}\n".encode())  # a kill may have torn the line before
    return None


def _reports(path: Path, read: dict[Path, int]) -> Iterator[tuple[str, Report]]:
    """The whole lines of a report file from `read[path]` on, which is moved on."""
    try:
        with path.open("rb") as file:
            file.seek(read[path])
            data = file.read()
    except FileNotFoundError:
        return
    whole = data[: data.rfind(b"\n") + 1]
    read[path] += len(whole)
    for line in whole.splitlines():
        try:
            package, answer = json.loads(line)
        except ValueError:
            continue  # empty, or torn by a kill
        yield package, Report.from_json(answer)


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise EnvironmentFailure(
            f"there is no `{command[0]}` on this machine; run this where jobs are submitted"
        ) from error
