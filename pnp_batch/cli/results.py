"""The verbs for results that are there: `report`, `prune`, `evaluate`, `inspect`, and `import` of a benchmark to have some."""

from __future__ import annotations

import functools
import json
import operator
import sys
import webbrowser
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pnp_batch.cli.pages import rewrite_report, wanted_by
from pnp_batch.cli.paths import check_file
from pnp_batch.cli.plans import load, planned_quietly, worker_of
from pnp_batch.cli.verb import OK, ManifestPath, make_console, say, verb
from pnp_batch.errors import ModelError, PnpError, disk_errors_named
from pnp_batch.hub import nothing_downloaded
from pnp_batch.names import counted

if TYPE_CHECKING:
    from pnp_batch.plan import Plan


@verb
def report(
    manifest: ManifestPath,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> int:
    """Write report.html anew from what is there."""
    loaded = load(manifest)
    if not loaded.output.exists():
        raise PnpError(f"there are no results yet; make them with: pnp-batch run {manifest}")
    path = rewrite_report(loaded)
    print(path)
    if open_it:
        webbrowser.open(path.as_uri())
    return OK


@verb
@nothing_downloaded()
def prune(
    manifests: Annotated[
        list[Path], typer.Argument(metavar="MANIFEST...", help="All manifests that write into the folder.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> int:
    """Remove results that no manifest asks for any more, with their rows; the store keeps them, should they be wanted again."""
    from pnp_batch.engines.run import only_run
    from pnp_batch.leftovers import remove
    from pnp_batch.stages.outputs import Outputs

    plans = [planned_quietly(load(path)) for path in manifests]
    outputs, count = Outputs(plans[0].manifest.output), 0
    if any(plan.manifest.output != outputs.root for plan in plans):
        raise typer.BadParameter("these manifests do not write into one folder", param_hint="MANIFEST...")
    with nullcontext() if dry_run else only_run(outputs.root):
        wanted = functools.reduce(operator.or_, map(wanted_by, plans))
        for row in filter(wanted.lacks, outputs.rows()):
            print(f"{row['file_name']} ({row['source']}: '{row['prompt']}')")
            count += 1
        if count and not dry_run:
            remove(outputs, wanted)
    print(f"{'would remove' if dry_run else 'removed'} {counted(count, 'result')}")
    if count and not dry_run:
        rewrite_report(plans[0].manifest, plans[0])
    return OK


@verb
def evaluate(
    manifest: ManifestPath,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write every result's numbers here.")
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="One row per method, in the layout of the PIE-Bench paper.")
    ] = False,
) -> int:
    """Measure the results that are there against their sources and prompts."""
    from pnp_batch.evaluation.columns import METRICS_FILE
    from pnp_batch.store.files import write_atomic
    from pnp_batch.survey import as_last_run

    if json_file is not None:
        check_file(json_file, "--json")
    plan = as_last_run(planned_quietly(load(manifest)))

    from pnp_batch.evaluation.scores import scores  # seconds of torch, once there is something to do
    from pnp_batch.evaluation.summary import by_method, method_table, pie_table, reasons

    worker = worker_of(plan)
    found = _watched(scores(plan, worker.context), plan)
    clips = sum(given.video is not None for given in plan.manifest.inputs)
    if clips:
        say(f"{counted(clips, 'video is', 'videos are')} left out: only pictures are measured (docs/evaluation.md)")
    if not found:
        if clips == len(plan.manifest.inputs):
            raise PnpError("there is nothing to measure: this manifest has no pictures")
        raise PnpError(f"there are no results yet; make them with: pnp-batch run {manifest}")
    for reason in reasons(found):
        say(reason)
    tables = [pie_table(found)] if table else [method_table(*group) for group in by_method(found).items()]
    for each in tables:
        make_console(stderr=False, width=None if sys.stdout.isatty() else 250).print(each)
    rows = [score.row() for score in found]
    if json_file is not None:
        with disk_errors_named(str(json_file)):
            write_atomic(json_file, json.dumps(rows, indent=1, ensure_ascii=False))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    worker.outputs.write_file(METRICS_FILE, "".join(lines).encode(errors="backslashreplace"))
    say(f"report with these figures: {rewrite_report(plan.manifest, plan)}")
    return OK


def _watched(items: Iterable[Any], plan: Plan) -> list[Any]:
    """All of some results, with a progress bar on a terminal."""
    from rich.progress import track

    console = make_console()
    total = plan.estimate().translations if console.is_terminal else None
    return list(track(items, "results", total, console=console, disable=not console.is_terminal, transient=True))


@verb
def inspect(
    what: Annotated[str, typer.Argument(help="features, attention or trajectory.", show_default=False)],
    manifest: ManifestPath,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Name (the end of its path will do) or number (from 0) of a guidance image; default: the first 50.",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Decoder layers, such as 4,7,11; default: the paper's and the model's own.")
    ] = None,
    timesteps: Annotated[int, typer.Option(min=1, help="How many timesteps, evenly.")] = 6,
) -> int:
    """Look inside: PCA of features or self-attention, or the denoising trajectory, as PNG and one HTML page."""
    from pnp_batch.inspection.kinds import ABOUT
    from pnp_batch.survey import as_last_run

    if what not in ABOUT:
        raise typer.BadParameter(f"'{what}' is not one of {', '.join(ABOUT)}", param_hint="WHAT")
    plan = as_last_run(planned_quietly(load(manifest)))
    at = _layers(what, layers, plan)

    from pnp_batch.inspection import page, sheets  # seconds of torch, once there is something to do
    from pnp_batch.inspection.subjects import subjects

    context = worker_of(plan).context
    chosen = subjects(plan, context, inputs or ())
    if chosen.left_out:
        say(
            f"{counted(chosen.left_out, 'guidance image is', 'guidance images are')} not shown; name with --input what is to be"
        )
    pictures = sheets.made(what, context.model, chosen.found, at, timesteps)
    print(page.write(what, pictures, plan.manifest.output / "inspect"))
    return OK


def _layers(what: str, written: str | None, plan: Plan) -> list[int]:
    """The decoder layers to look at, checked against the model."""
    from pnp_batch.inspection.kinds import default_layers

    if written is None:
        return default_layers(what, plan.checkpoint)
    try:
        layers = sorted({int(part) for part in written.split(",")})
    except ValueError:
        raise typer.BadParameter(f"'{written}' is no list of numbers such as 4,7,11", param_hint="--layers") from None
    try:
        plan.checkpoint.check_layers(*((layers, ()) if what == "features" else ((), layers)))
    except ModelError as error:
        raise typer.BadParameter(str(error), param_hint="--layers") from error
    return layers


@verb
def import_benchmark(
    benchmark: Annotated[str, typer.Argument(help="wild-ti2i, imagenet-r-ti2i or pie-bench.", show_default=False)],
    path: Annotated[Path, typer.Argument(help="The folder or file as its authors publish it.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="The model of the manifest.")
    ] = "stable-diffusion-v1-5/stable-diffusion-v1-5",
) -> int:
    """Print a manifest for a benchmark of the field, masks included: pnp-batch import pie-bench PATH > manifest.yaml"""
    from pnp_batch.evaluation.benchmarks import BENCHMARKS, as_manifest

    if benchmark not in BENCHMARKS:
        raise typer.BadParameter(f"'{benchmark}' is not one of {', '.join(BENCHMARKS)}", param_hint="BENCHMARK")
    print(as_manifest(benchmark, path, model), end="")
    return OK
