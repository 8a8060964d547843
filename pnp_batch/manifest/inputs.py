"""One entry of `inputs`: pictures, a video or a generated picture, and its prompts."""

from __future__ import annotations

import fractions
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from pnp_batch.manifest.fields import Integer, Name, Value, given_twice, renamed, writable
from pnp_batch.manifest.keys import INPUT_ALIASES
from pnp_batch.manifest.settings import GenerateSpec, PromptSpec, Settings

PROMPT_FILES = (".txt", ".csv", ".jsonl")

RATE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,20}|/[0-9]{1,9})?")  # the fraction of a huge exponent would take forever
NTSC_RATES = (24, 30, 48, 60, 120)  # times 1000/1001
NTSC_ROUNDING = fractions.Fraction(5, 1000)


def _frame_rate(value: Any) -> str:
    """Frames a second, exactly: 24, 12.5, 24000/1001; 23.976 and its like mean the NTSC rates that they round."""
    try:
        rate = fractions.Fraction(str(value)) if RATE.fullmatch(str(value)) else fractions.Fraction(0)
    except ZeroDivisionError:
        rate = fractions.Fraction(0)
    if not 0 < rate <= 1000:
        raise PydanticCustomError("fps", "frames a second, up to 1000, such as 24, 23.976 or 24000/1001")
    exact = (fractions.Fraction(whole * 1000, 1001) for whole in NTSC_RATES)
    return str(next((ntsc for ntsc in exact if abs(ntsc - rate) < NTSC_ROUNDING), rate))


FrameRate = Annotated[str, BeforeValidator(_frame_rate)]


class VideoSpec(Value):
    """Which frames of a video are translated, and what is written (docs/video.md).

    `start`, `stop` and `stride` count frames as a Python slice does. `fps` is for a folder of numbered pictures.
    """

    start: Annotated[Integer, Field(ge=0)] = 0
    stop: Annotated[Integer, Field(ge=1)] | None = None
    stride: Annotated[Integer, Field(ge=1)] = 1
    max_frames: Annotated[Integer, Field(ge=1)] | None = None
    fps: FrameRate = "24"
    partial: bool = False
    container: Literal["mp4", "mov", "webm", "gif", "frames"] = "mp4"
    crf: Annotated[Integer, Field(ge=0, le=51)] = 18
    side_by_side: bool = False


def _names(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value and writable(value)
    if not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise PydanticCustomError("images", "'images' should be a folder, a pattern or a list of files, each as text")
    if not value:
        raise PydanticCustomError("images", "the list of images is empty: write at least one")
    return tuple(map(writable, value))


INPUT_KINDS = ("image", "images", "video", "generate")


class InputSpec(Settings, VideoSpec):
    """One entry of `inputs`: exactly one of `image`, `images`, `video` or `generate`, and its prompts.

    `prompts` is a list, or the path of a .txt, .csv or .jsonl file, or left out where such a file is beside the input.
    `root` anchors an explicit list of `images`: the tree below it is mirrored in the output. With `missing: fail` files that are
    named and cannot be read are failed results like any other, as those met in a folder are; else the manifest is refused.
    """

    aliases = INPUT_ALIASES

    image: Name | None = None
    images: Annotated[str | tuple[str, ...] | None, PlainValidator(_names)] = None
    root: Name | None = None
    missing: Literal["refuse", "fail"] = "refuse"
    video: Name | None = None
    generate: GenerateSpec | None = None
    prompts: tuple[PromptSpec, ...] | None = None
    prompts_file: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _prompt_forms(cls, data: Any) -> Any:
        """Accepts a prompt as text or mapping, one or a list, or the path of a prompt file."""
        data = renamed(data, cls.aliases)
        if not isinstance(data, dict):
            return data
        prompts = data.get("prompts")
        if prompts is not None and "prompts_file" in data:
            raise given_twice("prompts_file", "prompts")
        if isinstance(prompts, str) and prompts.lower().endswith(PROMPT_FILES):
            return {k: v for k, v in data.items() if k != "prompts"} | {"prompts_file": prompts}
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        if isinstance(prompts, Sequence):
            data = data | {"prompts": [{"prompt": p} if isinstance(p, str) else p for p in prompts]}
        return data

    @model_validator(mode="after")
    def _one_kind(self) -> InputSpec:
        kinds = [kind for kind in INPUT_KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = f"has {' and '.join(kinds)}" if kinds else "has none of them"
            raise PydanticCustomError(
                "input_kind", "an input is one of video, image, images or generate; this one {found}", {"found": found}
            )
        if self.prompts is not None and not self.prompts:
            raise PydanticCustomError("no_prompts", "the list of prompts is empty: write at least one")
        if self.generate and not (self.prompts or self.prompts_file):
            raise PydanticCustomError("no_prompts", "a generated input needs prompts")
        if self.root is not None and not isinstance(self.images, tuple):
            raise PydanticCustomError("root", "root goes with a list of images")
        if "missing" in self.model_fields_set and (self.generate or isinstance(self.images, str)):
            raise PydanticCustomError("not_named", "missing goes with files that are named one by one")
        if self.video is None and (strays := VideoSpec.model_fields.keys() & self.model_fields_set):
            raise PydanticCustomError("no_video", "{key} goes with `video:`", {"key": ", ".join(sorted(strays))})
        if self.stop is not None and self.stop <= self.start:
            raise PydanticCustomError("no_frames", "stop comes after start")
        if self.prompts_file is not None and not self.prompts_file.lower().endswith(PROMPT_FILES):
            raise PydanticCustomError("prompts_file", "a prompt file ends in .txt, .csv or .jsonl")
        return self

    @property
    def of_video(self) -> VideoSpec:
        """What it says about its video."""
        values = {name: getattr(self, name) for name in VideoSpec.model_fields}
        return VideoSpec.model_construct(self.model_fields_set & values.keys(), **values)
