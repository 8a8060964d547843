"""What a result is made with: methods and their settings, at a prompt, an input or in `defaults`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pnp_batch.manifest.document import Loc
from pnp_batch.manifest.fields import Cells, Fraction, Layers, Number, Pixels, Seed, Steps, Text, Value
from pnp_batch.manifest.keys import GENERATE_ALIASES, SETTING_ALIASES

AUTHORS_INVERSION_STEPS = 999

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


class Settings(Value):
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


class GenerateSpec(Value):
    """A guidance image that is sampled from a prompt (method.md, section 6)."""

    aliases = GENERATE_ALIASES

    prompt: Text
    seed: Seed = 0
    guidance_scale: Number = 7.5
    negative_prompt: Text = ""
    num_inference_steps: Steps | None = None


def means_nothing(setting: str, method: str) -> str:
    """What is wrong with a setting that a method does not know."""
    return f"{setting} means nothing to `method: {method}`; it belongs to {' and '.join(METHODS_OF[setting])}"
