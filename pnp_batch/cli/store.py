"""`store ls`, `store verify`, `store gc`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pnp_batch.cli.plans import load, planned_quietly, worker_of
from pnp_batch.cli.verb import OK, SOME_FAILED, ManifestPath, say, verb
from pnp_batch.hub import nothing_downloaded
from pnp_batch.names import counted

if TYPE_CHECKING:
    from pnp_batch.manifest import Manifest


@verb
def ls(manifest: ManifestPath) -> int:
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


@verb
def verify(manifest: ManifestPath) -> int:
    """Read every byte; what is corrupt is set aside and will be made again by the next run."""
    store = _store(manifest)
    logging.getLogger("pnp_batch").addHandler(logging.NullHandler())  # else logging says the same once more
    total = 0
    for stage, path in store.all():
        if store.check(stage, path):
            total += 1
        else:
            say(store.corrupt[stage, path.name])
    print(
        f"{counted(total, 'artifact is', 'artifacts are')} intact, {counted(len(store.corrupt), 'was', 'were')} corrupt"
    )
    return SOME_FAILED if store.corrupt else OK


@verb
@nothing_downloaded()
def gc(
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

    loaded = [load(path) for path in manifests]
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


def _keys(manifest: Manifest, keys_in_use: Callable[..., Any]) -> Any:
    plan = planned_quietly(manifest)
    return keys_in_use(plan, worker_of(plan))


def _store(manifest: Path) -> Any:
    from pnp_batch.store import ArtifactStore

    return ArtifactStore(load(manifest).store)
