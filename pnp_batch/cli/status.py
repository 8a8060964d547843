"""`status`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pnp_batch.cli.pages import leftovers_named
from pnp_batch.cli.plans import load, planned_quietly, worker_of
from pnp_batch.cli.verb import OK, ManifestPath, verb
from pnp_batch.hub import nothing_downloaded
from pnp_batch.names import counted

if TYPE_CHECKING:
    from pnp_batch.survey import Survey


@verb
@nothing_downloaded()
def status(
    manifest: ManifestPath,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Look at every result, as --json does; of large plans the run's own count is shown."
        ),
    ] = False,
) -> int:
    """How far a run is; works from any shell, while it runs and after."""
    from dataclasses import asdict

    from pnp_batch.survey import as_last_run, counted_by_run, progress, survey, workers

    loaded = load(manifest)
    if not exact and not as_json and (last := counted_by_run(loaded)):
        print(f"{manifest}: {_state(last)}\n{_counted(last)}")
    else:
        plan = as_last_run(planned_quietly(loaded))
        counts, last = survey(plan, worker_of(plan)), progress(loaded.output)
        if as_json:
            print(json.dumps({**asdict(counts), "run": last}, indent=1))
        else:
            print(f"{manifest}: {_state(last)}\n{_surveyed(counts, gate=loaded.quality is not None)}")
            if counts.leftovers:
                print(leftovers_named(counts.leftovers, manifest))
    if not as_json:
        for line in (*_pace(last), *workers(loaded)):
            print(line)
    return OK


def _state(last: Mapping[str, Any] | None) -> str:
    if last is None:
        return "never ran"
    return f"running (process {last['pid']} on {last['host']})" if last["running"] else "not running"


def _counted(last: Mapping[str, Any]) -> str:
    """What a run counts itself."""
    done, failed = max(last["done"], last["translated"]), last["failed"]
    left = last["translations"] - done - failed
    return f"{done} done, {failed} failed, {left} to go through, as the run counts (--exact looks at every result)"


def _surveyed(counts: Survey, *, gate: bool) -> str:
    """What is there by stage."""
    lines = [f"{'stage':<10} {'done':>9} {'failed':>9} {'left':>9}"]
    for stage, done, failed, of in (
        ("invert", counts.inverted, counts.not_inverted, counts.trajectories),
        ("translate", counts.translated, counts.failed, counts.translations),
        ("assemble", counts.assembled, counts.failed, counts.translations),
    ):
        lines.append(f"{stage:<10} {done:>9} {failed:>9} {of - done - failed:>9}")
    if gate:
        words = ("passed", "flagged", "not judged")
        lines.append("quality: " + ", ".join(f"{counts.judged.get(word, 0)} {word}" for word in words))
    if counts.quarantined:
        lines.append(f"{counts.quarantined} in quarantine: workers died of them; --retry-failed tries them again")
    return "\n".join(lines)


def _pace(last: Mapping[str, Any] | None) -> Iterator[str]:
    """How fast the last run is, or was."""
    from pnp_batch.monitor import clock

    if last is not None:
        rate = last["rows"] / last["seconds"] if last["seconds"] else 0.0
        eta = f", ETA {clock(last['eta'])}" if last["running"] else ""
        yield f"last run: {clock(last['seconds'])}, {counted(last['rows'], 'UNet row')}, {rate:.1f} rows/s{eta}"
