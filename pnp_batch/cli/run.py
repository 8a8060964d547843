"""`run`, and the verbs before it: `init`, `validate`, `prefetch`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pnp_batch.cli.estimate import results_of, show_estimate
from pnp_batch.cli.pages import rewrite_report
from pnp_batch.cli.paths import check_file
from pnp_batch.cli.plans import check_all, checkpoint_of, load, planned, worker_of
from pnp_batch.cli.verb import OK, SOME_FAILED, ManifestPath, make_console, say, verb
from pnp_batch.errors import disk_errors_named
from pnp_batch.names import counted

if TYPE_CHECKING:
    from pnp_batch.engines import Summary
    from pnp_batch.plan import Plan


@verb
def init(path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("manifest.yaml")) -> int:
    """Write a starter manifest to edit; docs/manifest.md explains every setting."""
    from importlib.resources import files

    from pnp_batch.store.files import write_atomic

    if os.path.lexists(path):
        raise typer.BadParameter(f"{path} exists; name another file", param_hint="PATH")
    check_file(path, "PATH")
    with disk_errors_named(str(path)):
        write_atomic(path, files("pnp_batch").joinpath("starter.yaml").read_bytes())
    print(f"wrote {path}; edit it, then: pnp-batch run {path}")
    return OK


@verb
def validate(manifest: ManifestPath) -> int:
    """Check a manifest and everything it names; start nothing."""
    loaded = load(manifest)
    _, checked = check_all(loaded)
    print(f"{manifest} is valid: {results_of(checked.translations, checked.sources)}")
    return OK


@verb
def prefetch(manifest: ManifestPath) -> int:
    """Fetch weights before going offline: the model's, and those that `quality:` and `evaluation:` measure with."""
    from pnp_batch.evaluation.backbones import of_evaluation
    from pnp_batch.runner import Silent, Worker

    loaded = load(manifest)
    checkpoint = checkpoint_of(loaded)
    worker = Worker(loaded, checkpoint, Silent())
    size = sum(path.stat().st_size for path in checkpoint.weight_files())
    print(f"{checkpoint.name} is here: {checkpoint.weights} ({size / 1e6:.0f} MB)")
    _ = worker.rule
    code = OK
    for kind, found in of_evaluation(loaded, worker.digests):
        if isinstance(found, str):
            say(f"evaluation.{kind}: {found}")
            code = SOME_FAILED
        else:
            print(f"{found.name} is here: {found.path}")
    return code


@verb
def run(
    manifest: ManifestPath,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, count and estimate; compute nothing.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N guidance images.")] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE", help="Only this stage: invert, bank, translate (with the quality gate) or assemble."
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Only what failed in an earlier run.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    engine: Annotated[str | None, typer.Option(help="Overrides run.engine: local, ray or slurm.")] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Overrides run.devices: auto, all, how many, the numbers of GPUs (0,1), cpu, cuda or cuda:1."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Only results of this guidance image (its name in metadata.jsonl, or the end of that)."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Only results with this very prompt.")] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="PREFIX", help="Only the result whose key begins so (file names end with ten digits of it)."
        ),
    ] = None,
) -> int:
    """Make every result the manifest names that is not there yet."""
    from pnp_batch.engines import ENGINES, Run, engine_for
    from pnp_batch.monitor import view_for
    from pnp_batch.stages import STAGES

    loaded = load(manifest, engine=engine, devices=devices)
    if only is not None and only not in STAGES:
        raise typer.BadParameter(f"'{only}' is not a stage; stages are {', '.join(STAGES)}", param_hint="--only")
    plan = planned(loaded, limit=limit, retry_failed=retry_failed)
    if source is not None or prompt is not None or key is not None:
        plan = _selection(plan, source, prompt, key)
    _ = worker_of(plan).rule  # says now, not after hours, that weights of the quality gate are missing
    chosen = ENGINES[engine_for(loaded)]
    if dry_run:
        show_estimate(plan)
        chosen.preview(plan)
        return OK
    console = make_console()
    stages = (only,) if only else tuple(STAGES)
    summary = chosen(Run(plan, view_for(console), stages, fail_fast, forgive=retry_failed))
    for message in summary.corrupt:
        say(message)
    # The quality gate is part of the stage `translate`.
    _say_summary(summary, fail_fast=fail_fast, judged=loaded.quality is not None and "translate" in stages)
    return conclude(plan, summary, stages == tuple(STAGES))


def _selection(plan: Plan, source: str | None, prompt: str | None, key: str | None) -> Plan:
    from dataclasses import replace

    from pnp_batch.selection import selected

    return replace(plan, only=selected(plan, worker_of(plan), source, prompt, key))


def _say_summary(summary: Summary, *, fail_fast: bool, judged: bool) -> None:
    work = f"{counted(summary.inverted, 'inversion')}, {counted(summary.rows, 'UNet row')}, {summary.seconds:.1f} s"
    is_stopped = fail_fast and summary.failed > 0
    say(
        f"{'at least ' * is_stopped}{summary.done} of {counted(summary.translations, 'result is', 'results are')} there "
        f"({summary.translated} computed now, {work}), {summary.failed} failed"
    )
    if judged:
        _say_quality(summary)
    if is_stopped:
        left = counted(summary.translations - summary.done - summary.failed, "result was", "results were")
        say(f"stopped at the first failure (--fail-fast); {left} not looked at")


def _say_quality(summary: Summary) -> None:
    """What the quality gate found. A flagged result is a result: it is there, and the exit code is that of the rest."""
    say(
        f"quality: {summary.passed} passed ({summary.saved} of them with a retry's settings), {summary.flagged} flagged"
        + (f", {summary.not_judged} could not be judged" if summary.not_judged else "")
    )
    if summary.flagged or summary.not_judged:
        say("why is in metadata.jsonl (quality_reason), and in the report, which filters by it")


def conclude(plan: Plan, summary: Summary, complete: bool) -> int:
    """Writes the report and says where everything is."""
    manifest = plan.manifest
    if complete:
        for what, folder in (("pictures:", manifest.output / "images"), ("videos:", manifest.output / "videos")):
            if folder.exists():
                print(f"{what:<9} {folder}")
        print(f"report:   {rewrite_report(manifest, plan, summary.done)}")
    if summary.failed:
        say(f"what failed and why: {manifest.output / 'failures.jsonl'}")
        say(f"to try just that again: pnp-batch run {shlex.quote(str(manifest.path))} --retry-failed")
    elif left := summary.translations - summary.done:
        if complete:
            say(
                f"{counted(left, 'result is', 'results are')} not there, though nothing failed; run the same command again"
            )
            return SOME_FAILED
        say(f"{counted(left, 'result waits', 'results wait')} for another stage; without --only all stages run")
    return SOME_FAILED if summary.failed else OK
