"""Engine `local`: one worker in this process, on one device. The default."""

from __future__ import annotations

from pnp_batch.engines.driver import driving
from pnp_batch.engines.run import Run, Summary
from pnp_batch.runner import Worker


def run_local(run: Run) -> Summary:
    """Makes everything a plan names that is not there yet.

    Raises:
        EnvironmentFailure: The machine failed, or another run works in the folder.
    """
    plan = run.plan
    with driving(run) as driver:
        worker = Worker(plan.manifest, plan.checkpoint, driver.monitor, run.fail_fast)
        driver.note_dtype(worker)
        with worker.ledger.crashes_noted():
            for package in plan.packages():
                units = worker.process(package, run.stages)
                driver.settle(package, [unit.outcome for unit in units])
                if driver.is_stopped:
                    break
        driver.finish()
        return driver.summary(list(worker.store.corrupt.values()))
