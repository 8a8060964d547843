"""`pnp-batch evaluate`: every result of a plan against its source and its prompt, as rows.

What was computed once is an artifact of the store, keyed by the result, the metric, its backbone's bytes and the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pnp_batch.diffusion.model import pick_device
from pnp_batch.errors import ItemError, ManifestError
from pnp_batch.evaluation.alignment import PixelAlignment
from pnp_batch.evaluation.backbones import Backbone, locate
from pnp_batch.evaluation.closed_forms import ClosedForms
from pnp_batch.evaluation.kept import STAGE
from pnp_batch.evaluation.lpips import Lpips, load_lpips
from pnp_batch.evaluation.masks import Masks
from pnp_batch.evaluation.structure import KeyReader, StructureDistance
from pnp_batch.evaluation.text import TextImageModel, TextSimilarity
from pnp_batch.evaluation.values import Mask, Metric, Pair, Unavailable, Value, Values
from pnp_batch.manifest import Manifest
from pnp_batch.plan import Plan
from pnp_batch.stages.work import Context, Item, Unit
from pnp_batch.store import Artifact, key_of
from pnp_batch.store.artifacts import CorruptArtifact
from pnp_batch.store.keys import sha256

BATCH = 16  # results computed at once

# What a name in `evaluation.metrics` stands for, and what it adds where the source has a mask.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "psnr": ("psnr",),
    "mse": ("mse",),
    "ssim": ("ssim",),
    "lpips": ("lpips",),
    "structure_distance": ("structure_distance",),
    "structure_distance_pie": ("structure_distance_pie",),
    "clip_similarity": ("clip_similarity",),
    "text_gain": ("text_gain",),
    "alignment": ("shift", "shift_x", "shift_y", "scale"),
    "reconstruction_psnr": ("reconstruction_psnr",),
}
MASKED: Mapping[str, tuple[str, ...]] = {
    "psnr": ("psnr_outside", "psnr_inside", "psnr_pie"),
    "mse": ("mse_outside", "mse_inside", "mse_pie"),
    "ssim": ("ssim_outside", "ssim_inside", "ssim_pie"),
    "lpips": ("lpips_pie",),
    "clip_similarity": ("clip_similarity_inside",),
}
NOT_INVERTED = "nothing was inverted: a generated guidance image, or a method that needs no trajectory"
NO_MASK = "evaluation.masks holds none for the source"
NO_LPIPS = "no weights are named: write `evaluation: {lpips: FILE}`; docs/evaluation.md says how to make the file"


@dataclass(frozen=True)
class Score:
    """One result's numbers.

    Attributes:
        file_name: Of its picture, relative to the output folder.
        source: The guidance image, as in the manifest.
        prompt: The target prompt.
        method: Of translation.
        values: By column; only the columns that were asked for and that apply.
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


def is_nan(value: Value) -> bool:
    """Whether a computation gave no finite number."""
    return isinstance(value, float) and not math.isfinite(value)


def is_number(value: Value) -> bool:
    """Whether it can be averaged."""
    return isinstance(value, float) and math.isfinite(value)


@dataclass(eq=False)
class Finding:
    """A result that is there."""

    unit: Unit
    artifact: Artifact
    masks: Masks | None

    @cached_property
    def mask(self) -> Mask | None:
        """The edit mask of its source."""
        job = self.unit.item.job
        return self.masks.of(job.source, job.size) if self.masks and job.size else None

    @cached_property
    def pair(self) -> Pair:
        """Its pictures, read from the store.

        Raises:
            CorruptArtifact: They are gone; the next run makes them again.
            ItemError: The guidance image is gone.
        """
        store = self.unit.item.context.store
        source_key = str(self.artifact.meta.get("trajectory", self.unit.item.key))
        trajectory = store.find("invert", source_key)
        source = store.load(trajectory, "preview")["source"] if trajectory else self.unit.item.pixels
        result = store.load(self.artifact, "result")["image"]
        return Pair(source, result, self.unit.translation.prompt, source_key, self.mask)

    def key(self, metric: Metric) -> str:
        """Where the metric's numbers of it are kept."""
        mask = None if self.mask is None else sha256(self.mask.tobytes())
        content = {"stage": STAGE, "metric": metric.name, "version": metric.version, "result": self.artifact.key}
        return key_of(content | {"mask": mask} | dict(metric.identity))


