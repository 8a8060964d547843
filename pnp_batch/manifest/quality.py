"""`evaluation` and `quality`: what is measured, and what a result has to reach."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, model_validator
from pydantic_core import PydanticCustomError

from pnp_batch.manifest.fields import Name, Number, Value
from pnp_batch.manifest.keys import QUALITY_ALIASES
from pnp_batch.manifest.settings import Settings

Metric = Literal[
    "psnr",
    "mse",
    "ssim",
    "lpips",
    "structure_distance",
    "structure_distance_pie",
    "clip_similarity",
    "text_gain",
    "alignment",
    "reconstruction_psnr",
    "reconstruction_lpips",
]


class EvaluationSpec(Value):
    """What `pnp-batch evaluate` computes, and where its backbones lie (docs/evaluation.md). Enters no key of a result.

    `structure_distance_pie` is `structure_distance` with PIE-Bench's resizing, and has to be asked for.
    """

    dino: Name = "facebook/dino-vitb8"
    clip: Name = "openai/clip-vit-large-patch14"
    lpips: Name | None = None
    metrics: tuple[Metric, ...] = tuple(name for name in get_args(Metric) if name != "structure_distance_pie")
    masks: Name | None = None


def _at_most(limit: float, factor: int) -> AfterValidator:
    """Refuses a threshold beyond what its column can be; the literature often shows it times a factor."""

    def check(value: float) -> float:
        if value <= limit:
            return value
        hint = f", not times {factor}: write {value / factor:g}" if value / factor <= limit else ""
        raise PydanticCustomError("too_large", "this is at most {limit}{hint}", {"limit": f"{limit:g}", "hint": hint})

    return AfterValidator(check)


Cosine = Annotated[Number, _at_most(1, 100)]
StructureDistance = Annotated[Number, _at_most(4, 1000)]  # a mean squared difference of cosines


class QualitySpec(Value):
    """What a result has to reach, and what is tried where it does not (docs/evaluation.md).

    `min_X` and `max_X` bound the column X of `pnp-batch evaluate`. `retry` holds settings that replace a result's own, in the
    order in which they are tried.
    """

    aliases = QUALITY_ALIASES

    min_psnr: Number | None = None
    min_ssim: Cosine | None = None
    min_clip_similarity: Cosine | None = None
    min_text_gain: Cosine | None = None
    min_reconstruction_psnr: Number | None = None
    max_mse: Number | None = None
    max_lpips: Number | None = None
    max_structure_distance: StructureDistance | None = None
    max_structure_distance_pie: StructureDistance | None = None
    max_shift: Number | None = None
    max_reconstruction_lpips: Number | None = None
    retry: tuple[Settings, ...] = ()

    @model_validator(mode="after")
    def _asks_for_something(self) -> QualitySpec:
        if not self.thresholds:
            known = ", ".join(name for name in QualitySpec.model_fields if name != "retry")
            raise PydanticCustomError("no_threshold", "quality names no threshold; there are {known}", {"known": known})
        if not all(retry.given() for retry in self.retry):
            raise PydanticCustomError("empty_retry", "a retry needs at least one setting, such as pnp_f_t: 0.6")
        return self

    @property
    def thresholds(self) -> dict[str, float]:
        """The thresholds that were written, by name."""
        return {name: value for name, value in self.given().items() if name != "retry" and value is not None}

    @property
    def columns(self) -> dict[str, str]:
        """The column of each threshold that was written."""
        return {name: column_of(name) for name in self.thresholds}


def column_of(threshold: str) -> str:
    """The column that a threshold bounds: `psnr` for `min_psnr`."""
    return threshold.partition("_")[2]
