"""Stage `assemble`: results out of the store into the output folder, as PNG files and rows of `metadata.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pnp_batch.ledger import Quarantined, unit_name
from pnp_batch.media.images import encode_png
from pnp_batch.stages.work import Context, Item, Unit
from pnp_batch.store import Artifact, canonical_json
from pnp_batch.store.artifacts import CorruptArtifact

STAGE = "assemble"


def run(context: Context, items: Sequence[Item]) -> None:
    """Writes every result of the items that is not in the output folder yet."""
    for unit in (unit for item in items for unit in item.units):
        try:
            if unit.error is None and (artifact := unit.result()):
                _export(context, unit, artifact)
        except (CorruptArtifact, Quarantined) as error:
            unit.fail(STAGE, error)


def _export(context: Context, unit: Unit, artifact: Artifact) -> None:
    source = unit.item.job.source
    name = context.outputs.name(source.stem, unit.translation.prompt, artifact.key)
    if not context.outputs.has_file(name):
        marked = unit_name(STAGE, artifact.key)
        context.ledger.refuse(marked)
        with context.ledger.attempt([marked]):
            pixels = context.store.load(artifact, "result")["image"]
            data = encode_png(pixels, {"pnp-batch": canonical_json(_settings(unit, artifact))})
            context.outputs.write_file(name, data)
    quality = unit.verdict.row() if unit.verdict else {}
    context.outputs.add_row(
        {"file_name": name, "source": source.name, **_settings(unit, artifact), **_figures(artifact), **quality}
    )
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