def scores(plan: Plan, context: Context) -> Iterator[Score]:
    """Scores of every result of a plan that is there, in plan order.

    Args:
        plan: The plan of the run.
        context: Of the worker that made it: the keys depend on its dtype.
    """
    scorer = _Scorer(plan.manifest, context)
    chunk: list[Finding] = []
    for finding in _findings(plan, context, scorer.masks):
        chunk.append(finding)
        if len(chunk) == BATCH:
            yield from scorer.score(chunk)
            chunk = []
    yield from scorer.score(chunk)


def _findings(plan: Plan, context: Context, masks: Masks | None) -> Iterator[Finding]:
    for job in plan.jobs():
        item = Item(job, context)
        try:
            artifacts = [(unit, unit.find()) for unit in item.units]
        except ItemError:
            continue  # the picture is gone or broken: `status` and the failure list name it
        yield from (Finding(unit, artifact, masks) for unit, artifact in artifacts if artifact)


class _Scorer:
    """The metrics a manifest asks for, each made ready once."""

    def __init__(self, manifest: Manifest, context: Context) -> None:
        self.spec, self.context = manifest.evaluation, context
        self.masks = _masks(manifest)
        self.masked = [column for name in self.spec.metrics for column in MASKED.get(name, ())]
        self.wanted = [column for name in self.spec.metrics for column in COLUMNS[name]] + self.masked
        self.unavailable: dict[str, str] = {}
        self.device = pick_device(manifest.run.devices)
        self._base = manifest.base
        self.metrics: list[Metric] = [
            metric
            for columns, make in self._known().items()
            if any(c in self.wanted for c in columns) and (metric := self._made(columns, make)) is not None
        ]

    def _known(self) -> dict[tuple[str, ...], Callable[[], Metric]]:
        """How to make each metric, by the columns it fills."""
        spec = self.spec
        reader = cache(lambda: KeyReader(self._located(spec.dino), self.device))
        clip = cache(lambda: TextImageModel(self._located(spec.clip), self.device))
        lpips = cache(lambda: load_lpips(self._located(spec.lpips), self.device))
        return {
            ClosedForms.columns: ClosedForms,
            PixelAlignment.columns: PixelAlignment,
            Lpips.columns: lambda: Lpips(self._located(spec.lpips), lpips, self.device),
            ("structure_distance",): lambda: StructureDistance(self._located(spec.dino), reader, "structure_distance"),
            ("structure_distance_pie",): lambda: StructureDistance(
                self._located(spec.dino), reader, "structure_distance_pie"
            ),
            TextSimilarity.columns: lambda: TextSimilarity(self._located(spec.clip), clip),
        }

    def _located(self, name: str | None) -> Backbone:
        if name is None:
            raise Unavailable(NO_LPIPS)
        return locate(name, self._base, self.context.digests)

    def _made(self, columns: Iterable[str], make: Callable[[], Metric]) -> Metric | None:
        try:
            return make()
        except Unavailable as error:
            self.unavailable |= dict.fromkeys(columns, str(error))
            return None

    def score(self, findings: Sequence[Finding]) -> list[Score]:
        """Scores some results."""
        values: list[dict[str, Value]] = [{} for _ in findings]
        for metric in tuple(self.metrics):  # one whose weights turn out unusable leaves the list
            for own, found in zip(values, self._values(metric, findings), strict=True):
                own |= found
        return [self._score(finding, own) for finding, own in zip(findings, values, strict=True)]

    def _score(self, finding: Finding, values: dict[str, Value]) -> Score:
        meta, unit = finding.artifact.meta, finding.unit
        psnr = meta.get("errors", {}).get("reconstruction_psnr")
        values |= self.unavailable
        values["reconstruction_psnr"] = NOT_INVERTED if psnr is None else float(psnr)
        if self.masks and finding.mask is None:
            values |= dict.fromkeys(self.masked, NO_MASK)
        outputs = self.context.outputs
        return Score(
            file_name=outputs.name(unit.item.job.source.stem, unit.translation.prompt, finding.artifact.key),
            source=unit.item.job.source.name,
            prompt=unit.translation.prompt,
            method=unit.translation.settings.method,
            values={column: values[column] for column in self.wanted if column in values},
            key=finding.artifact.key,
            hardware=str(meta.get("hardware", meta["device"])),
            seconds=float(meta["seconds"]),
        )

    def _values(self, metric: Metric, findings: Sequence[Finding]) -> list[Values]:
        """One metric of some results: read where it was computed before."""
        store = self.context.store
        keys = [finding.key(metric) for finding in findings]
        kept = {key: artifact for key in keys if (artifact := store.find(STAGE, key))}
        values: dict[str, Values] = {key: _unpacked(artifact.meta["values"]) for key, artifact in kept.items()}
        missing = {key: finding for key, finding in zip(keys, findings, strict=True) if key not in values}
        values |= self._computed(metric, missing)
        return [values[key] for key in keys]

    def _computed(self, metric: Metric, findings: Mapping[str, Finding]) -> dict[str, Values]:
        values: dict[str, Values] = {}
        pairs: dict[str, Pair] = {}
        for key, finding in findings.items():
            try:
                pairs[key] = finding.pair
            except (CorruptArtifact, ItemError) as error:
                values[key] = dict.fromkeys(metric.columns, f"a picture cannot be read, run again: {error}")
        try:
            computed, failed = _attempt(metric, pairs)
        except Unavailable as error:  # the weights are there, but not what they should be
            self.metrics.remove(metric)
            self.unavailable |= dict.fromkeys(metric.columns, str(error))
            return values | dict.fromkeys(pairs, self.unavailable)
        for key, row in computed.items():
            meta = {"metric": metric.name, "result": findings[key].artifact.key, "values": _packed(row)}
            self.context.store.publish(STAGE, key, {}, meta)
        return values | computed | failed


