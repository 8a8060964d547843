"""What a user writes: the YAML manifest as frozen values, and errors that name file, line, key and the right word.

`load_manifest` reads and checks the form; what needs the files or the model is checked by `plan.check`.
"""

from __future__ import annotations

import difflib
import fractions
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from pnp_batch.errors import ManifestError, Problem

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # a PyYAML built without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]

Loc = tuple[int | str, ...]

MAX_ALIASED = 1_000_000  # values that aliases may add: a few lines of YAML can otherwise stand for gigabytes
MAX_DEPTH = 100  # PyYAML composes nested values by recursion in C, so thousands of brackets crash the process
MAX_SHOWN = 60

# Keys of the public PnP configurations and of their near relatives -> ours.
SETTING_ALIASES = {
    "n_timesteps": "num_inference_steps",
    "ddim_steps": "num_inference_steps",
    "num_ddim_sampling_steps": "num_inference_steps",
    "steps": "num_inference_steps",
    "scale": "guidance_scale",
    "inversion_steps": "num_inversion_steps",
    "source_prompt": "inversion_prompt",
    "cross_replace_steps": "p2p_cross_replace",
    "self_replace_steps": "p2p_self_replace",
    "negative_prompt_alpha": "negative_alpha",
    "negative_prompt_schedule": "negative_schedule",
    "H": "height",
    "W": "width",
}
INPUT_ALIASES = SETTING_ALIASES | {
    "init_img": "image",
    "image_path": "image",
    "target_prompts": "prompts",
    "prompt": "prompts",
}
GENERATE_ALIASES = {
    "source_prompt": "prompt",
    "scale": "guidance_scale",
    "ddim_steps": "num_inference_steps",
    "n_timesteps": "num_inference_steps",
    "num_ddim_sampling_steps": "num_inference_steps",
    "steps": "num_inference_steps",
}
TOP_ALIASES = {"output_path": "output_dir", "model_id": "model", "model_key": "model"}

AS_FRACTION = "as a fraction of them (40 of 50 is 0.8)"
SHARES_OF_STEPS = ("pnp_f_t", "pnp_attn_t", "sdedit_strength", "p2p_cross_replace", "p2p_self_replace")

# Keys people bring from elsewhere that have no equal here, and what to write instead.
HINTS = {
    "strength": "PnP has no strength: how much of the source is kept is set by pnp_f_t and pnp_attn_t (0 to 1 each); "
    "with `method: sdedit` write sdedit_strength",
    "feature_injection_threshold": f"it counts steps; write pnp_f_t {AS_FRACTION}",
    "sd_version": "write `model:` with a hub id, a folder or a .safetensors file",
    "device": "write `run: {devices: cuda}`",
    "latents_path": "inversion latents are kept in the store by content; leave this out",
    "exp_name": "results are named after input and prompt; leave this out",
    "experiment_name": "results are named after input and prompt; leave this out",
    "source_experiment_name": "name the picture itself as `image:` in an entry of `inputs`",
    "save_steps": "the inversion latents that are needed are kept by themselves; leave this out",
}

AUTHORS_INVERSION_STEPS = 999

PROMPT_FILES = (".txt", ".csv", ".jsonl")

MethodName = Literal["pnp", "ddim", "sdedit", "p2p", "text-to-image"]

# Settings that mean something to some methods only; what is not listed here means something to all.
INVERTING: tuple[MethodName, ...] = ("pnp", "ddim", "p2p")
METHODS_OF: dict[str, tuple[MethodName, ...]] = {
    "pnp_f_t": ("pnp",),
    "pnp_attn_t": ("pnp",),
    "pnp_f_layers": ("pnp",),
    "pnp_attn_layers": ("pnp",),
    "consistency": ("pnp",),
    "sdedit_strength": ("sdedit",),
    "p2p_edit": ("p2p",),
    "p2p_cross_replace": ("p2p",),
    "p2p_self_replace": ("p2p",),
    "p2p_self_cells": ("p2p",),
    "seed": ("pnp", "sdedit", "text-to-image"),  # PnP draws nothing from it, but has it in its keys
    "inversion_method": INVERTING,
    "num_inversion_steps": INVERTING,
    "inversion_tolerance": INVERTING,
    "inversion_prompt": INVERTING,
}


