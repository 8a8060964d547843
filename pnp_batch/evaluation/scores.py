"""`pnp-batch evaluate`: every result of a plan against its source and its prompt, as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pnp_batch.errors import ItemError, ManifestError
from pnp_batch.evaluation.columns import COLUMNS, MASKED
from pnp_batch.evaluation.masks import Masks
from pnp_batch.evaluation.measures import BATCH, Finding, Measures, is_nan, is_number
from pnp_batch.evaluation.values import Unavailable, Value, Values
from pnp_batch.manifest import Manifest
from pnp_batch.plan import Plan
from pnp_batch.stages.work import Context, Item


@dataclass(frozen=True)
class Score:
    """One result's numbers.

    Attributes:
        file_name: Of its picture, relative to the output folder.
        source: The guidance image, as in the manifest.
        prompt: The target prompt.
        method: Of translation; with a quality gate that of the attempt that stands.
        values: By column that was asked for: the number, or in words why there is none.
        key: Of the result.
        hardware: What it was computed on.
        seconds: What it took, its share of its batch.
    """

    file_name: str
    source: str
    prompt: str
    method: str
    values: Values
    key: str
    hardware: str
    seconds: float

    def row(self) -> dict[str, Any]:
        """A plain JSON row: every column is there, null where there is no number; `nan` lists those that came out NaN."""
        plain = {name: value if is_number(value) else None for name, value in self.values.items()}
        always = dict.fromkeys(column for columns in COLUMNS.values() for column in columns)
        about = {"file_name": self.file_name, "source": self.source, "prompt": self.prompt, "method": self.method}
        rest = {"key": self.key, "hardware": self.hardware, "seconds": self.seconds}
        return about | always | plain | {"nan": [n for n, v in self.values.items() if is_nan(v)]} | rest


def scores(plan: Plan, context: Context) -> Iterator[Score]:
    """Scores of every result of a plan that is there, in plan order; with a quality gate of those that it settled on.

    Args:
        plan: The plan of the run.
        context: Of the worker that made it: the keys depend on its dtype.
    """
    masks = _masks(plan.manifest)
    scorer = _Scorer(plan.manifest, context, with_masks=masks is not None)
    chunk: list[Finding] = []
    for finding in _findings(plan, context, masks):
        chunk.append(finding)
        if len(chunk) == BATCH:
            yield from scorer.score(chunk)
            chunk = []
    yield from scorer.score(chunk)


def _findings(plan: Plan, context: Context, masks: Masks | None) -> Iterator[Finding]:
    for job in plan.jobs():
        if job.window is not None:
            continue  # videos have measures of their own: benchmarks/video.py
        item = Item(job, context)
        try:
            artifacts = [(unit, unit.result()) for unit in item.units]
        except ItemError:
            continue  # the picture is gone or broken: `status` and the failure list name it
        yield from (Finding(unit, artifact, masks) for unit, artifact in artifacts if artifact)


def _masks(manifest: Manifest) -> Masks | None:
    if manifest.evaluation.masks is None:
        return None
    try:
        return Masks(manifest.base / Path(manifest.evaluation.masks).expanduser())
    except Unavailable as error:
        raise ManifestError([manifest.problem(("evaluation", "masks"), str(error))]) from error


class _Scorer:
    """Rows of the columns that a manifest asks for."""

    def __init__(self, manifest: Manifest, context: Context, with_masks: bool) -> None:
        names = manifest.evaluation.metrics
        # The columns within and outside a mask, with the one over the whole picture that they belong to.
        self.masked = {column: name for name in names for column in MASKED.get(name, ()) if with_masks}
        self.wanted = [*(column for name in names for column in COLUMNS[name]), *self.masked]
        self.context = context
        self.measures = Measures(manifest, context, self.wanted)

    def score(self, findings: Sequence[Finding]) -> list[Score]:
        """Scores some results."""
        rows = zip(findings, self.measures.of(findings), strict=True)
        return [self._score(finding, values) for finding, values in rows]

    def _score(self, finding: Finding, values: dict[str, Value]) -> Score:
        meta, unit = finding.artifact.meta, finding.unit
        for column, whole in self.masked.items():  # what costs the whole picture its number costs its parts theirs
            why = finding.mask_or_reason if isinstance(finding.mask_or_reason, str) else values[whole]
            values.setdefault(column, why)
        return Score(
            file_name=self.context.outputs.name(
                unit.item.job.source.stem, unit.translation.prompt, finding.artifact.key
            ),
            source=unit.item.job.source.name,
            prompt=unit.translation.prompt,
            method=meta["settings"]["method"],
            values={column: values[column] for column in self.wanted},
            key=finding.artifact.key,
            hardware=str(meta.get("hardware", meta["device"])),
            seconds=float(meta["seconds"]),
        )
