"""Stage `assemble`: results out of the store into the output folder, as PNG files and rows of `metadata.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from pnp_batch import interrupts
from pnp_batch.media.images import encode_png
from pnp_batch.stages import threads
from pnp_batch.stages.batches import Group, attempt
from pnp_batch.stages.work import Context, Item, Unit
from pnp_batch.store import Artifact, canonical_json
from pnp_batch.store.artifacts import CorruptArtifact

STAGE = "assemble"


def run(context: Context, items: Sequence[Item]) -> None:
    """Writes every result of the items that is not in the output folder yet."""
    units = (unit for item in items for unit in item.units if unit.error is None)
    exports = [_Export(unit, artifact) for unit in units if (artifact := unit.result())]
    for batch in threads.in_hand(exports, context.device):
        with interrupts.held_back():  # a file and its row belong together
            if not all(context.outputs.has_file(export.name) for export in batch):  # with those that a kill left marked
                attempt([batch], partial(_write, context), _give_up, context.ledger, STAGE)
            for export in batch:
                _add_row(context, export)


@dataclass(frozen=True)
class _Export:
    """A result on its way to the output folder."""

    unit: Unit
    artifact: Artifact

    @property
    def key(self) -> str:
        """What it is called in the ledger: guidance images with the same pixels share a result, but not its file."""
        return self.unit.id

    @cached_property
    def name(self) -> str:
        """Of its file."""
        stem = self.unit.item.job.source.stem
        return self.unit.item.context.outputs.name(stem, self.unit.translation.prompt, self.artifact.key)


def _write(context: Context, group: Group[_Export]) -> None:
    (batch,) = group
    errors = threads.each(partial(_write_one, context), batch, context.device)
    for export, error in zip(batch, errors, strict=True):
        if error is not None:
            _give_up(export, error)


def _write_one(context: Context, export: _Export) -> CorruptArtifact | None:
    """Gives the error of a corrupt artifact, which is no reason to give up the others that are in hand."""
    if context.outputs.has_file(export.name):
        return None
    try:
        pixels = context.store.load(export.artifact, "result")["image"]
    except CorruptArtifact as error:
        return error
    text = canonical_json(_settings(export.artifact))
    context.outputs.write_file(export.name, encode_png(pixels, {"pnp-batch": text}))
    return None


def _give_up(export: _Export, error: BaseException) -> None:
    export.unit.fail(STAGE, error)


def _add_row(context: Context, export: _Export) -> None:
    unit, artifact = export.unit, export.artifact
    if unit.error is not None:
        return
    quality = unit.verdict.row() if unit.verdict else {}
    about = {"file_name": export.name, "source": unit.item.job.source.name}
    context.outputs.add_row({**about, **_settings(artifact), **_figures(artifact), **quality})
    context.events.made(STAGE, 1)


def _settings(artifact: Artifact) -> dict[str, Any]:
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