def _attempt(metric: Metric, pairs: Mapping[str, Pair]) -> tuple[dict[str, Values], dict[str, Values]]:
    """What could be computed, and why the rest could not; a batch that fails (mostly for memory) is taken apart."""
    if not pairs:
        return {}, {}
    try:
        return dict(zip(pairs, metric(list(pairs.values())), strict=True)), {}
    except RuntimeError as error:
        if len(pairs) == 1:
            return {}, dict.fromkeys(pairs, dict.fromkeys(metric.columns, f"failed: {error}"))
    computed: dict[str, Values] = {}
    failed: dict[str, Values] = {}
    for key, pair in pairs.items():
        done, lost = _attempt(metric, {key: pair})
        computed, failed = computed | done, failed | lost
    return computed, failed


def _masks(manifest: Manifest) -> Masks | None:
    if manifest.evaluation.masks is None:
        return None
    path = manifest.base / Path(manifest.evaluation.masks).expanduser()
    if not path.exists():
        problem = manifest.problem(("evaluation", "masks"), f"no such folder or mapping file: {path}")
        raise ManifestError([problem])
    return Masks(path)


def _packed(values: Values) -> dict[str, Value | None]:
    """JSON has no NaN: None stands for it."""
    return {name: None if is_nan(value) else value for name, value in values.items()}


def _unpacked(values: Mapping[str, Value | None]) -> dict[str, Value]:
    return {name: math.nan if value is None else value for name, value in values.items()}
