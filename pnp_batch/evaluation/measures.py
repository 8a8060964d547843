"""Metrics of results, each computed once: kept in the store by the result, the metric, its backbone's bytes and the mask.

Backbones work in batches, and a batch's composition changes rounding; so, as for results, every number notes its batch, and
a lost one is computed again with the members it was computed with (`stages/batches.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from pnp_batch.diffusion.model import pick_device
from pnp_batch.errors import ItemError
from pnp_batch.evaluation.alignment import PixelAlignment
from pnp_batch.evaluation.backbones import Backbone, locate
from pnp_batch.evaluation.closed_forms import ClosedForms, ReconstructionPsnr
from pnp_batch.evaluation.kept import STAGE
from pnp_batch.evaluation.lpips import Lpips, ReconstructionLpips, load_lpips
from pnp_batch.evaluation.masks import Masks
from pnp_batch.evaluation.structure import KeyReader, StructureDistance
from pnp_batch.evaluation.text import TextImageModel, TextSimilarity
from pnp_batch.evaluation.values import (
    INVERSION_GONE,
    NOT_INVERTED,
    NOT_SAMPLED_BACK,
    Mask,
    Metric,
    Pair,
    Unavailable,
    Value,
    Values,
)
from pnp_batch.manifest import Manifest
from pnp_batch.stages.batches import incomplete
from pnp_batch.stages.work import Context, Item, Unit
from pnp_batch.store import Artifact, key_of
from pnp_batch.store.artifacts import CorruptArtifact
from pnp_batch.store.keys import sha256

BATCH = 16  # results measured at once

NO_MASK = "evaluation.masks holds none for the source"
NO_LPIPS = "no weights are named: write `evaluation: {lpips: FILE}`; docs/evaluation.md says how to make the file"


def is_nan(value: Value) -> bool:
    """Whether a computation gave no finite number."""
    return isinstance(value, float) and not math.isfinite(value)


def is_number(value: Value) -> bool:
    """Whether it can be averaged."""
    return isinstance(value, float) and math.isfinite(value)


@dataclass(eq=False)
class Finding:
    """A result that is there.

    Attributes:
        unit: The result.
        artifact: Where its picture is.
        masks: Where edit masks lie; None where they do not matter.
        error: Why something of it could not be measured now, though another time it may.
    """

    unit: Unit
    artifact: Artifact
    masks: Masks | None
    error: BaseException | None = None

    @property
    def mask(self) -> Mask | None:
        """The edit mask of its source, if there is one."""
        return None if isinstance(self.mask_or_reason, str) else self.mask_or_reason

    @cached_property
    def mask_or_reason(self) -> Mask | str:
        """The edit mask of its source, or in words why there is none."""
        try:
            mask = self.masks.of(self.unit.item.job.source, self.size) if self.masks else None
        except Unavailable as error:
            return str(error)
        return NO_MASK if mask is None else mask

    @property
    def size(self) -> tuple[int, int]:
        """Its own width and height, which a retry of the quality gate may have changed."""
        settings = self.artifact.meta["settings"]
        return settings["width"], settings["height"]

    @cached_property
    def pair(self) -> Pair:
        """Its pictures, read from the store.

        Raises:
            CorruptArtifact: They are gone; the next run makes them again.
            ItemError: The guidance image is gone.
        """
        item = self.unit.item
        store = item.context.store
        source_key = str(self.artifact.meta.get("trajectory", item.key))
        trajectory = store.find("invert", source_key)
        preview = store.load(trajectory, "preview") if trajectory else None
        missing = _why_not_reconstructed(trajectory)
        return Pair(
            source=preview["source"] if preview else Item(replace(item.job, size=self.size), item.context).pixels,
            result=store.load(self.artifact, "result")["image"],
            prompt=self.unit.translation.prompt,
            source_key=source_key,
            mask=self.mask,
            reconstruction=preview["reconstruction"] if preview and not missing else missing,
        )

    def key(self, metric: Metric) -> str:
        """Where the metric's numbers of it are kept."""
        mask = None if self.mask is None or not metric.uses_mask else sha256(self.mask.tobytes())
        content = {"stage": STAGE, "metric": metric.name, "version": metric.version, "result": self.artifact.key}
        return key_of(content | {"mask": mask} | dict(metric.identity))


def _why_not_reconstructed(trajectory: Artifact | None) -> str:
    """Empty where it is."""
    if trajectory is None:
        return INVERSION_GONE
    if trajectory.meta["errors"].get("reconstruction_psnr") is not None:
        return ""
    return NOT_SAMPLED_BACK if "inverted_by" in trajectory.meta["errors"] else NOT_INVERTED


@dataclass(frozen=True, eq=False)
class Measurement:
    """One metric of one result, under its content key."""

    key: str
    finding: Finding


