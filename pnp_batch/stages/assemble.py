"""Stage `assemble`: results out of the store into the output folder, as PNG files and rows of `metadata.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pnp_batch.ledger import Quarantined, unit_name
from pnp_batch.media.images import encode_png
from pnp_batch.stages.work import IO_THREADS, Context, Item, Unit
from pnp_batch.store import Artifact, canonical_json
from pnp_batch.store.artifacts import CorruptArtifact

STAGE = "assemble"

AHEAD = 4 * IO_THREADS  # results whose files are held at once


def run(context: Context, items: Sequence[Item]) -> None:
    """Writes every result of the items that is not in the output folder yet."""
    results = [result for item in items for unit in item.units if (result := _found(unit))]
    with ThreadPoolExecutor(IO_THREADS, "png") as pool:
        for some in (results[i : i + AHEAD] for i in range(0, len(results), AHEAD)):
            files = {
                unit: pool.submit(_encoded, context, unit, artifact)
                for unit, artifact in some
                if not context.outputs.has_file(_name(context, unit, artifact))
            }
            for unit, artifact in some:
                try:
                    _export(context, unit, artifact, files.get(unit))
                except (CorruptArtifact, Quarantined) as error:
                    unit.fail(STAGE, error)


def _found(unit: Unit) -> tuple[Unit, Artifact] | None:
    """A unit with the result that stands, if there is one."""
    try:
        artifact = unit.result() if unit.error is None else None
    except CorruptArtifact as error:
        unit.fail(STAGE, error)
        return None
    return (unit, artifact) if artifact else None


def _name(context: Context, unit: Unit, artifact: Artifact) -> str:
    return context.outputs.name(unit.item.job.source.stem, unit.translation.prompt, artifact.key)


def _encoded(context: Context, unit: Unit, artifact: Artifact) -> bytes:
    """The PNG file of a result; runs in a thread, since compression takes as long as many UNet rows of a GPU."""
    pixels = context.store.load(artifact, "result")["image"]
    return encode_png(pixels, {"pnp-batch": canonical_json(_settings(unit, artifact))})


def _export(context: Context, unit: Unit, artifact: Artifact, file: Future[bytes] | None) -> None:
    name = _name(context, unit, artifact)
    if file is not None and not context.outputs.has_file(name):  # a twin may have written it just now
        marked = unit_name(STAGE, artifact.key)
        context.ledger.refuse(marked)
        with context.ledger.attempt([marked]):
            context.outputs.write_file(name, file.result())
    quality = unit.verdict.row() if unit.verdict else {}
    about = {"file_name": name, "source": unit.item.job.source.name}
    context.outputs.add_row({**about, **_settings(unit, artifact), **_figures(artifact), **quality})
    context.events.made(STAGE, 1)


def _settings(unit: Unit, artifact: Artifact) -> dict[str, Any]:
    """What the picture was made with: the same for the PNG's text chunk and the metadata row."""
    meta = artifact.meta
    names = ("model", "fingerprint", "dtype", "bank_compression", "versions")
    return {
        "prompt": meta["prompt"],
        **meta["settings"],
        "key": artifact.key,
        **{n: meta[n] for n in names if n in meta},
    }


def _figures(artifact: Artifact) -> dict[str, Any]:
    return {**artifact.meta["errors"], "seconds": artifact.meta["seconds"]}
