"""The command line: the verbs, and the only place that turns errors into exit codes.

Nothing heavy is imported at the top: `pnp-batch --help` must answer at once. Each verb imports what it needs.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import operator
import os
import shlex
import shutil
import sys
import webbrowser
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from pnp_batch.errors import EnvironmentFailure, ManifestError, ModelError, PnpError, disk_errors_named
from pnp_batch.interrupts import interruptible
from pnp_batch.names import counted

if TYPE_CHECKING:
    from pnp_batch.checkpoint import Checkpoint
    from pnp_batch.engines import Summary
    from pnp_batch.leftovers import Wanted
    from pnp_batch.manifest import Manifest
    from pnp_batch.plan import Checked, Plan
    from pnp_batch.survey import Survey

OK, SOME_FAILED, WRONG_INPUT, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    name="pnp-batch",
    help="Translate folders of images by text with Plug-and-Play diffusion features. "
    "Run it again and it goes on where it stopped.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
store_app = typer.Typer(
    help="What the artifact store holds, whether it is intact, and how to free space.", no_args_is_help=True
)
app.add_typer(store_app, name="store")
shapes_app = typer.Typer(help="Procedural scenes, and training the small model that knows them.", no_args_is_help=True)
app.add_typer(shapes_app, name="shapes")
bench_app = typer.Typer(help="Benchmarks whose truth is known.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

ManifestPath = Annotated[Path, typer.Argument(metavar="MANIFEST", help="The YAML manifest.", show_default=False)]


def main() -> NoReturn:
    """Entry point of `pnp-batch`."""
    if sys.stdout is not None:  # as it is after `>&-`
        sys.stdout = _heedless(sys.stdout)
    if sys.stderr is not None:
        sys.stderr = _heedless(sys.stderr)
    app()
    sys.exit(OK)


class _Heedless(io.FileIO):
    """A file that takes whatever is written to it, also once nobody reads it: a run is worth more than its words."""

    def write(self, data: Any) -> int:
        """Writes as far as anybody listens."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def _heedless(stream: TextIO) -> TextIO:
    """The same stream, but writing to it after `| head` has read enough is no error."""
    raw = io.BufferedWriter(_Heedless(stream.fileno(), "wb", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=bool(stream.line_buffering))


def _verb(function: Callable[..., int]) -> Callable[..., None]:
    """Runs a verb and turns what it returns or raises into an exit code."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with interruptible():
                code = function(*args, **kwargs)
        except ManifestError as error:
            _say(str(error))
            _say(f"{counted(len(error.problems), 'problem')} found; nothing was started")
            code = WRONG_INPUT
        except ModelError as error:
            _say(f"model: {error}")
            code = WRONG_INPUT
        except EnvironmentFailure as error:
            _say(f"stopped: {error}")
            code = ENVIRONMENT
        except PnpError as error:
            _say(f"stopped: {error}")
            code = SOME_FAILED
        except OSError as error:  # nothing that was foreseen, but the machine's doing: a dead mount, a folder in /proc
            place = f"{error.filename}: " if error.filename is not None else ""
            _say(f"stopped: {place}{error.strerror or error}. Once that is put right, run the same command again.")
            code = ENVIRONMENT
        except KeyboardInterrupt:
            _say(
                "\ninterrupted; everything finished so far is kept. Go on with the same command:\n  " + _command_line()
            )
            code = INTERRUPTED
        raise typer.Exit(code)

    return wrapped


@app.command()
@_verb
def run(
    manifest: ManifestPath,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, count and estimate; compute nothing.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N guidance images.")] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="Only this stage: invert, translate (with the quality gate) or assemble."),
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

    loaded = _load(manifest, engine=engine, devices=devices)
    if only is not None and only not in STAGES:
        raise typer.BadParameter(f"'{only}' is not a stage; stages are {', '.join(STAGES)}", param_hint="--only")
    plan = _plan(loaded, limit=limit, retry_failed=retry_failed)
    if source is not None or prompt is not None or key is not None:
        plan = _selection(plan, source, prompt, key)
    _ = _worker(plan).rule  # says now, not after hours, that weights of the quality gate are missing
    chosen = ENGINES[engine_for(loaded)]
    if dry_run:
        _show_estimate(plan)
        chosen.preview(plan)
        return OK
    console = _console()
    stages = (only,) if only else tuple(STAGES)
    summary = chosen(Run(plan, view_for(console), stages, fail_fast, forgive=retry_failed))
    for message in summary.corrupt:
        _say(message)
    # The quality gate is part of the stage `translate`.
    _say_summary(summary, fail_fast=fail_fast, judged=loaded.quality is not None and "translate" in stages)
    return _conclude(plan, summary, stages == tuple(STAGES))


def _selection(plan: Plan, source: str | None, prompt: str | None, key: str | None) -> Plan:
    from dataclasses import replace

    from pnp_batch.selection import selected

    return replace(plan, only=selected(plan, _worker(plan), source, prompt, key))


def _say_summary(summary: Summary, *, fail_fast: bool, judged: bool) -> None:
    work = f"{counted(summary.inverted, 'inversion')}, {counted(summary.rows, 'UNet row')}, {summary.seconds:.1f} s"
    is_stopped = fail_fast and summary.failed > 0
    _say(
        f"{'at least ' * is_stopped}{summary.done} of {counted(summary.translations, 'result is', 'results are')} there "
        f"({summary.translated} computed now, {work}), {summary.failed} failed"
    )
    if judged:
        _say_quality(summary)
    if is_stopped:
        left = counted(summary.translations - summary.done - summary.failed, "result was", "results were")
        _say(f"stopped at the first failure (--fail-fast); {left} not looked at")


def _say_quality(summary: Summary) -> None:
    """What the quality gate found. A flagged result is a result: it is there, and the exit code is that of the rest."""
    _say(
        f"quality: {summary.passed} passed ({summary.saved} of them with a retry's settings), {summary.flagged} flagged"
        + (f", {summary.not_judged} could not be judged" if summary.not_judged else "")
    )
    if summary.flagged or summary.not_judged:
        _say("why is in metadata.jsonl (quality_reason), and in the report, which filters by it")


def _conclude(plan: Plan, summary: Summary, complete: bool) -> int:
    """Writes the report and says where everything is."""
    manifest = plan.manifest
    if complete:
        for what, folder in (("pictures:", manifest.output / "images"), ("videos:", manifest.output / "videos")):
            if folder.exists():
                print(f"{what:<9} {folder}")
        print(f"report:   {_write_report(manifest, plan, summary.done)}")
    if summary.failed:
        _say(f"what failed and why: {manifest.output / 'failures.jsonl'}")
        _say(f"to try just that again: pnp-batch run {shlex.quote(str(manifest.path))} --retry-failed")
    elif left := summary.translations - summary.done:
        if complete:
            _say(
                f"{counted(left, 'result is', 'results are')} not there, though nothing failed; run the same command again"
            )
            return SOME_FAILED
        _say(f"{counted(left, 'result waits', 'results wait')} for another stage; without --only all stages run")
    return SOME_FAILED if summary.failed else OK


@app.command()
@_verb
def validate(manifest: ManifestPath) -> int:
    """Check a manifest and everything it names; start nothing."""
    loaded = _load(manifest)
    _, checked = _checked(loaded)
    print(f"{manifest} is valid: {_results_of(checked.translations, checked.sources)}")
    return OK


@app.command()
@_verb
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

    loaded = _load(manifest)
    if not exact and not as_json and (last := counted_by_run(loaded)):
        print(f"{manifest}: {_state(last)}\n{_counted(last)}")
    else:
        plan = as_last_run(_plan(loaded, quiet=True))
        counts, last = survey(plan, _worker(plan)), progress(loaded.output)
        if as_json:
            print(json.dumps({**asdict(counts), "run": last}, indent=1))
        else:
            print(f"{manifest}: {_state(last)}\n{_surveyed(counts, gate=loaded.quality is not None)}")
            if counts.leftovers:
                print(_leftovers(counts.leftovers, manifest))
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


@app.command()
@_verb
def report(
    manifest: ManifestPath,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> int:
    """Write report.html anew from what is there."""
    path = _write_report(_load(manifest))
    print(path)
    if open_it:
        webbrowser.open(path.as_uri())
    return OK


@app.command()
@_verb
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

    plans = [_plan(_load(path), quiet=True) for path in manifests]
    outputs, count = Outputs(plans[0].manifest.output), 0
    if any(plan.manifest.output != outputs.root for plan in plans):
        raise typer.BadParameter("these manifests do not write into one folder", param_hint="MANIFEST...")
    with only_run(outputs.root):
        wanted = functools.reduce(operator.or_, map(_wanted, plans))
        for row in filter(wanted.lacks, outputs.rows()):
            print(f"{row['file_name']} ({row['source']}: '{row['prompt']}')")
            count += 1
        if count and not dry_run:
            remove(outputs, wanted)
    print(f"{'would remove' if dry_run else 'removed'} {counted(count, 'result')}")
    if count and not dry_run:
        _write_report(plans[0].manifest, plans[0])
    return OK


@app.command()
@_verb
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
        _check_writable(json_file, "--json")
    plan = as_last_run(_plan(_load(manifest), quiet=True))

    from pnp_batch.evaluation.scores import scores  # seconds of torch, once there is something to do
    from pnp_batch.evaluation.summary import by_method, method_table, pie_table, reasons

    worker = _worker(plan)
    found = _watched(scores(plan, worker.context), plan)
    clips = sum(given.video is not None for given in plan.manifest.inputs)
    if clips:
        _say(f"{counted(clips, 'video is', 'videos are')} left out: only pictures are measured (docs/evaluation.md)")
    if not found:
        if clips == len(plan.manifest.inputs):
            raise PnpError("there is nothing to measure: this manifest has no pictures")
        raise PnpError(f"there are no results yet; make them with: pnp-batch run {manifest}")
    for reason in reasons(found):
        _say(reason)
    tables = [pie_table(found)] if table else [method_table(*group) for group in by_method(found).items()]
    for each in tables:
        _console(stderr=False, width=None if sys.stdout.isatty() else 250).print(each)
    rows = [score.row() for score in found]
    if json_file is not None:
        with disk_errors_named(str(json_file)):
            write_atomic(json_file, json.dumps(rows, indent=1, ensure_ascii=False))
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    worker.outputs.write_file(METRICS_FILE, "".join(lines).encode(errors="backslashreplace"))
    _say(f"report with these figures: {_write_report(plan.manifest, plan)}")
    return OK


@app.command("import")
@_verb
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


@app.command()
@_verb
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
    plan = as_last_run(_plan(_load(manifest), quiet=True))
    at = _layers(what, layers, plan)

    from pnp_batch.inspection import page, sheets  # seconds of torch, once there is something to do
    from pnp_batch.inspection.subjects import subjects

    context = _worker(plan).context
    chosen = subjects(plan, context, inputs or ())
    if chosen.left_out:
        _say(
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
    plan.checkpoint.check_layers(*((layers, ()) if what == "features" else ((), layers)))
    return layers


@app.command()
@_verb
def prefetch(manifest: ManifestPath) -> int:
    """Fetch weights before going offline: the model's, and those that `quality:` and `evaluation:` measure with."""
    from pnp_batch.evaluation.backbones import of_evaluation
    from pnp_batch.runner import Silent, Worker

    loaded = _load(manifest)
    checkpoint = _checkpoint(loaded)
    worker = Worker(loaded, checkpoint, Silent())
    size = sum(path.stat().st_size for path in checkpoint.weight_files())
    print(f"{checkpoint.name} is here: {checkpoint.weights} ({size / 1e6:.0f} MB)")
    _ = worker.rule
    code = OK
    for kind, found in of_evaluation(loaded, worker.digests):
        if isinstance(found, str):
            _say(f"evaluation.{kind}: {found}")
            code = SOME_FAILED
        else:
            print(f"{found.name} is here: {found.path}")
    return code


@app.command()
@_verb
def init(path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("manifest.yaml")) -> int:
    """Write a starter manifest with every setting explained."""
    from importlib.resources import files

    from pnp_batch.store.files import write_atomic

    if os.path.lexists(path):
        raise typer.BadParameter(f"{path} exists; name another file", param_hint="PATH")
    _check_file(path, "PATH")
    with disk_errors_named(str(path)):
        write_atomic(path, files("pnp_batch").joinpath("starter.yaml").read_bytes())
    print(f"wrote {path}; edit it, then: pnp-batch run {path}")
    return OK


@store_app.command("ls")
@_verb
def store_ls(manifest: ManifestPath) -> int:
    """Artifacts and bytes per stage."""
    from collections import Counter

    from pnp_batch.store.files import size_of

    store = _store(manifest)
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for stage, path in store.all():
        count[stage] += 1
        size[stage] += size_of(path)
    print(store.root)
    for stage in sorted(count):
        print(f"{stage:<10} {count[stage]:>9} artifacts {size[stage] / 1e6:>10.1f} MB")
    return OK


@store_app.command("verify")
@_verb
def store_verify(manifest: ManifestPath) -> int:
    """Read every byte; what is corrupt is set aside and will be made again by the next run."""
    store = _store(manifest)
    logging.getLogger("pnp_batch").addHandler(logging.NullHandler())  # else logging says the same once more
    total = 0
    for stage, path in store.all():
        if store.check(stage, path):
            total += 1
        else:
            _say(store.corrupt[stage, path.name])
    print(
        f"{counted(total, 'artifact is', 'artifacts are')} intact, {counted(len(store.corrupt), 'was', 'were')} corrupt"
    )
    return SOME_FAILED if store.corrupt else OK


@store_app.command("gc")
@_verb
def store_gc(
    manifests: Annotated[list[Path], typer.Argument(metavar="MANIFEST...", help="All manifests that use the store.")],
    unused: Annotated[
        bool, typer.Option("--unused", help="Also remove artifacts that none of the manifests names.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> int:
    """Free space: half-built and corrupt artifacts, saved loops, and on request what no manifest names any more."""
    from pnp_batch.evaluation.kept import keys_about
    from pnp_batch.store.files import size_of
    from pnp_batch.survey import keys_in_use

    loaded = [_load(path) for path in manifests]
    if len({manifest.store for manifest in loaded}) > 1:
        raise typer.BadParameter("these manifests do not share one store", param_hint="MANIFEST...")
    used = {key for manifest in loaded for key in _keys(manifest, keys_in_use)} if unused else None
    store = _store(manifests[0])
    if used is not None:
        used |= {*keys_about(store, used), *store.about("bank", "trajectory", used)}
    garbage = list(store.garbage(used))
    size = sum(map(size_of, garbage))
    for path in garbage if not dry_run else ():
        store.remove(path)
    print(f"{'would free' if dry_run else 'freed'} {size / 1e6:.1f} MB in {counted(len(garbage), 'place')}")
    return OK


@shapes_app.command("render")
@_verb
def shapes_render(
    output: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the first scene; the next ones follow.")] = 0,
    size: Annotated[int, typer.Option(min=16, max=4096, help="Side of the pictures, in pixels.")] = 64,
    clips: Annotated[
        bool, typer.Option("--clips", help="Clips of a moving object as MP4 instead, motion known.")
    ] = False,
    frames: Annotated[int, typer.Option(min=1, help="Of a clip.")] = 16,
) -> int:
    """Render scenes as an image folder: pictures, exact masks, captions; the same seed gives the same bytes."""
    from rich.progress import track

    from pnp_batch.shapes.imagefolder import begun, is_whole, rendering, write_clips, write_scenes

    if clips and size % 2:
        raise typer.BadParameter(f"clips need an even size, not {size}", param_hint="--size")
    console, kind = _console(), "clips" if clips else "scenes"
    many = counted(count, kind.removesuffix("s"))
    about = f"{many} from seed {seed}, size {size}" + (f", {counted(frames, 'frame')}" if clips else "")
    is_ours = begun(output) == about
    _check_folder(output, begun=is_ours)
    if is_ours and is_whole(output):
        print(f"{many}, all there already: {output / 'metadata.jsonl'}")
        return OK
    names = write_clips(output, count, seed, size, frames) if clips else write_scenes(output, count, seed, size)
    with rendering(output, about):
        for _ in track(names, kind, count, console=console, disable=not console.is_terminal, transient=True):
            pass
    print(f"{many}: {output / 'metadata.jsonl'}")
    return OK


@shapes_app.command("train")
@_verb
def shapes_train(
    output: Annotated[Path, typer.Argument(help="The pipeline folder to write.", show_default=False)],
    start: Annotated[
        str | None, typer.Option("--from", metavar="MODEL", help="Go on from this model's weights.", show_default=False)
    ] = None,
    scenes: Annotated[int, typer.Option(min=64, help="Scenes that UNet and text encoder learn from.")] = 24_000,
    vae_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Default: 2600, or 600 of the decoder alone with --from.", show_default=False),
    ] = None,
    unet_steps: Annotated[
        int | None, typer.Option(min=0, help="Default: 8500, or 1100 with --from.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="Of the UNet. Default: 1e-3, or 4e-4 with --from.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, noise, wording and the first scene.")] = 0,
    devices: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: whichever is faster here.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Scenes in a step.")] = 64,
    every: Annotated[int, typer.Option(min=1, help="Steps between two grids of samples.")] = 250,
) -> int:
    """Train a small Stable Diffusion on scenes: VAE, then UNet and text encoder. Repeated, it goes on where it stopped."""
    from pnp_batch.shapes import training
    from pnp_batch.shapes.scenes import HELD_OUT

    _check_folder(output, begun=(output / "training").is_dir())
    others = {"seed": seed, "half": _half(dtype), "batch": batch_size, "every": every, "say": _say}
    run = training.planned(output, start, scenes, vae_steps, unet_steps, learning_rate, devices=devices, **others)
    if run.seeds.stop > HELD_OUT:
        raise typer.BadParameter(
            f"scenes {run.seeds.start} to {run.seeds.stop - 1} would be learnt from, and those from {HELD_OUT} on are held out",
            param_hint="--seed",
        )
    print(f"pipeline: {training.train(run)}\nsamples:  {run.work / 'samples'}")
    return OK


@shapes_app.command("judge")
@_verb
def shapes_judge(
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.", show_default=False)],
    steps: Annotated[int | None, typer.Option(min=1, help="Default: 2000.", show_default=False)] = None,
    devices: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: whichever is faster here.")] = "auto",
) -> int:
    """Train the benchmark's judge, which segments and names scenes, and say how often it is right."""
    from dataclasses import replace

    from pnp_batch.diffusion.model import pick_device
    from pnp_batch.shapes.judge import RECIPE, accuracy, save_judge, train_judge
    from pnp_batch.shapes.learning import Watch
    from pnp_batch.shapes.pages import judged

    _check_file(output, "OUTPUT")
    recipe = RECIPE if steps is None else replace(RECIPE, steps=steps)
    watch = Watch(say=_say)
    judge = train_judge(output.with_suffix(".training"), recipe, watch, _half(dtype), pick_device(devices))
    save_judge(judge, output)
    print(f"{output}\n{judged(accuracy(judge))}")
    return OK


@bench_app.command("shapes")
@_verb
def bench_shapes(
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 24,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the rows here.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of scenes, store, results, figure and page.")] = Path(
        "outputs/bench-shapes"
    ),
    model: Annotated[str, typer.Option(help="One that paints scenes.")] = "builtin:shapes",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")] = 50,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Thresholds, layers, inversion and negative prompts instead of methods.")
    ] = False,
    judge_file: Annotated[
        Path | None, typer.Option("--judge", metavar="FILE", help="One that `shapes judge` wrote.", show_default=False)
    ] = None,
) -> int:
    """PnP against the baselines on scenes whose truth is known: structure, text, and the trade-off between them."""
    from pnp_batch.monitor import view_for
    from pnp_batch.shapes import pages, plots
    from pnp_batch.shapes.ablations import run_ablations
    from pnp_batch.shapes.benchmark import METHODS, cases, margins, run
    from pnp_batch.shapes.judge import WEIGHTS, examined, load_judge
    from pnp_batch.store.files import write_atomic

    _check_folder(output, "--output", begun=True)
    if json_file is not None:
        _check_file(json_file, "--json")
    if Path(model).exists():
        model = str(Path(model).absolute())  # the manifests that name it lie elsewhere
    judge = examined(load_judge(judge_file or WEIGHTS))
    view, name = view_for(_console()), "ablations" if ablations else "benchmark"
    if ablations:
        found = run_ablations(output / "ablations", scenes, view, judge, model, steps)
        rows, figure = found.rows(), plots.ablations(found)
        page = pages.ablation_page(found, figure)
        tables = pages.ablation_tables(found)
    else:
        bench = run(output / "methods", cases(scenes), METHODS, view, judge, model=model, steps=steps)
        rows, figure, above = bench.rows(), plots.trade_off(bench), margins(bench)
        report = _write_report(_load(output / "methods/manifest.yaml"))
        page = pages.benchmark_page(bench, above, figure, os.path.relpath(report, output))
        tables = pages.benchmark_tables(bench, above)
    for each in tables:
        _console(stderr=False, width=None if sys.stdout.isatty() else 200).print(each, markup=False)
    write_atomic(output / f"{name}.png", figure)
    write_atomic(output / f"{name}.html", page)
    if json_file is not None:
        write_atomic(json_file, json.dumps(rows, indent=1))
    print(f"figure: {output / f'{name}.png'}\npage:   {output / f'{name}.html'}")
    return OK


def _check_folder(folder: Path, hint: str = "OUTPUT", *, begun: bool) -> None:
    """Nothing is written over what is there, unless this very command has begun it."""
    if not (found := _existing_parent(folder)).is_dir():
        raise typer.BadParameter(f"{folder} cannot be a folder: {found} is a file", param_hint=hint)
    if not begun and folder.exists() and any(folder.iterdir()):
        raise typer.BadParameter(f"{folder} is there and not empty; name another folder", param_hint=hint)


def _check_file(path: Path, hint: str) -> None:
    """Says before all the work that a file cannot be written there."""
    if os.path.isdir(path) or not _existing_parent(path.absolute().parent).is_dir():  # noqa: PTH112 - as in _existing_parent
        raise typer.BadParameter(f"{path} cannot be a file: name one in a folder", param_hint=hint)


def _half(dtype: str) -> bool | None:
    """Whether to train in bfloat16; None for whichever is faster."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise typer.BadParameter(f"'{dtype}' is not one of auto, float32, bfloat16", param_hint="--dtype")
    return None if dtype == "auto" else dtype == "bfloat16"


def _check_writable(file: Path, option: str) -> None:
    """Says before the work, not after it, that a file cannot be written."""
    folder = _existing_parent(file.absolute().parent)
    if file.is_dir():
        raise typer.BadParameter(f"{file} is a folder; name a file", param_hint=option)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"{file} cannot be written: {folder} is no folder to write to", param_hint=option)


def _keys(manifest: Manifest, keys_in_use: Callable[..., Any]) -> Any:
    plan = _plan(manifest, quiet=True)
    return keys_in_use(plan, _worker(plan))


def _load(path: Path, engine: str | None = None, devices: str | None = None) -> Manifest:
    from pnp_batch.manifest import load_manifest

    return load_manifest(path).with_run({k: v for k, v in (("engine", engine), ("devices", devices)) if v is not None})


def _checkpoint(manifest: Manifest) -> Checkpoint:
    from pnp_batch.checkpoint import resolve

    try:
        return resolve(
            manifest.model, manifest.base, revision=manifest.revision, variant=manifest.variant, config=manifest.config
        )
    except ModelError as error:
        raise ManifestError([manifest.problem(("model",), str(error))]) from error


def _plan(manifest: Manifest, limit: int | None = None, retry_failed: bool = False, quiet: bool = False) -> Plan:
    """Checks everything and gives the plan; prints warnings unless `quiet`."""
    from pnp_batch.failures import FailureList
    from pnp_batch.plan import Plan

    checkpoint, _ = _checked(manifest, quiet)
    only = frozenset(FailureList(manifest).rows) if retry_failed else None
    plan = Plan(manifest, checkpoint, limit, only)
    if only and (strangers := plan.strangers()):
        listed = counted(len(only), "listed failure")
        what = f"{strangers} of {listed}: no result of this manifest as it is now, and left alone"
        _say(f"warning: {what}; a run without --retry-failed makes all that is missing")
    return plan


def _checked(manifest: Manifest, quiet: bool = False) -> tuple[Checkpoint, Checked]:
    """The model, and what the manifest names; whatever is wrong with either is said at once."""
    from pnp_batch.plan import check, problems_without_model

    try:
        checkpoint = _checkpoint(manifest)
    except (ManifestError, EnvironmentFailure) as error:
        others = problems_without_model(manifest)
        if not others:
            raise
        cannot_be_had = manifest.problem(("model",), str(error))
        of_model = error.problems if isinstance(error, ManifestError) else (cannot_be_had,)
        raise ManifestError([*of_model, *others]) from error
    checked = check(manifest, checkpoint)
    for message in () if quiet else checked.warnings:
        _say(f"warning: {message}")
    return checkpoint, checked


def _worker(plan: Plan) -> Any:
    from pnp_batch.runner import Silent, Worker

    return Worker(plan.manifest, plan.checkpoint, Silent())


def _store(manifest: Path) -> Any:
    from pnp_batch.store import ArtifactStore

    return ArtifactStore(_load(manifest).store)


def _show_estimate(plan: Plan) -> None:
    from pnp_batch.monitor import clock
    from pnp_batch.runner import bank_forecast, seconds_per_row_cell
    from pnp_batch.survey import survey

    worker = _worker(plan)
    counts = survey(plan, worker)
    left = counts.left
    there = counted(counts.translated, "is", "are")
    print(f"{_results_of(counts.translations, counts.sources)}; {there} there already")
    print(
        f"to compute: {counted(left.translations, 'result')}, {counted(left.trajectories, 'trajectory', 'trajectories')}"
    )
    print(
        f"UNet rows:  {left.rows} ({left.inversion_rows} inversion, {left.source_rows} source, {left.target_rows} target)"
    )
    free = shutil.disk_usage(_existing_parent(plan.manifest.store)).free
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
        _say("warning: there may not be enough space on the disk")


def _results_of(results: int, sources: int) -> str:
    return f"{counted(results, 'result')} of {counted(sources, 'guidance image')}"


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


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))  # noqa: PTH110 - a name may be too long


def _write_report(manifest: Manifest, plan: Plan | None = None, there: int = 0) -> Path:
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
            wanted = _wanted(plan or _plan(manifest, quiet=True))
        except (ManifestError, EnvironmentFailure) as error:  # the page is of use without pictures or model, too
            _say(f"results that are no longer in the manifest are not marked, since they cannot be told:\n{error}")
    # Absolute: the page's commands are pasted wherever a person happens to be.
    name, store = str(manifest.path.absolute()), ArtifactStore(manifest.store)
    path = write_report(name, outputs, store, failures, wanted.lacks)
    if count := wanted.leftovers(outputs):
        _say(_leftovers(count, manifest.path))
    return path


def _wanted(plan: Plan) -> Wanted:
    from pnp_batch.leftovers import wanted

    return wanted(plan, _worker(plan).context)


def _leftovers(count: int, manifest: Path) -> str:
    what = counted(count, "result in the folder is", "results in the folder are")
    return f"{what} no longer in the manifest; to list: pnp-batch prune {shlex.quote(str(manifest))} --dry-run"


def _watched(items: Iterable[Any], plan: Plan) -> list[Any]:
    """All of some results, with a progress bar on a terminal."""
    from rich.progress import track

    console = _console()
    total = plan.estimate().translations if console.is_terminal else None
    return list(track(items, "results", total, console=console, disable=not console.is_terminal, transient=True))


def _console(stderr: bool = True, width: int | None = None) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, width=width)


def _command_line() -> str:
    return shlex.join(["pnp-batch", *sys.argv[1:]])


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