def _renamed(data: Any, aliases: Mapping[str, str]) -> Any:
    """Replaces alias keys in a mapping by ours; a key given under two names is an error, not a lottery."""
    if not isinstance(data, Mapping):
        return data
    written: dict[Any, str] = {}
    for key in data:
        other = written.setdefault(aliases.get(key, key), key)
        if other is not key:
            raise _given_twice(key, other)
    return {name: data[key] for name, key in written.items()}


def _given_twice(key: str, other: str) -> PydanticCustomError:
    return PydanticCustomError(
        "given_twice", "'{key}' and '{other}' are the same setting", {"key": key, "other": other}
    )


def _off_is_a_word(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


def _no_boolean(value: Any) -> Any:
    """YAML 1.1 reads a bare `on` as true, which would pass for the number 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "this should be a number")
    return value


def _writable(text: str) -> str:
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise PydanticCustomError("unwritable", "this text holds a character that no file can hold")
    return text


def _as_layers(value: Any) -> Any:
    """One number, or numbers in the cell of a CSV file, for a list."""
    if isinstance(value, str):
        return value.strip("[] ").replace(",", " ").split()
    return (value,) if isinstance(value, int) else value


def _auto_or_count(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not str(value).isdecimal() or not int(value):
        raise PydanticCustomError("batch_size", "this should be a whole number from 1 on, or auto")
    return int(value)


def _devices(value: Any) -> Any:
    """A word, a count, or the numbers of some GPUs, which the command line writes as `0,1`."""
    numbers = re.fullmatch(r"\[?(\d+(?: *, *\d+)+|(?<=\[)\d+)\]?", value) if isinstance(value, str) else None
    listed = [int(part) for part in numbers[1].split(",")] if numbers else value
    if isinstance(listed, list | tuple):
        if not listed or not all(type(n) is int and n >= 0 for n in listed) or len(set(listed)) < len(listed):
            raise PydanticCustomError(
                "devices", "the numbers of GPUs should be whole, at least one, and each named once"
            )
        return tuple(listed)
    if isinstance(value, bool) or not re.fullmatch(r"auto|all|cpu|cuda(:\d+)?|mps|0*[1-9]\d*", str(value)):
        raise PydanticCustomError(
            "devices", "this should be auto, all, cpu, cuda, cuda:1, how many devices, or their numbers ([0, 1])"
        )
    return int(value) if str(value).isdecimal() else value


def _as_pairs(value: Any) -> Any:
    """A mapping as a value that can be hashed."""
    return tuple(value.items()) if isinstance(value, Mapping) else value


def _names(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value and _writable(value)
    if not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise PydanticCustomError("images", "'images' should be a folder, a pattern or a list of files, each as text")
    if not value:
        raise PydanticCustomError("images", "the list of images is empty: write at least one")
    return tuple(map(_writable, value))


def _empty_for_nothing(value: Any) -> Any:
    """A key whose lines below it were all commented out."""
    return {} if value is None else value


Text = Annotated[str, AfterValidator(_writable)]
Name = Annotated[str, Field(min_length=1), AfterValidator(_writable)]
Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Integer = Annotated[int, BeforeValidator(_no_boolean)]
Layers = Annotated[tuple[Annotated[Integer, Field(ge=0)], ...], BeforeValidator(_as_layers)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Pixels = Annotated[Integer, Field(ge=8, le=16384)]
Steps = Annotated[Integer, Field(ge=1, le=1000)]
Cells = Annotated[Integer, Field(ge=1)]
Seed = Annotated[Integer, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Row:
    """The place of a prompt that stands in a prompt file.

    Attributes:
        file: The file.
        line: 1-based.
        given: Settings that the row itself gives.
        loc: The input it belongs to.
    """

    file: str
    line: int
    given: frozenset[str]
    loc: Loc


class _Value(BaseModel):
    """A frozen value that refuses unknown keys and understands aliases."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    aliases: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: Any) -> Any:
        return _renamed(data, cls.aliases)

    def given(self) -> dict[str, Any]:
        """The fields that were written, without the defaults; in a fixed order, for files that are written from them."""
        written = self.model_fields_set  # a set, whose order changes from process to process
        return {name: getattr(self, name) for name in type(self).model_fields if name in written}


class Settings(_Value):
    """Everything that changes a result. Names are diffusers' own; method.md's symbols in the field comments."""

    aliases = SETTING_ALIASES

    method: MethodName = "pnp"
    height: Pixels | None = None
    width: Pixels | None = None
    num_inference_steps: Steps = 50
    guidance_scale: Number = 7.5
    pnp_f_t: Fraction = 0.8
    pnp_attn_t: Fraction = 0.5
    pnp_f_layers: Layers | None = None
    pnp_attn_layers: Layers | None = None
    sdedit_strength: Fraction = 0.6
    p2p_edit: Literal["auto", "replace", "refine"] = "auto"
    p2p_cross_replace: Fraction = 0.8
    p2p_self_replace: Fraction = 0.4
    p2p_self_cells: Cells = 16**2  # the authors' limit: 16x16 of the 64x64 latents of a 512x512 picture
    inversion_method: Literal["auto", "ddim", "fixed-point"] = "auto"
    num_inversion_steps: Steps | None = None
    inversion_tolerance: Annotated[float, Field(gt=0, le=0.1)] = 1e-3
    inversion_prompt: Text = ""
    negative_prompt: Text = ""
    negative_alpha: Fraction = 0.0
    negative_schedule: Literal["constant", "linear", "exp"] = "constant"
    seed: Seed = 0
    consistency: Literal["keyframes", "none"] = "keyframes"  # of the frames of a video

    def layers(self, own: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The injection layers (f, A): as written, else the model's own."""
        f = own[0] if self.pnp_f_layers is None else self.pnp_f_layers
        attn = own[1] if self.pnp_attn_layers is None else self.pnp_attn_layers
        return tuple(sorted(set(f))), tuple(sorted(set(attn)))

    def retried(self, retry: Settings) -> Settings:
        """These settings, decided as they are, with those of a retry on top: a new inversion is decided anew."""
        undecided: dict[str, Any] = {}
        if retry.model_fields_set & {"inversion_method", "num_inversion_steps"}:
            undecided = {"inversion_method": "auto", "num_inversion_steps": None}
        return self.model_copy(update=undecided).overridden(retry).settled()

    def meaningful(self) -> dict[str, Any]:
        """The settings that mean something to its method, `method` itself included."""
        return {
            name: getattr(self, name)
            for name in Settings.model_fields
            if self.method in METHODS_OF.get(name, (self.method,))
        }

    def settled(self) -> Settings:
        """These settings with `auto` decided: who names a number of inversion steps wants the authors' scheme."""
        method = self.inversion_method
        if method == "auto":
            method = "fixed-point" if self.num_inversion_steps is None else "ddim"
        steps = (
            AUTHORS_INVERSION_STEPS
            if method == "ddim" and self.num_inversion_steps is None
            else self.num_inversion_steps
        )
        return self.model_copy(update={"inversion_method": method, "num_inversion_steps": steps})

    def overridden(self, *others: Settings) -> Settings:
        """These settings with what the others wrote on top, the last one winning."""
        update = {k: v for other in others for k, v in other.given().items() if k in Settings.model_fields}
        values = {name: getattr(self, name) for name in Settings.model_fields} | update
        return Settings.model_construct(**values)  # every value was validated where it was written


class PromptSpec(Settings):
    """A target prompt with settings of its own."""

    prompt: Text

    @model_validator(mode="after")
    def _not_blank(self) -> PromptSpec:
        if not self.prompt.strip():
            raise PydanticCustomError("blank_prompt", "the prompt is empty")
        return self


class GenerateSpec(_Value):
    """A guidance image that is sampled from a prompt (method.md, section 6)."""

    aliases = GENERATE_ALIASES

    prompt: Text
    seed: Seed = 0
    guidance_scale: Number = 7.5
    negative_prompt: Text = ""
    num_inference_steps: Steps | None = None


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


class VideoSpec(_Value):
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
        data = _renamed(data, cls.aliases)
        if not isinstance(data, dict):
            return data
        prompts = data.get("prompts")
        if prompts is not None and "prompts_file" in data:
            raise _given_twice("prompts_file", "prompts")
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


class RaySpec(_Value):
    """Engine `ray`: which cluster, and what each worker takes of it.

    `num_gpus` is 1 where the cluster has GPUs if left out; a fraction puts several workers on one.
    """

    address: Name | None = None
    num_cpus: Annotated[Integer, Field(ge=1)] = 1
    num_gpus: Annotated[Number, Field(ge=0)] | None = None
    resources: Annotated[tuple[tuple[Name, Annotated[Number, Field(gt=0)]], ...], BeforeValidator(_as_pairs)] = ()


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise PydanticCustomError("lines", "this goes into one line of a script and cannot hold a line break")
    return text


Word = Annotated[Name, AfterValidator(_one_line)]


class SlurmSpec(_Value):
    """Engine `slurm`: a job array. Everything but the first three goes into the sbatch script as it is.

    `tasks` is the size of the array, `parallel` how many of it run at once, `logs` the folder of scripts and logs.
    """

    tasks: Annotated[Integer, Field(ge=1, le=100_000)] = 8
    parallel: Annotated[Integer, Field(ge=1)] | None = None
    logs: Word | None = None
    partition: Word | None = None
    time: Annotated[Integer, Field(ge=1)] = 60
    gres: Word | None = None
    gpus_per_node: Annotated[Integer, Field(ge=1)] | None = None
    cpus_per_task: Annotated[Integer, Field(ge=1)] = 1
    mem: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    nodelist: Word | None = None
    setup: tuple[Text, ...] = ()
    python: Word | None = None

    @property
    def wants_gpus(self) -> bool:
        """Whether its jobs get a GPU."""
        return self.gpus_per_node is not None or "gpu" in (self.gres or "")


class RunSpec(_Value):
    """How to run, never what: nothing here changes a result (but `dtype` and `bank_compression`, which are in its key)."""

    engine: Literal["local", "ray", "slurm"] = "local"
    devices: Annotated[str | int | tuple[int, ...], PlainValidator(_devices)] = "auto"
    ray: Annotated[RaySpec, BeforeValidator(_empty_for_nothing)] = RaySpec()
    slurm: Annotated[SlurmSpec, BeforeValidator(_empty_for_nothing)] = SlurmSpec()
    batch_size: Annotated[int | Literal["auto"], PlainValidator(_auto_or_count)] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    bank: Annotated[Literal["auto", "memory", "disk", "off"], BeforeValidator(_off_is_a_word)] = "auto"
    bank_compression: Literal["none", "int8", "fp8"] = "none"
    bank_budget: ByteSize | None = None
    reconstruction: Literal["measured", "skipped"] = "measured"
    store: Name | None = None
    checkpoint_seconds: Annotated[Number, Field(ge=0)] = 30.0
    max_attempts: Annotated[Integer, Field(ge=2, le=1000)] = 3
    unit_timeout: Annotated[Number, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _something_to_compress(self) -> RunSpec:
        if self.bank == "off" and self.bank_compression != "none":
            raise PydanticCustomError(
                "bank_compression", "bank_compression needs a bank; write bank: auto, memory or disk"
            )
        return self

    @property
    def devices_wanted(self) -> int | None:
        """How many devices are asked for; None for as many as there are."""
        if isinstance(self.devices, tuple):
            return len(self.devices)
        return self.devices if isinstance(self.devices, int) else None if self.devices in ("auto", "all") else 1

    @property
    def device_elsewhere(self) -> str | None:
        """`cpu` or `cuda` where the manifest says what a cluster's workers have, whatever this machine has; else None."""
        gpus = self.slurm.wants_gpus if self.engine == "slurm" else self.ray.num_gpus if self.engine == "ray" else None
        return None if gpus is None else "cuda" if gpus else "cpu"

    @property
    def device(self) -> str:
        """The one device of a worker in this process, as torch calls it, or `auto`."""
        if isinstance(self.devices, tuple):
            return f"cuda:{self.devices[0]}"
        return "auto" if isinstance(self.devices, int) or self.devices == "all" else self.devices

    def dtype_on(self, device: str) -> str:
        """The dtype on a device type: as written, else half precision on a GPU and float32 on a CPU, where halves are slower."""
        return self.dtype if self.dtype != "auto" else "float32" if device == "cpu" else "float16"


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


class EvaluationSpec(_Value):
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


class QualitySpec(_Value):
    """What a result has to reach, and what is tried where it does not (docs/evaluation.md).

    `min_X` and `max_X` bound the column X of `pnp-batch evaluate`. `retry` holds settings that replace a result's own, in the
    order in which they are tried.
    """

    aliases: ClassVar[Mapping[str, str]] = {"min_clip": "min_clip_similarity"}

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


for _name in (name for name in (*QualitySpec.model_fields, *QualitySpec.aliases) if name != "retry"):
    _bound, _, _column = _name.partition("_")
    HINTS[f"{'max' if _bound == 'min' else 'min'}_{_column}"] = (
        f"{'more' if _bound == 'min' else 'less'} is better: {_name}"
    )


def column_of(threshold: str) -> str:
    """The column that a threshold bounds: `psnr` for `min_psnr`."""
    return threshold.partition("_")[2]


class Manifest(_Value):
    """A whole manifest. Relative paths are relative to the folder of its file, or to `base_dir` as seen from there (`base`)."""

    aliases = TOP_ALIASES

    version: Literal[1] = 1
    model: Name
    revision: Name | None = None
    variant: Name | None = None
    config: Name | None = None
    base_dir: Name | None = None
    output_dir: Name
    defaults: Annotated[Settings, BeforeValidator(_empty_for_nothing)] = Settings()
    inputs: tuple[InputSpec, ...]
    run: Annotated[RunSpec, BeforeValidator(_empty_for_nothing)] = RunSpec()
    evaluation: Annotated[EvaluationSpec, BeforeValidator(_empty_for_nothing)] = EvaluationSpec()
    quality: QualitySpec | None = None

    @model_validator(mode="after")
    def _some_inputs(self) -> Manifest:
        if not self.inputs:
            raise PydanticCustomError("no_inputs", "the list of inputs is empty: write at least one")
        return self

    _path: Path = PrivateAttr(default=Path("manifest.yaml"))
    _root: yaml.Node | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path:
        """The file it was read from."""
        return self._path

    @property
    def base(self) -> Path:
        """The folder relative paths are relative to."""
        folder = self._path.absolute().parent
        return folder if self.base_dir is None else _joined(folder, self.base_dir)

    @property
    def output(self) -> Path:
        """The output folder, absolute."""
        return Path(os.path.normpath(self.located(self.output_dir)))

    @property
    def store(self) -> Path:
        """The folder of the artifact store, absolute."""
        if self.run.store is None:
            return self.output / "store"
        return Path(os.path.normpath(self.located(self.run.store)))

    def located(self, written: str) -> Path:
        """The absolute path of what the manifest calls `written`; `~` is the user's home."""
        return _joined(self.base, written)

    def to_json(self) -> str:
        """Everything but the inputs, which a worker gets package by package."""
        return self.model_dump_json(exclude={"inputs"}, exclude_unset=True)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """What `to_json` gave of the manifest in a file. It is not read again: it may have been edited since."""
        some = [{"image": "-", "prompts": ["-"]}]  # a manifest without inputs is not valid
        manifest = cls.model_validate({**json.loads(text), "inputs": some}).model_copy(update={"inputs": ()})
        manifest._path = path
        return manifest

    def with_run(self, overrides: Mapping[str, Any]) -> Manifest:
        """This manifest with some of its `run` settings replaced, as the command line does.

        Raises:
            ManifestError: An override is unusable.
        """
        try:
            run = RunSpec.model_validate(self.run.given() | dict(overrides))
        except ValidationError as error:
            details = (_explain(Path("command line"), None, detail, RunSpec) for detail in error.errors())
            raise ManifestError([Problem(p.file, None, f"--{p.key}", p.message) for p in details]) from None
        return self.model_copy(update={"run": run})

    def problem(self, place: Loc | Row, message: str) -> Problem:
        """A problem with the value at a place, with its file and line."""
        if isinstance(place, Row):
            return Problem(place.file, place.line, "", message)
        return _problem(self._path, self._root, place, message)

    def setting_problem(self, place: Loc | Row, setting: str, message: str) -> Problem:
        """A problem with a setting that holds at a prompt: there, at its input or in `defaults`, wherever it stands."""
        if isinstance(place, Row) and setting in place.given:
            return Problem(place.file, place.line, setting, message)
        own = place.loc if isinstance(place, Row) else place
        places: list[Loc] = [(*own, setting), (*own[:2], setting), ("defaults", setting)]
        written = (loc for loc in places if _node_at(self._root, loc)[1] == len(loc))
        return self.problem(next(written, place), message)


def _joined(folder: Path, written: str) -> Path:
    path = os.path.expanduser(written)  # noqa: PTH111 - pathlib raises where a home is not known
    return Path(os.path.normpath(folder / path))


def load_manifest(path: Path | str) -> Manifest:
    """Reads and validates a manifest.

    Raises:
        ManifestError: With every problem of form found, each with its line.
    """
    path = Path(path)
    text = _read_text(path)
    root, data = _parse_yaml(path, text)
    if not isinstance(data, dict):
        raise ManifestError([Problem(str(path), 1, "", "a manifest is a mapping: model, output_dir, inputs, ...")])
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise ManifestError([_explain(path, root, detail) for detail in error.errors()]) from None
    manifest._path, manifest._root = path, root
    return manifest


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Settings from plain keywords (the Python front door), with the manifest's messages.

    Raises:
        ManifestError: An unknown or unusable setting, or one that means nothing to the method.
    """
    settings = _from_keywords(Settings, values)
    given, plain = settings.given(), Settings()
    meaningful = settings.meaningful()
    foreign = [name for name in given if name not in meaningful and given[name] != getattr(plain, name)]
    if foreign:
        raise ManifestError([Problem("settings", None, name, means_nothing(name, settings.method)) for name in foreign])
    return settings


def means_nothing(setting: str, method: str) -> str:
    """What is wrong with a setting that a method does not know."""
    return f"{setting} means nothing to `method: {method}`; it belongs to {' and '.join(METHODS_OF[setting])}"


def run_from(values: Mapping[str, Any]) -> RunSpec:
    """Run settings from plain keywords, likewise.

    Raises:
        ManifestError: An unknown or unusable one.
    """
    return _from_keywords(RunSpec, values)


V = TypeVar("V", bound=_Value)


def _from_keywords(model: type[V], values: Mapping[str, Any]) -> V:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ManifestError([_explain(Path("settings"), None, detail, model) for detail in error.errors()]) from None


def prompt_from_row(row: Mapping[str, Any], file: Path, line: int) -> PromptSpec:
    """A prompt out of a row of a CSV or JSONL file.

    Raises:
        ManifestError: With the file and line of the row.
    """
    try:
        return PromptSpec.model_validate(dict(row))
    except ValidationError as error:
        details = [_explain(file, None, detail, PromptSpec) for detail in error.errors()]
        raise ManifestError([Problem(p.file, line, p.key, p.message) for p in details]) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ManifestError([Problem(str(path), None, "", f"no such file{near_file(path)}")]) from None
    except UnicodeDecodeError as error:
        raise ManifestError([Problem(str(path), None, "", f"is not UTF-8 text: {error}")]) from None
    except (OSError, ValueError) as error:
        raise ManifestError([Problem(str(path), None, "", f"cannot be read: {error}")]) from None


def near_file(path: Path) -> str:
    """`; did you mean ...?` with the file beside a missing one that has the nearest name, or nothing."""
    try:
        names = os.listdir(path.absolute().parent)  # noqa: PTH208 - names are all that is needed
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _Loader(SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; PyYAML lets whatever goes wrong in reading one (`!!bool maybe`, 2001-99-99) escape as it is."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2]
            message = f"this cannot be read as a YAML {kind}; put it in quotes if it is text"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from error


def _parse_yaml(path: Path, text: str) -> tuple[yaml.Node, Any]:
    """Composes and constructs the document; the node tree is kept for line numbers."""
    try:
        _check_depth(path, text)
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise ManifestError([Problem(str(path), 1, "", "the file is empty")])
        if problems := list(_tree_problems(path, root)):
            raise ManifestError(problems)
        return root, loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise ManifestError([Problem(str(path), line, "", f"not valid YAML: {error.problem or error}")]) from None
    except yaml.reader.ReaderError as error:
        line = text.partition(chr(error.character))[0].count("\n") + 1
        message = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        raise ManifestError([Problem(str(path), line, "", message)]) from None


def _check_depth(path: Path, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else None
            raise ManifestError([Problem(str(path), line, "", f"nested deeper than {MAX_DEPTH} levels")])


def _tree_problems(path: Path, root: yaml.Node) -> Iterator[Problem]:
    nodes = list(_nodes(root))
    if _expanded_size(root) > len(nodes) + MAX_ALIASED:
        yield Problem(str(path), 1, "", f"aliases stand for more than {MAX_ALIASED:,} values, or one contains itself")
    for node in nodes:
        if isinstance(node, yaml.MappingNode):
            yield from _duplicate_keys(path, node)


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node once, however often it is aliased."""
    stack, seen = [root], {id(root)}
    while stack:
        node = stack.pop()
        yield node
        new = [child for child in _children(node) if id(child) not in seen]
        seen.update(map(id, new))
        stack.extend(new)


def _expanded_size(root: yaml.Node) -> float:
    """Number of values the document stands for once aliases are expanded; infinite for one that contains itself."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # met again before it is known: it contains itself
            sizes[id(node)] = 1 + sum(map(size, _children(node)))
        return sizes[id(node)]

    return size(root)


def _children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return (part for entry in node.value for part in entry)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _duplicate_keys(path: Path, node: yaml.MappingNode) -> Iterator[Problem]:
    """YAML lets the last of two equal keys win silently; a person never means that."""
    seen = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in seen and key.value != "<<":
            yield Problem(str(path), key.start_mark.line + 1, key.value, "this key is given twice")
        seen.add(key.value)


def _same_key(written: str, wanted: int | str) -> bool:
    if written == wanted or (written == "prompts" and wanted == "prompts_file"):
        return True
    tables = (TOP_ALIASES, INPUT_ALIASES, GENERATE_ALIASES, QualitySpec.aliases)
    return any(table.get(written) == wanted for table in tables)


def _node_at(root: yaml.Node | None, loc: Loc) -> tuple[int | None, int]:
    """Walks the node tree along `loc` as far as it goes: the 1-based line reached, and how many steps were taken."""
    node, line = root, root.start_mark.line + 1 if root is not None else None
    for depth, part in enumerate(loc):
        if isinstance(node, yaml.MappingNode) and (found := _entry(node, part)):
            node, line = found[1], found[0].start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        elif part != 0 or isinstance(node, yaml.SequenceNode):  # one prompt may stand for a list of one
            return line, depth
    return line, len(loc)


def _entry(node: yaml.MappingNode, part: int | str) -> tuple[yaml.Node, yaml.Node] | None:
    """The key and value of a mapping that `part` means. Merged entries (`<<`) come before its own, which win."""
    entries = [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    exact = [entry for entry in entries if entry[0].value == str(part)]
    return next(reversed(exact or [entry for entry in entries if _same_key(entry[0].value, part)]), None)


def _problem(path: Path, root: yaml.Node | None, loc: Loc, message: str) -> Problem:
    return Problem(str(path), _node_at(root, loc)[0], ".".join(map(str, loc)), message)


_PLAIN_WORDS = {
    "missing": "'{key}' is missing",
    "tuple_type": "'{key}' should be a list",
    "model_type": "'{key}' should be a mapping (key: value)",
    "string_type": "'{key}' should be text; put it in quotes",
    "string_too_short": "'{key}' is empty",
    "invalid_key": "a key should be text; put it in quotes",
}
_ENTRIES = {
    "inputs": "an input is a mapping: `image:`, `images:`, `video:` or `generate:`, and `prompts:`",
    "prompts": "a prompt is text (in quotes if it looks like a number, a date or yes) or a mapping with `prompt:`",
}


def _explain(path: Path, root: yaml.Node | None, detail: ErrorDetails, top: type[_Value] = Manifest) -> Problem:
    """Turns one pydantic error into a sentence that says what would be right."""
    loc, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    key, parent = (str(loc[-1]) if loc else ""), (loc[-2] if len(loc) > 1 else "")
    if kind == "extra_forbidden":
        message = _unknown_key(key, _model_at(loc[:-1], top))
    elif kind == "literal_error":
        message = _unknown_word(detail["input"], context["expected"])
    elif kind == "model_type" and parent in _ENTRIES:
        message = _ENTRIES[str(parent)]
    elif detail["input"] is None and kind != "invalid_key":
        message = f"'{key}' has no value"
    elif kind in _PLAIN_WORDS:
        message = _PLAIN_WORDS[kind].format(key=key)
    else:
        text = detail["msg"]
        message = text[0].lower() + text[1:] + _shown(detail["input"])
        if kind == "less_than_equal" and key in SHARES_OF_STEPS:
            message += f"; if it counts steps, write it {AS_FRACTION}"
    return _problem(path, root, (*loc, context["key"]) if kind == "given_twice" else loc, message)


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        return ""  # Python refuses to print numbers of thousands of digits
    return f" (got {_cut(repr(value))})" if isinstance(value, str | int | float) else ""


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _unknown_key(key: str, model: type[_Value]) -> str:
    known = _keys_of(model)
    homes = (f"it belongs {place}" for place, model in _PLACES.items() if key in _keys_of(model))
    words = difflib.get_close_matches(key, [*known, *HINTS], n=1, cutoff=0.6)
    near = (HINTS.get(word) or f"did you mean '{model.aliases.get(word, word)}'?" for word in words)
    quotes = ("text that holds a colon needs quotes" for _ in [key] if " " in key)
    listed = (f"known here: {', '.join(name for name in known if name not in INPUT_ALIASES)}",)
    return f"unknown key '{_cut(key)}'; " + next(itertools.chain(homes, near, quotes, listed))


def _unknown_word(word: Any, expected: str) -> str:
    words = [w.strip(" '") for w in expected.replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(str(word), words, n=1)
    return f"this should be {' or '.join(words)}{_shown(word)}" + (f"; did you mean '{near[0]}'?" if near else "")


_MAPPINGS: dict[str, type[_Value]] = {
    "defaults": Settings,
    "run": RunSpec,
    "ray": RaySpec,
    "slurm": SlurmSpec,
    "evaluation": EvaluationSpec,
    "quality": QualitySpec,
    "retry": Settings,
    "inputs": InputSpec,
    "generate": GenerateSpec,
    "prompts": PromptSpec,
}


_PLACES: dict[str, type[_Value]] = {
    "at the top of the manifest": Manifest,
    **{f"under `{name}`": model for name, model in _MAPPINGS.items()},
}


def _model_at(loc: Sequence[int | str], top: type[_Value]) -> type[_Value]:
    """What the mapping at `loc` is."""
    words = [part for part in loc if part in _MAPPINGS]
    return _MAPPINGS[str(words[-1])] if words else top


def _keys_of(model: type[_Value]) -> list[str]:
    return [name for name in (*model.model_fields, *model.aliases) if name != "prompts_file"]
