"""The report, written anew by every verb that changes what it shows, and what is said of results that were left behind."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pnp_batch.cli.plans import planned_quietly, worker_of
from pnp_batch.cli.verb import say
from pnp_batch.errors import EnvironmentFailure, ManifestError
from pnp_batch.hub import nothing_downloaded
from pnp_batch.names import counted

if TYPE_CHECKING:
    from pnp_batch.leftovers import Wanted
    from pnp_batch.manifest import Manifest
    from pnp_batch.plan import Plan


@nothing_downloaded()
def rewrite_report(manifest: Manifest, plan: Plan | None = None, there: int = 0) -> Path:
    """Writes `report.html`, which marks what is no longer in the manifest; `there` of its results are known to be there."""
    from pnp_batch.failures import FailureList
    from pnp_batch.leftovers import EVERYTHING
    from pnp_batch.report.html import write_report
    from pnp_batch.stages.outputs import Outputs
    from pnp_batch.store import ArtifactStore

    outputs, failures = Outputs(manifest.output), list(FailureList(manifest).rows.values())
    wanted = EVERYTHING
    if outputs.row_count() > there:
        try:
            wanted = wanted_by(plan or planned_quietly(manifest))
        except (ManifestError, EnvironmentFailure) as error:  # the page is of use without pictures or model, too
            say(f"results that are no longer in the manifest are not marked, since they cannot be told:\n{error}")
    # Absolute: the page's commands are pasted wherever a person happens to be.
    name, store = str(manifest.path.absolute()), ArtifactStore(manifest.store)
    path = write_report(name, outputs, store, failures, wanted.lacks)
    if count := wanted.leftovers(outputs):
        say(leftovers_named(count, manifest.path))
    return path


def wanted_by(plan: Plan) -> Wanted:
    """What this plan asks for, to tell its results from those left behind."""
    from pnp_batch.leftovers import wanted

    return wanted(plan, worker_of(plan).context)


def leftovers_named(count: int, manifest: Path) -> str:
    """Says that results are there which nobody asks for, and how to see them."""
    what = counted(count, "result in the folder is", "results in the folder are")
    return f"{what} no longer in the manifest; to list: pnp-batch prune {shlex.quote(str(manifest))} --dry-run"
