"""The command line: all its verbs in one place, in the order in which `--help` lists them.

Nothing heavy is imported at the top of any module here: `pnp-batch --help` must answer at once. Each verb imports what it needs.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from pnp_batch import __version__
from pnp_batch.cli import results, run, shapes, status, store, streams
from pnp_batch.cli.verb import OK

app = typer.Typer(
    name="pnp-batch",
    help="Translate folders of images by text with Plug-and-Play diffusion features. "
    "Run it again and it goes on where it stopped.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(run.run)
app.command()(run.validate)
app.command()(status.status)
app.command()(results.report)
app.command()(results.prune)
app.command()(results.evaluate)
app.command("import")(results.import_benchmark)
app.command()(results.inspect)
app.command()(run.prefetch)
app.command()(run.init)

_of_store = typer.Typer(
    help="What the artifact store holds, whether it is intact, and how to free space.", no_args_is_help=True
)
_of_store.command("ls")(store.ls)
_of_store.command("verify")(store.verify)
_of_store.command("gc")(store.gc)
app.add_typer(_of_store, name="store")

_of_shapes = typer.Typer(help="Procedural scenes, and training the small model that knows them.", no_args_is_help=True)
_of_shapes.command("render")(shapes.render)
_of_shapes.command("train")(shapes.train)
_of_shapes.command("judge")(shapes.judge)
app.add_typer(_of_shapes, name="shapes")

_of_bench = typer.Typer(help="Benchmarks whose truth is known.", no_args_is_help=True)
_of_bench.command("shapes")(shapes.bench)
app.add_typer(_of_bench, name="bench")


def _say_version(is_asked: bool) -> None:
    if is_asked:
        print(f"pnp-batch {__version__}")
        raise typer.Exit(OK)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """Options of no verb; the help is the app's."""


def main() -> NoReturn:
    """Entry point of `pnp-batch`."""
    if sys.stdout is not None:  # as it is after `>&-`
        sys.stdout = streams.heedless(sys.stdout)
    if sys.stderr is not None:
        sys.stderr = streams.heedless(sys.stderr)
    app()
    sys.exit(OK)
