"""Packing source features: 8-bit integers or floats with a scale per channel (docs/performance.md has the errors)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE = ".scale"


@dataclass(frozen=True)
class _EightBits:
    """A storage type of one byte.

    Attributes:
        dtype: The type.
        largest: What a channel's largest magnitude becomes.
        quantised: Brings scaled values to the type.
    """

    dtype: torch.dtype
    largest: float
    quantised: Callable[[Tensor], Tensor]


_EIGHT_BITS = {
    "int8": _EightBits(torch.int8, 127, lambda scaled: scaled.round().to(torch.int8)),
    # Three bits of mantissa: coarser near the largest value, finer near zero.
    "fp8": _EightBits(torch.float8_e4m3fn, 448, lambda scaled: scaled.to(torch.float8_e4m3fn)),
}


def stored_type(compression: str, dtype: torch.dtype) -> torch.dtype:
    """The type of packed values for features of a dtype."""
    return dtype if compression == "none" else _EIGHT_BITS[compression].dtype


def packed(features: Mapping[str, Tensor], compression: str) -> dict[str, Tensor]:
    """Features as they are kept.

    Args:
        features: By name, with the rows first; maps (rows, channels, height, width) or (rows, tokens, channels).
        compression: `none`, `int8` or `fp8`.

    Returns:
        The same where there is no compression; else each feature in one byte a value and, under its name with `.scale`,
        a scale for each row and channel.
    """
    if compression == "none":
        return dict(features)
    kind, kept = _EIGHT_BITS[compression], {}
    for name, feature in features.items():
        places = (2, 3) if feature.ndim == 4 else (1,)
        # The smallest normal number keeps a channel of zeros finite. Scales are float32: in half precision they would underflow.
        scale = (feature.float().abs().amax(places, keepdim=True) / kind.largest).clamp_min(torch.finfo().tiny)
        kept[name], kept[name + SCALE] = kind.quantised(feature.float() / scale), scale
    return kept


def unpacked(kept: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What `packed` was given, but for rounding, in the UNet's dtype."""
    return {
        name: (kept[name].float() * kept[name + SCALE]).to(dtype) if name + SCALE in kept else kept[name]
        for name in kept
        if not name.endswith(SCALE)
    }
