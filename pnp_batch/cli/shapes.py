"""`shapes render`, `shapes train`, `shapes judge`, `bench shapes`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from pnp_batch.cli.pages import rewrite_report
from pnp_batch.cli.paths import check_file, check_folder
from pnp_batch.cli.plans import load
from pnp_batch.cli.verb import OK, make_console, say, verb
from pnp_batch.names import counted

if TYPE_CHECKING:
    from rich.table import Table

    from pnp_batch.shapes.judge import Examined


@verb
def render(
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
    console, kind = make_console(), "clips" if clips else "scenes"
    many = counted(count, kind.removesuffix("s"))
    about = f"{many} from seed {seed}, size {size}" + (f", {counted(frames, 'frame')}" if clips else "")
    is_ours = begun(output) == about
    check_folder(output, begun=is_ours)
    if is_ours and is_whole(output):
        print(f"{many}, all there already: {output / 'metadata.jsonl'}")
        return OK
    names = write_clips(output, count, seed, size, frames) if clips else write_scenes(output, count, seed, size)
    with rendering(output, about):
        for _ in track(names, kind, count, console=console, disable=not console.is_terminal, transient=True):
            pass
    print(f"{many}: {output / 'metadata.jsonl'}")
    return OK


@verb
def train(
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

    check_folder(output, begun=(output / "training").is_dir())
    others = {"seed": seed, "half": _half(dtype), "batch": batch_size, "every": every, "say": say}
    run = training.planned(output, start, scenes, vae_steps, unet_steps, learning_rate, devices=devices, **others)
    if run.seeds.stop > HELD_OUT:
        raise typer.BadParameter(
            f"scenes {run.seeds.start} to {run.seeds.stop - 1} would be learnt from, and those from {HELD_OUT} on are held out",
            param_hint="--seed",
        )
    print(f"pipeline: {training.train(run)}\nsamples:  {run.work / 'samples'}")
    return OK


@verb
def judge(
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

    check_file(output, "OUTPUT")
    recipe = RECIPE if steps is None else replace(RECIPE, steps=steps)
    watch = Watch(say=say)
    trained = train_judge(output.with_suffix(".training"), recipe, watch, _half(dtype), pick_device(devices))
    save_judge(trained, output)
    print(f"{output}\n{judged(accuracy(trained))}")
    return OK


@verb
def bench(
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
    from pnp_batch.shapes.judge import WEIGHTS, examined, load_judge
    from pnp_batch.shapes.models import scene_model
    from pnp_batch.store.files import write_atomic

    check_folder(output, "--output", begun=True)
    if json_file is not None:
        check_file(json_file, "--json")
    scene_model(model, Path.cwd())  # says before all the work that it cannot be had
    if Path(model).exists():
        model = str(Path(model).absolute())  # the manifests that name it lie elsewhere
    name, measured = ("ablations", _ablated) if ablations else ("benchmark", _compared)
    found = measured(output, scenes, examined(load_judge(judge_file or WEIGHTS)), model, steps)
    for table in found.tables:
        make_console(stderr=False, width=None if sys.stdout.isatty() else 200).print(table, markup=False)
    write_atomic(output / f"{name}.png", found.figure)
    write_atomic(output / f"{name}.html", found.page)
    if json_file is not None:
        write_atomic(json_file, json.dumps(found.rows, indent=1))
    print(f"figure: {output / f'{name}.png'}\npage:   {output / f'{name}.html'}")
    return OK


class _Found(NamedTuple):
    """What a benchmark shows: rows for programs, a PNG, a page, and tables for the terminal."""

    rows: list[dict[str, Any]]
    figure: bytes
    page: str
    tables: list[Table | str]


def _compared(output: Path, scenes: int, judge: Examined, model: str, steps: int) -> _Found:
    """PnP against the baselines."""
    from pnp_batch.monitor import view_for
    from pnp_batch.shapes import pages, plots
    from pnp_batch.shapes.benchmark import METHODS, cases, margins, run

    made = run(output / "methods", cases(scenes), METHODS, view_for(make_console()), judge, model=model, steps=steps)
    figure, above = plots.trade_off(made), margins(made)
    report = os.path.relpath(rewrite_report(load(output / "methods/manifest.yaml")), output)
    page, tables = pages.benchmark_page(made, above, figure, report), pages.benchmark_tables(made, above)
    return _Found(made.rows(), figure, page, tables)


def _ablated(output: Path, scenes: int, judge: Examined, model: str, steps: int) -> _Found:
    """PnP at other thresholds, layers, inversions and negative prompts."""
    from pnp_batch.monitor import view_for
    from pnp_batch.shapes import pages, plots
    from pnp_batch.shapes.ablations import run_ablations

    made = run_ablations(output / "ablations", scenes, view_for(make_console()), judge, model, steps)
    figure = plots.ablations(made)
    return _Found(made.rows(), figure, pages.ablation_page(made, figure), pages.ablation_tables(made))


def _half(dtype: str) -> bool | None:
    """Whether to train in bfloat16; None for whichever is faster."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise typer.BadParameter(f"'{dtype}' is not one of auto, float32, bfloat16", param_hint="--dtype")
    return None if dtype == "auto" else dtype == "bfloat16"