class Measures:
    """The metrics that fill some columns, each made ready once.

    Attributes:
        metrics: Those that can be computed.
        unavailable: Why columns cannot be filled at all, by column.

    Args:
        manifest: Says where the backbones lie.
        context: Of the worker.
        columns: What is wanted.
    """

    def __init__(self, manifest: Manifest, context: Context, columns: Iterable[str]) -> None:
        self.spec, self.context, self._base = manifest.evaluation, context, manifest.base
        self.wanted = frozenset(columns)
        self.unavailable: dict[str, str] = {}
        self.device = pick_device(manifest.run.device)
        self.metrics: list[Metric] = [
            metric
            for names, make in self._known().items()
            if self.wanted.intersection(names) and (metric := self._made(names, make)) is not None
        ]

    def _known(self) -> dict[tuple[str, ...], Callable[[], Metric]]:
        """How to make each metric, by the columns it fills."""
        reader = cache(lambda: KeyReader(self._located("dino"), self.device))
        clip = cache(lambda: TextImageModel(self._located("clip"), self.device))
        lpips = cache(lambda: load_lpips(self._located("lpips"), self.device))
        return {
            ClosedForms.columns: ClosedForms,
            PixelAlignment.columns: PixelAlignment,
            ReconstructionPsnr.columns: ReconstructionPsnr,
            Lpips.columns: lambda: Lpips(self._located("lpips"), lpips, self.device),
            ReconstructionLpips.columns: lambda: ReconstructionLpips(self._located("lpips"), lpips, self.device),
            ("structure_distance",): lambda: StructureDistance(self._located("dino"), reader, "structure_distance"),
            ("structure_distance_pie",): lambda: StructureDistance(
                self._located("dino"), reader, "structure_distance_pie"
            ),
            TextSimilarity.columns: lambda: TextSimilarity(self._located("clip"), clip),
        }

    def _located(self, kind: str) -> Backbone:
        name = getattr(self.spec, kind)
        if name is None:
            raise Unavailable(NO_LPIPS)
        return locate(kind, name, self._base, self.context.digests)

    def _made(self, columns: Iterable[str], make: Callable[[], Metric]) -> Metric | None:
        try:
            return make()
        except Unavailable as error:
            self.unavailable |= dict.fromkeys(columns, str(error))
            return None

    def of(self, findings: Sequence[Finding]) -> list[dict[str, Value]]:
        """The columns of some results, at most `BATCH` for the memory's sake; those that are unavailable say why."""
        values: list[dict[str, Value]] = [{} for _ in findings]
        for metric in tuple(self.metrics):  # one whose weights turn out unusable leaves the list
            for own, found in zip(values, self._values(metric, findings), strict=True):
                own |= found
        return [{**own, **self.unavailable} for own in values]

    def _values(self, metric: Metric, findings: Sequence[Finding]) -> list[Values]:
        """One metric of some results: read where it was computed before."""
        wanted = [Measurement(finding.key(metric), finding) for finding in findings]
        kept = {each.key: self.context.store.find(STAGE, each.key) for each in wanted}
        values: dict[str, Values] = {
            key: _unpacked(artifact.meta["values"]) for key, artifact in kept.items() if artifact
        }
        for batch in incomplete([wanted], lambda each: kept[each.key]):
            values = self._computed(metric, batch) | values
        return [values[each.key] for each in wanted]

    def _computed(self, metric: Metric, batch: Sequence[Measurement]) -> dict[str, Values]:
        findings = {each.key: each.finding for each in batch}
        values: dict[str, Values] = {}
        pairs: dict[str, Pair] = {}
        for key, finding in findings.items():
            try:
                pairs[key] = finding.pair
            except (CorruptArtifact, ItemError) as error:
                finding.error = error
                values[key] = dict.fromkeys(metric.columns, f"a picture cannot be read, run again: {error}")
        try:
            computed, failed = _attempt(metric, pairs)
        except Unavailable as error:  # the weights are there, but not what they should be
            self.metrics.remove(metric)
            self.unavailable |= dict.fromkeys(metric.columns, str(error))
            return values | dict.fromkeys(pairs, self.unavailable)
        for key, failure in failed.items():
            findings[key].error = failure
            values[key] = dict.fromkeys(metric.columns, f"failed: {failure}")
        batch_meta = {"batch": list(findings), "failed": [key for key in findings if key not in computed]}
        for key, row in computed.items():
            if INVERSION_GONE in row.values():
                continue  # it may be made again
            meta = {"metric": metric.name, "result": findings[key].artifact.key, "values": _packed(row)}
            self.context.store.publish(STAGE, key, {}, meta | batch_meta)
        return values | computed


def _attempt(metric: Metric, pairs: Mapping[str, Pair]) -> tuple[dict[str, Values], dict[str, BaseException]]:
    """What could be computed, and why the rest could not; a batch that fails (mostly for memory) is taken apart."""
    if not pairs:
        return {}, {}
    try:
        return dict(zip(pairs, metric(list(pairs.values())), strict=True)), {}
    except RuntimeError as error:
        if len(pairs) == 1:
            return {}, dict.fromkeys(pairs, error)
    computed: dict[str, Values] = {}
    failed: dict[str, BaseException] = {}
    for key, pair in pairs.items():
        done, lost = _attempt(metric, {key: pair})
        computed, failed = computed | done, failed | lost
    return computed, failed


def _packed(values: Values) -> dict[str, Value | None]:
    """JSON has no NaN: None stands for it."""
    return {name: None if is_nan(value) else value for name, value in values.items()}


def _unpacked(values: Mapping[str, Value | None]) -> dict[str, Value]:
    return {name: math.nan if value is None else value for name, value in values.items()}
