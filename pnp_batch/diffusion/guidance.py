"""Classifier-free guidance with negative prompts, as weights of UNet rows (method.md, section 5; no torch needed).

The guided prediction is a weighted sum of rows: the target prompt with w, the empty prompt with (1 - w) alpha_i and the
negative prompt with (1 - w) (1 - alpha_i). Rows of weight zero are never computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pnp_batch.manifest import Settings


@dataclass(frozen=True)
class Row:
    """One UNet row of a guided prediction: the text it sees and its weight in the sum."""

    text: str
    weight: float


def negative_alpha(settings: Settings, step: int) -> float:
    """alpha_i at sampling step i: `alpha` times 1, 1 - i/(n-1) or exp(-6 i/(n-1)) (Plug-and-Play, supplement)."""
    last = max(settings.num_inference_steps - 1, 1)
    shape = {"constant": 1.0, "linear": 1 - step / last, "exp": math.exp(-6 * step / last)}
    return settings.negative_alpha * shape[settings.negative_schedule]


def is_constant(settings: Settings) -> bool:
    """Whether every step has the same rows."""
    return settings.negative_schedule == "constant" or not settings.negative_alpha or not settings.negative_prompt


def guidance_rows(prompt: str, settings: Settings, step: int) -> list[Row]:
    """The rows to compute at a sampling step: one where guidance is 1, mostly two, three only where both negatives count."""
    scale, alpha = settings.guidance_scale, negative_alpha(settings, step)
    if settings.negative_prompt == "":
        alpha = 1.0
    rows = [Row("", (1 - scale) * alpha), Row(settings.negative_prompt, (1 - scale) * (1 - alpha)), Row(prompt, scale)]
    return [row for row in rows if row.weight != 0]


def injected_steps(settings: Settings) -> tuple[int, int]:
    """At how many of the first sampling steps f and A are injected (method.md, section 3)."""
    steps = settings.num_inference_steps
    return int(steps * settings.pnp_f_t), int(steps * settings.pnp_attn_t)


def replaced_steps(settings: Settings) -> tuple[int, int]:
    """At how many of the first sampling steps Prompt-to-Prompt replaces cross-attention and self-attention maps."""
    steps = settings.num_inference_steps
    return int(steps * settings.p2p_cross_replace), int(steps * settings.p2p_self_replace)


def skipped_steps(settings: Settings) -> int:
    """How many of the first sampling steps SDEdit leaves out, as diffusers' image-to-image pipelines count them."""
    return settings.num_inference_steps - int(settings.num_inference_steps * settings.sdedit_strength)
