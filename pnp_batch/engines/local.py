"""Engine `local`: one worker in this process, on one device. The default."""

from __future__ import annotations

import logging
from contextlib import closing

from pnp_batch.engines.run import Run, Summary, logged, only_run
from pnp_batch.failures import FailureList
from pnp_batch.monitor import Monitor
from pnp_batch.plan import Estimate, Package, Plan
from pnp_batch.runner import Worker

log = logging.getLogger(__name__)


def run_local(run: Run) -> Summary:
    """Makes everything a plan names that is not there yet.

    Raises:
        EnvironmentFailure: The machine failed, or another run works in the folder.
    """
    manifest = run.plan.manifest
    with only_run(manifest.output), logged(manifest.output), closing(run.view):
        monitor = Monitor(run.plan.estimate(), manifest.output, run.view)
        worker = Worker(manifest, run.plan.checkpoint, monitor, run.fail_fast)
        worker.store.remove_stale_temporaries()
        worker.outputs.remove_stale_temporaries()
        failures = FailureList(manifest)
        log.info(
            "run of %s: %d results of %d sources", manifest.path, monitor.state.translations, monitor.state.sources
        )
        whole_plan = False
        try:
            for package in run.plan.packages():
                failed = _process(run, worker, package, monitor, failures)
                if failed and run.fail_fast:
                    break
            else:
                whole_plan = run.is_whole
        finally:
            monitor.close()
            failures.finish(whole_plan)
            worker.outputs.drop_superseded_rows()
        return _summary(worker, monitor)


def _process(run: Run, worker: Worker, package: Package, monitor: Monitor, failures: FailureList) -> int:
    units = worker.process(package, run.stages)
    failed = failures.settle(units)
    monitor.settled(_rows(run.plan, package), sum(unit.is_done for unit in units), len(failed))
    for unit in failed:
        log.error(
            "%s: '%s' failed at %s: %s", unit.item.job.source.name, unit.translation.prompt, unit.stage, unit.error
        )
        monitor.note(f"failed: {unit.item.job.source.name}: {unit.error}")
    return len(failed)


def _rows(plan: Plan, package: Package) -> int:
    estimate = Estimate()
    for job in package.jobs:
        estimate.add(job, plan.checkpoint)
    return estimate.rows


def _summary(worker: Worker, monitor: Monitor) -> Summary:
    state = monitor.state
    log.info(
        "%d of %d results are there, %d failed, %d UNet rows", state.done, state.translations, state.failed, state.rows
    )
    return Summary(
        sources=state.sources,
        translations=state.translations,
        done=state.done,
        failed=state.failed,
        inverted=state.inverted,
        translated=state.translated,
        rows=state.rows,
        seconds=state.seconds,
        corrupt=list(worker.store.corrupt.values()),
        passed=state.passed,
        saved=state.saved,
        flagged=state.flagged,
        not_judged=state.not_judged,
    )
