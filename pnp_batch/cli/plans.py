"""From a manifest's path to what is needed of it: the manifest, the model, the plan, a worker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pnp_batch.cli.verb import say
from pnp_batch.errors import EnvironmentFailure, ManifestError, ModelError
from pnp_batch.names import counted

if TYPE_CHECKING:
    from pnp_batch.checkpoint import Checkpoint
    from pnp_batch.manifest import Manifest
    from pnp_batch.plan import Checked, Plan


def load(path: Path, engine: str | None = None, devices: str | None = None) -> Manifest:
    """Reads a manifest; an option of the command line goes before what it says."""
    from pnp_batch.manifest import load_manifest

    return load_manifest(path).with_run({k: v for k, v in (("engine", engine), ("devices", devices)) if v is not None})


def checkpoint_of(manifest: Manifest) -> Checkpoint:
    """The model's files; that there are none is said at the line of the manifest."""
    from pnp_batch.checkpoint import resolve

    try:
        return resolve(
            manifest.model, manifest.base, revision=manifest.revision, variant=manifest.variant, config=manifest.config
        )
    except ModelError as error:
        raise ManifestError([manifest.problem(("model",), str(error))]) from error


def check_all(manifest: Manifest, *, quiet: bool = False) -> tuple[Checkpoint, Checked]:
    """The model, and what the manifest names; whatever is wrong with either is said at once."""
    from pnp_batch.plan import check, problems_without_model

    try:
        checkpoint = checkpoint_of(manifest)
    except (ManifestError, EnvironmentFailure) as error:
        others = problems_without_model(manifest)
        if not others:
            raise
        cannot_be_had = manifest.problem(("model",), str(error))
        of_model = error.problems if isinstance(error, ManifestError) else (cannot_be_had,)
        raise ManifestError([*of_model, *others]) from error
    checked = check(manifest, checkpoint)
    for message in () if quiet else checked.warnings:
        say(f"warning: {message}")
    return checkpoint, checked


def planned(manifest: Manifest, limit: int | None = None, retry_failed: bool = False) -> Plan:
    """Checks everything and gives the plan; prints warnings."""
    from pnp_batch.failures import FailureList
    from pnp_batch.plan import Plan

    checkpoint, _ = check_all(manifest)
    only = frozenset(FailureList(manifest).rows) if retry_failed else None
    plan = Plan(manifest, checkpoint, limit, only)
    if only and (strangers := plan.strangers()):
        listed = counted(len(only), "listed failure")
        what = f"{strangers} of {listed}: no result of this manifest as it is now, and left alone"
        say(f"warning: {what}; a run without --retry-failed makes all that is missing")
    return plan


def planned_quietly(manifest: Manifest) -> Plan:
    """The plan of a manifest whose results are looked at; what is worth a warning was said by the run."""
    from pnp_batch.plan import Plan

    checkpoint, _ = check_all(manifest, quiet=True)
    return Plan(manifest, checkpoint)


def worker_of(plan: Plan) -> Any:
    """A worker that tells nobody what it does, to look at the store with or to measure."""
    from pnp_batch.runner import Silent, Worker

    return Worker(plan.manifest, plan.checkpoint, Silent())
