"""What `run --dry-run` says."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from pnp_batch.cli.paths import existing_parent
from pnp_batch.cli.plans import worker_of
from pnp_batch.cli.verb import say
from pnp_batch.names import counted

if TYPE_CHECKING:
    from pnp_batch.plan import Plan
    from pnp_batch.survey import Survey


def show_estimate(plan: Plan) -> None:
    """Prints what is left to compute, how long that takes here, and the room it needs."""
    from pnp_batch.monitor import clock
    from pnp_batch.runner import bank_forecast, seconds_per_row_cell
    from pnp_batch.survey import survey

    worker = worker_of(plan)
    counts = survey(plan, worker)
    left = counts.left
    there = counted(counts.translated, "is", "are")
    print(f"{results_of(counts.translations, counts.sources)}; {there} there already")
    print(
        f"to compute: {counted(left.translations, 'result')}, {counted(left.trajectories, 'trajectory', 'trajectories')}"
    )
    print(
        f"UNet rows:  {left.rows} ({left.inversion_rows} inversion, {left.source_rows} source, {left.target_rows} target)"
    )
    free = shutil.disk_usage(existing_parent(plan.manifest.store)).free
    print(f"disk:       {left.disk_bytes / 1e6:.1f} MB at most, {free / 1e6:.0f} MB free")
    if left.rows and not worker.is_at_work_here:
        print(
            f"time:       cannot be told on this machine, which has no device of the workers' kind ({worker.context.device})"
        )
    elif left.rows:
        cell_seconds = seconds_per_row_cell(plan, worker)
        seconds = None if cell_seconds is None else cell_seconds * left.row_cells
        print(f"time:       about {clock(seconds)} on {worker.context.device} (from one timed UNet pass)")
        print("bank:       " + "\n            ".join(bank_forecast(plan, worker)))
    if plan.manifest.quality is not None:
        _show_retries(plan, counts)
    if left.disk_bytes > free:
        say("warning: there may not be enough space on the disk")


def _show_retries(plan: Plan, counts: Survey) -> None:
    retries, judged = counts.retries, sum(counts.judged.values())
    print(
        f"quality:    {counted(counts.unjudged, 'result')} to judge; {counted(judged, 'has its', 'have their')} verdict"
    )
    if retries.rows:
        print(
            f"            at most {counted(retries.rows, 'UNet row')} and {retries.disk_bytes / 1e6:.1f} MB more, "
            "if none of them passes before its last retry"
        )


def results_of(results: int, sources: int) -> str:
    """`3 results of 1 guidance image`."""
    return f"{counted(results, 'result')} of {counted(sources, 'guidance image')}"
